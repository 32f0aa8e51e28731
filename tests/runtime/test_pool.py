"""The pool's account: what is whose, when it is free again, and that nothing is allocated beside it."""

from __future__ import annotations

import pytest
import torch
from support.parts import batch
from support.running import MODALITY_EXITS, Rows, executor
from torch.utils._python_dispatch import TorchDispatchMode

from mmpipe.graphs.plan import PRESENCE
from mmpipe.runtime.device import HostDevice
from mmpipe.runtime.pool import MediaRows, PoolSizes, SlotRows


class Mark:
    """An event that is there when it is told so."""

    def __init__(self) -> None:
        self.there = False
        self.waited = 0

    def done(self):
        return self.there

    def wait(self):
        self.there = True
        self.waited += 1


def rows_of(count):
    return MediaRows({"image.pixels": torch.zeros(count, 2)})


def test_media_go_from_free_to_filling_to_ready_to_reading_to_free():
    media, event = rows_of(2), Mark()
    row = media.take()
    assert media.states[row] == "filling"
    media.fill(row, {"pixels": torch.ones(2)})
    assert media.states[row] == "ready"
    assert media.tables["pixels"][row].tolist() == [1, 1]
    media.read([row], event)
    assert media.states[row] == "reading"
    media.reclaim()
    assert media.states[row] == "reading"
    event.there = True
    media.reclaim()
    assert media.states[row] == "free"


def test_a_full_pool_waits_for_the_run_that_reads_the_oldest():
    media, events = rows_of(2), [Mark(), Mark()]
    for event in events:
        row = media.take()
        media.fill(row, {"pixels": torch.ones(2)})
        media.read([row], event)
    assert media.take() == 0
    assert [event.waited for event in events] == [1, 0]


def test_a_pool_that_could_only_wait_for_itself_says_so():
    media = rows_of(1)
    media.take()
    with pytest.raises(AssertionError, match="held by the consumer itself"):
        media.take()


def test_a_medium_that_failed_gives_its_row_back():
    media = rows_of(1)
    media.release(media.take())
    assert media.states == ["free"]
    with pytest.raises(AssertionError):
        media.release(0)


def test_slots_are_given_once():
    slots = SlotRows(3)
    taken = [slots.take() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2]
    assert len(slots) == 0
    slots.give_back(taken[1])
    assert slots.take() == taken[1]


def test_the_pool_is_one_allocation_of_the_size_that_was_promised():
    asked = []

    class Counting(HostDevice):
        def allocate(self, size_bytes):
            asked.append(size_bytes)
            return super().allocate(size_bytes)

        def allocate_host(self, size_bytes):
            raise AssertionError("a CPU's pool is one")

    runner, _ = executor(MODALITY_EXITS, [0.3, 0.3], device=Counting(), lanes=2)
    assert asked == [PoolSizes(runner.plan).total]
    memory = (runner.pool._near, runner.pool._far)
    start, end = memory[0].data_ptr(), memory[1].data_ptr() + memory[1].nbytes
    for works in runner.works:
        for work in works:
            for view in work.views.values():
                assert start <= view.data_ptr() <= end - view.nbytes
                assert view.data_ptr() % 64 == 0
    runner.close()


def test_no_two_lanes_share_scratch_and_all_share_slots():
    runner, _ = executor(MODALITY_EXITS, [0.3, 0.3], lanes=2)
    one, other = (runner.works[0][lane].views for lane in (0, 1))
    for name, view in one.items():
        shared = name.startswith(("slots/", "media/"))
        assert (view.data_ptr() == other[name].data_ptr()) == shared, name
    runner.close()


def test_steps_allocate_nothing_outside_segments():
    """In the steady state, copies in and out make no storage: only what runs inside a segment does."""
    runner, _ = executor(MODALITY_EXITS, [0.3, 0.3])
    rows = batch(20)
    runner.run(rows[PRESENCE], Rows(rows))
    own = {runner.pool._near.untyped_storage().data_ptr(), runner.pool._far.untyped_storage().data_ptr()}
    made = []

    class NewStorage(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in own:
                    made.append(str(func))
            return result

    for works in runner.works:
        for step in works[0].stage_plan.steps:
            if step.does != "run":
                with torch.inference_mode(), NewStorage():
                    works[0].steps[step.name]()
    assert made == []
    runner.close()
