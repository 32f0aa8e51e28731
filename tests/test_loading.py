"""What is done to the process while it loads and runs."""

from __future__ import annotations

import gc

from mmpipe.loading import collector_spared


def collected(thing: object) -> bool:
    """Whether the collector looks through it. Counts of what is frozen would not tell: they fall whenever anything
    frozen is freed, by whichever thread."""
    return any(each is thing for each in gc.get_objects())


def test_a_job_spares_the_collector_what_is_there_and_gives_it_back() -> None:
    gc.unfreeze()
    before: list[object] = [[]]
    assert collected(before)
    with collector_spared():
        assert not collected(before)
        since: list[object] = [[]]
        assert collected(since)
    assert collected(before)
    assert gc.get_freeze_count() == 0


def test_what_the_process_has_frozen_itself_stays_so() -> None:
    gc.unfreeze()
    before: list[object] = [[]]
    gc.freeze()
    try:
        with collector_spared():
            assert not collected(before)
            since: list[object] = [[]]
        assert not collected(before)
        assert collected(since)  # and nothing is frozen that the process did not ask for
    finally:
        gc.unfreeze()
