"""What is done to the process while it loads and runs."""

from __future__ import annotations

import gc

from mmpipe.loading import collector_spared


def test_a_job_spares_the_collector_what_is_there_and_gives_it_back() -> None:
    gc.unfreeze()
    with collector_spared():
        assert gc.get_freeze_count() > 10_000
    assert gc.get_freeze_count() == 0


def test_what_the_process_has_frozen_itself_stays_so() -> None:
    gc.unfreeze()
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with collector_spared():
            assert gc.get_freeze_count() >= count
        assert gc.get_freeze_count() >= count
    finally:
        gc.unfreeze()
