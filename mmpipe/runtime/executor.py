"""Runs any scheduled Plan over a set of rows; knows no model and no file.

    feed ─► media slots ─► in ─► segment ─► out ─► slots ─► in ─► head ─► out ─► gate (host) ─► answered, or next stage

The order in which rows go through is the schedule's: cascade.py or parallel.py. Every bucket has the same number of
rows, the last one filled up, so that a row's bytes depend on its own inputs alone.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmpipe.errors import Interrupted, MmpipeError
from mmpipe.graphs.backends import Lowered
from mmpipe.graphs.plan import Plan
from mmpipe.runtime.cascade import Cascade
from mmpipe.runtime.device import Device, HostDevice
from mmpipe.runtime.lanes import Lane, Watch, Work
from mmpipe.runtime.ledger import Gate, Outcome
from mmpipe.runtime.parallel import Parallel
from mmpipe.runtime.pool import Pool
from mmpipe.runtime.shard import Answered, Computed, Feed, Shard
from mmpipe.runtime.streams import StepFailed, Stream, StreamClosed


class Executor:
    """A scheduled plan, lowered, with its pool and streams. One run at a time. `close` it: it holds threads.

    `threads`: for each stream that computes; part of the numerics.
    """

    def __init__(
        self,
        plan: Plan,
        lowered: Mapping[str, Lowered],
        *,
        threads: int,
        gate: Gate | None,
        device: Device | None = None,
        watches: Mapping[str, Watch] | None = None,
    ) -> None:
        assert plan.stage_plans, "a plan is scheduled before it runs"
        self.plan, self.threads, self.gate = plan, threads, gate
        self.device = device or HostDevice()
        self.pool = Pool(plan, self.device)
        self.watches = dict(watches or {})
        names = dict.fromkeys(name for stage_plan in plan.stage_plans for name in stage_plan.streams)
        sets = plan.lanes if plan.own_streams else 1
        streams: list[dict[str, Stream]] = [
            {name: self.device.stream(name, 1 if name in ("in", "out") else threads) for name in names}
            for _ in range(sets)
        ]
        self.streams = [stream for one in streams for stream in one.values()]
        self._end = weakref.finalize(self, _close, self.streams)
        self.works = [
            [Work(plan, stage_plan, lane, self.pool, lowered, self.watches) for lane in range(plan.lanes)]
            for stage_plan in plan.stage_plans
        ]
        self.lanes = [Lane(number, streams[number % sets]) for number in range(plan.lanes)]
        self.media = {
            branch.name: self.pool.media(branch.inputs)
            for branch in plan.branches
            if any(f"media/{name}" in (b.name for b in s.buffers) for name in branch.inputs for s in plan.stage_plans)
        }

    def shard(
        self,
        present_NM: Tensor,
        feed: Feed,
        *,
        gate: Gate | None = None,
        names: Sequence[Any] | None = None,
        answered: Answered = lambda count: None,
        computed: Computed = lambda branch, rows, embeddings_KD: None,
    ) -> Shard:
        """Rows for `run_all`. `gate` None: the executor's."""
        gate = gate or self.gate
        return Shard(self.plan, present_NM, feed, gate, names=names, answered=answered, computed=computed)

    def run(self, present_NM: Tensor, feed: Feed) -> Outcome:
        """Run rows to their answers. Raises as `run_all`."""
        found: list[Outcome] = []
        self.run_all([self.shard(present_NM, feed)], found.append)
        return found[0]

    def run_all(self, shards: Iterable[Shard], done: Callable[[Outcome], None]) -> None:
        """Run shards to their answers, the next one beginning where the last has nothing left to begin with. `done`
        gets what became of each, in order.

        Raises MmpipeError that names the segment where a model, or memory, gave way; Interrupted as it came.
        """
        parallel = len(self.plan.stage_plans[0].stages) > 1
        before = torch.get_num_threads()

        def hand_on(shard: Shard) -> None:
            outcome = shard.outcome()
            with torch.inference_mode(False), threads_of(before):  # the caller's own work, as the caller would do it
                done(outcome)

        with torch.inference_mode(), threads_of(self.threads):
            run = (Parallel if parallel else Cascade)(self)
            try:
                run.run(shards, hand_on)
            except StepFailed as error:
                cause = error.__cause__
                if isinstance(cause, Interrupted):  # a signal, while a segment was computed on this very thread
                    raise cause from None
                reason = (str(cause).splitlines() or ["no memory left" if isinstance(cause, MemoryError) else ""])[0]
                raise MmpipeError(f"segment {error.step} failed: {type(cause).__name__}: {reason}") from cause
            except StreamClosed as error:
                raise MmpipeError("closed while it ran") from error
            finally:
                self._quiet()
                run.close()

    def at_work(self) -> int:
        """How many of the host's cores its streams compute on. May be asked on any thread."""
        return sum(stream.at_work for stream in self.streams)

    def _quiet(self) -> None:
        """However a run ended: nothing of it works on the pool any more, and every row of media is free."""
        for lane in self.lanes:
            lane.drop()
        for stream in self.streams:
            stream.synchronize()

    def close(self) -> None:
        self._end()


def _close(streams: Iterable[Stream]) -> None:
    for stream in streams:
        stream.close()


@contextlib.contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Compute with this many threads, whatever the caller has set; part of the numerics."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
