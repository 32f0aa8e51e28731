"""Ordering for real: random delays around every step, poisoned memory, and still the same bits."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from support.parts import LABELS, ORDER, batch
from support.running import DEPTH_EXITS, MODALITY_EXITS, Rows, executor

from mmpipe.errors import MmpipeError
from mmpipe.graphs.fuse import ExitSpec, Probe
from mmpipe.graphs.plan import PRESENCE
from mmpipe.runtime.device import HostDevice
from mmpipe.runtime.streams import HostStream

RUNS = 1000
torch.manual_seed(6)
TEXT_EXITS = [
    ExitSpec("text.layer1", ("text",), probe=Probe("text", 1, torch.randn(LABELS, 12), torch.zeros(LABELS), "mask")),
    ExitSpec("text", ("text",)),
    ExitSpec("text+audio", ("text", "audio")),
]
CONFIGS = {
    "no exits": ([], []),
    "modalities": (MODALITY_EXITS, [0.3, 0.3]),
    "depths": (DEPTH_EXITS, [0.3, 0.3, 0.3]),
    "an input that is needed again": (TEXT_EXITS, [0.28, 0.3, 0.3]),
    "exits that never fire": (DEPTH_EXITS, [2.0, 2.0, 2.0]),
}
PLACES = [
    {"layout": layout, "lanes": lanes, "parallel": parallel, "slots": slots}
    for layout, parallel in [
        ("one", False),
        ("lanes", False),
        ("staged", False),
        ("branches", False),
        ("parallel", True),
        ("branches", True),
    ]
    for lanes, slots in [(1, 8), (2, 64), (3, 32)]
] + [{"layout": "caller", "lanes": 1, "parallel": False, "slots": 16}]


class Slow(HostStream):
    """Waits a random while before and after each step, and sometimes not at all."""

    dice = random.Random(0)

    def submit(self, work, run, step):
        before, after = (self.dice.choice([0, 0, 0.0002, 0.0005, 0.001]) for _ in range(2))

        def late():
            time.sleep(before)
            work()
            time.sleep(after)

        super().submit(late, run, step)


class SlowDevice(HostDevice):
    def stream(self, name, threads):
        return Slow(name, threads)


def poison(runner):
    """Bytes that no run wrote are seen if they are ever read: NaN, and row numbers beyond every table."""
    for memory in (runner.pool._near, runner.pool._far):
        memory.fill_(0xFF)


def the_same(one, other, speculated=False):
    assert torch.equal(one.exit_N, other.exit_N)
    assert torch.equal(one.confidence_N, other.confidence_N)
    assert torch.equal(one.present_NM, other.present_NM)
    assert torch.equal(one.opened_NM, other.opened_NM)
    if one.probabilities_NL is not None:
        assert torch.equal(one.probabilities_NL, other.probabilities_NL)
    if not speculated:  # `one` by a cascade: what it needed is there, whatever else was computed in vain
        assert not (one.embedded_NM & ~other.embedded_NM).any()
    for name, table in one.embeddings.items():
        rows = (one.embedded_NM & other.embedded_NM)[:, ORDER.index(name)]
        assert torch.equal(table[rows], other.embeddings[name][rows])


@pytest.mark.parametrize("name", CONFIGS)
def test_random_delays_change_no_bit(name):
    specs, thresholds = CONFIGS[name]
    plain, _ = executor(specs, thresholds)
    rows = batch(27, seed=8)
    broken = [(3, "text"), (11, "image"), (20, "audio")]
    want = plain.run(rows[PRESENCE], Rows(rows, broken))
    threads = threading.active_count()
    runs = 0
    for number, place in enumerate(PLACES):
        runner, _ = executor(specs, thresholds, device=SlowDevice(), **place)
        for _ in range(-(-RUNS // len(CONFIGS) // len(PLACES))):
            poison(runner)
            the_same(want, runner.run(rows[PRESENCE], Rows(rows, broken)))
            runs += 1
        if number % 3 == 0:
            _fails_and_goes_on(runner, rows, broken, want)
        runner.close()
    assert runs >= RUNS // len(CONFIGS)
    assert threading.active_count() == threads
    plain.close()


@pytest.mark.parametrize("name", ["modalities", "depths", "an input that is needed again", "no exits"])
def test_shards_that_overlap_change_no_bit(name):
    """Each shard is what it is alone, and they come in order; of their media none is asked for twice."""
    specs, thresholds = CONFIGS[name]
    plain, _ = executor(specs, thresholds)
    shards = [(batch(count, seed=count), [(1, "text"), (2, "image")]) for count in (27, 3, 1, 40, 9, 0, 16)]
    want = [plain.run(rows[PRESENCE], Rows(rows, broken)) for rows, broken in shards]
    for place in PLACES:
        runner, _ = executor(specs, thresholds, device=SlowDevice(), **place)
        poison(runner)
        feeds = [Rows(rows, broken) for rows, broken in shards]
        made = (runner.shard(rows[PRESENCE], feed) for (rows, _), feed in zip(shards, feeds, strict=True))
        got = []
        runner.run_all(made, got.append)
        for one, other in zip(want, got, strict=True):
            the_same(one, other)
            assert [(look.rows, look.labels) for look in one.looks] == [
                (look.rows, look.labels) for look in other.looks
            ]
        assert all(len(feed.asked) == len(set(feed.asked)) for feed in feeds)
        assert all(state == "free" for media in runner.media.values() for state in media.states)
        runner.close()
    plain.close()


def test_the_next_shard_is_decoded_while_the_last_one_is_computed():
    runner, _ = executor(MODALITY_EXITS, [2.0, 2.0], lanes=1)
    rows, ended, early = batch(16), [], []
    rows[PRESENCE][:] = True

    class Watched(Rows):
        def open(self, branch, media):
            source = super().open(branch, media)
            get = source.get

            def seen():
                if self is feeds[1] and not ended:
                    early.append(branch)
                return get()

            source.get = seen
            return source

    feeds = [Watched(rows), Watched(rows)]
    runner.run_all((runner.shard(rows[PRESENCE], feed) for feed in feeds), lambda outcome: ended.append(outcome))
    assert "image" in early
    assert len(ended) == 2
    runner.close()


def test_branches_on_streams_of_their_own_run_side_by_side():
    """A bucket of each in one run, though one branch's media are there before another's."""
    runner, _ = executor([], [], layout="branches", lanes=1)
    rows = batch(16)
    rows[PRESENCE][:] = True

    class Late(Rows):
        def open(self, branch, media):
            source = super().open(branch, media)
            if branch == "audio":
                source.ready = lambda: False
            return source

    outcome = runner.run(rows[PRESENCE], Late(rows))
    runs = {}
    for span in outcome.spans:
        runs.setdefault(span.run, set()).add(span.step)
    together = {"image@0", "text@0", "audio@0"}
    assert [together & steps for steps in runs.values() if together & steps] == [together, together]
    runner.close()


def test_buckets_are_full_but_for_the_last_of_a_stage():
    runner, _ = executor(MODALITY_EXITS, [0.3, 0.3], lanes=2, slots=128)
    shards = [batch(100, seed=seed) for seed in range(4)]
    fill = {}
    runner.run_all(
        (runner.shard(rows[PRESENCE], Rows(rows)) for rows in shards),
        lambda outcome: [fill.setdefault((id(outcome), s.step), []).append(s.rows) for s in outcome.spans],
    )
    for (_, step), rows in fill.items():
        if ":" not in step:
            assert sum(count < 8 for count in rows) <= 1, (step, rows)
    runner.close()


def _fails_and_goes_on(runner, rows, broken, want):
    """A segment fails in the middle of a run: it is named, and the next run is as if nothing had been."""
    work = runner.works[-1][0]
    step = next(step for step in work.stage_plan.steps if step.does == "run" and step.branch == "head")

    def fails():
        raise MemoryError

    kept, work.steps[step.name] = work.steps[step.name], fails
    try:
        with pytest.raises(MmpipeError, match=rf"segment {step.name} failed: MemoryError: no memory left"):
            runner.run(rows[PRESENCE], Rows(rows, broken))
    finally:
        work.steps[step.name] = kept
    poison(runner)
    the_same(want, runner.run(rows[PRESENCE], Rows(rows, broken)))
    assert all(state == "free" for media in runner.media.values() for state in media.states)


def test_closing_in_the_middle_of_a_run_ends_it():
    for place in PLACES:
        runner, _ = executor(MODALITY_EXITS, [2.0, 2.0], device=SlowDevice(), **place)
        rows, found = batch(200, seed=2), []

        def run(runner=runner, rows=rows, found=found):
            try:
                runner.run(rows[PRESENCE], Rows(rows))
                found.append(None)
            except MmpipeError as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.02)
        runner.close()
        thread.join(timeout=20)
        assert not thread.is_alive(), place
        assert found
        assert found[0] is None or "closed while it ran" in str(found[0])


def test_an_interrupt_leaves_a_runner_that_works():
    """What Ctrl-C does: an exception in the host's thread, at any moment."""
    specs, thresholds = CONFIGS["depths"]
    rows = batch(27, seed=8)
    for place in PLACES:
        runner, _ = executor(specs, thresholds, device=SlowDevice(), **place)
        want = runner.run(rows[PRESENCE], Rows(rows))

        class Interrupts(Rows):
            def open(self, branch, media):
                source = super().open(branch, media)
                get = source.get

                def interrupted():
                    if sum(asked == branch for _, asked in self.asked) == 5:
                        raise KeyboardInterrupt
                    return get()

                source.get = interrupted
                return source

        with pytest.raises(KeyboardInterrupt):
            runner.run(rows[PRESENCE], Interrupts(rows))
        the_same(want, runner.run(rows[PRESENCE], Rows(rows)), speculated=place["parallel"])
        runner.close()


def test_parallel_drops_what_the_answers_made_useless():
    """The first gate lets every row leave while the later branch is still waiting to begin."""
    runner, _ = executor(MODALITY_EXITS, [0.0, 0.0], layout="parallel", parallel=True, lanes=1)
    rows = batch(8)
    rows[PRESENCE][:] = True
    runner.works[0][0].steps["in:audio@2"] = lambda: time.sleep(0.2)
    outcome = runner.run(rows[PRESENCE], Rows(rows))
    assert outcome.exit_N.tolist() == [0] * 8
    assert "audio@2" not in {span.step for span in outcome.spans}
    assert outcome.files_opened == {"image": 8, "text": 8, "audio": 8}  # speculation opens, and says so
    assert outcome.opened_NM.tolist() == [[True, False, False]] * 8  # but a row does not depend on the clock
    runner.close()


def test_a_runner_that_is_dropped_leaves_no_thread():
    before = threading.active_count()
    runner, _ = executor(MODALITY_EXITS, [0.3, 0.3], layout="branches")
    assert threading.active_count() > before
    del runner
    import gc

    gc.collect()
    assert threading.active_count() == before
