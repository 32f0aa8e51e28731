"""Runs any scheduled Plan over a set of rows; knows no model and no file.

    feed ─► media slots ─► in ─► segment ─► out ─► slots ─► in ─► head ─► out ─► gate (host) ─► answered, or next stage

    Executor   a plan, lowered and bound to memory, with its streams; `run` takes rows to their answers
    _Cascade   stage by stage over all rows, survivors in full buckets, several lanes in flight: throughput
    _Parallel  all branches of one bucket at once; a gate cancels what its answers made useless: latency

Every bucket has the same number of rows, the last one filled up, so that a row's bytes depend on its own inputs alone.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mmpipe.errors import MediaError, MmpipeError
from mmpipe.graphs.backends import Lowered
from mmpipe.graphs.plan import HEAD, Plan, Segment
from mmpipe.runtime.device import Device, HostDevice
from mmpipe.runtime.lanes import Lane, Rows, Watch, Work
from mmpipe.runtime.ledger import Gate, Ledger, Look, Outcome
from mmpipe.runtime.pool import MediaRows, Pool, SlotRows
from mmpipe.runtime.streams import Event, StepFailed, Stream, StreamClosed

Answered = Callable[[int], None]


class Feed(Protocol):
    """Where rows come from: opens and prepares one modality of the rows asked for, in their order, into media slots."""

    def __call__(self, branch: str, rows: Sequence[int], media: MediaRows) -> Iterator[int | MediaError]: ...


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

    def run(self, present_NM: Tensor, feed: Feed, *, answered: Answered = lambda count: None) -> Outcome:
        """Run rows to their answers. `answered(count)` is told how many rows have just been done with.

        Raises MmpipeError that names the segment where a model, or memory, gave way.
        """
        parallel = len(self.plan.stage_plans[0].stages) > 1
        with torch.inference_mode(), _threads(self.threads):
            run = (_Parallel if parallel else _Cascade)(self, present_NM, feed, answered)
            try:
                run.all_rows()
            except StepFailed as error:
                cause = error.__cause__
                reason = (str(cause).splitlines() or ["no memory left" if isinstance(cause, MemoryError) else ""])[0]
                raise MmpipeError(f"segment {error.step} failed: {type(cause).__name__}: {reason}") from cause
            except StreamClosed as error:
                raise MmpipeError("closed while it ran") from error
            finally:
                self._quiet()
                run.close()
            return run.ledger.close()

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


class _Running:
    """What both schedules share: rows and their slots, media as they come, gates as they answer."""

    def __init__(self, executor: Executor, present_NM: Tensor, feed: Feed, answered: Answered) -> None:
        self.executor, self.plan, self.feed, self.answered = executor, executor.plan, feed, answered
        self.ledger = Ledger(executor.plan, present_NM, executor.gate)
        self.count = present_NM.shape[0]
        self.bucket = executor.plan.stage_plans[0].rows
        self.slots = SlotRows(executor.plan.slots)
        self.slot_of: dict[int, int] = {}
        self.feeders = {executor.plan.feeder(branch.name).name for branch in executor.plan.branches}
        self.embedding_of = {value: branch for branch, value in executor.plan.embeddings}
        self.looks: dict[int, Look] = {}
        self.flying: deque[Lane] = deque()
        self.sources: list[Iterator[tuple[int, int]]] = []
        self.serial = 0
        self.events_before: Mapping[str, Event] = {}  # of the run begun last, within this stage

    def close(self) -> None:
        for source in self.sources:
            source.close()  # type: ignore[attr-defined]
        for media in self.executor.media.values():
            media.reset()
        looks = [self.looks[number] for number in sorted(self.looks)]
        self.ledger.outcome.looks = [look for look in looks if look.rows]

    def admit(self, row: int) -> None:
        self.slot_of[row] = self.slots.take()

    def dismiss(self, row: int) -> None:
        self.slots.give_back(self.slot_of.pop(row))

    def open(self, branch: str, rows: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(row, media slot) as they come; a row whose medium failed loses that modality and is left out."""
        found = self._opened(branch, rows)
        self.sources.append(found)
        return found

    def _opened(self, branch: str, rows: Sequence[int]) -> Iterator[tuple[int, int]]:
        source = self.feed(branch, rows, self.executor.media[branch])
        try:
            for row in rows:
                clock = time.perf_counter()
                result = next(source)
                self.ledger.spent("waiting", time.perf_counter() - clock)
                failure = result if isinstance(result, MediaError) else None
                self.ledger.opened(branch, row, failure)
                yield row, -1 if isinstance(result, MediaError) else result
        finally:
            source.close()  # type: ignore[attr-defined]

    def lane(self) -> Lane:
        """A free lane: the oldest run is finished first when all are in flight."""
        if len(self.flying) == len(self.executor.lanes):
            self.finish(self.flying.popleft())
        lane = next(lane for lane in self.executor.lanes if lane.run is None)
        self.flying.append(lane)
        return lane

    def land(self) -> None:
        """Finish every run in flight, the oldest first."""
        while self.flying:
            self.finish(self.flying.popleft())
        self.events_before = {}

    def begin(self, lane: Lane, stage_plan: int) -> Work:
        work = self.executor.works[stage_plan][lane.number]
        lane.begin(work, self.serial, self.events_before)
        self.events_before = lane.events
        self.serial += 1
        return work

    def write(self, work: Work, segment: Segment, rows: Rows) -> None:
        """The host's part of a segment's run: row numbers, and who has what."""
        work.write_rows(segment.name, rows)
        if segment.branch == HEAD:
            work.write_presence(segment.name, self.ledger.outcome.present_NM[rows.rows])

    def submitted(self, lane: Lane, segment: Segment, rows: Rows) -> None:
        if rows.media:
            self.executor.media[segment.branch].read(rows.media, lane.events[f"in:{segment.name}"])

    def gate(self, lane: Lane, segment: Segment) -> None:
        """Wait for a head's answer and let the sure rows leave."""
        exit_ = self.plan.exits[segment.stage]
        rows = lane.rows[segment.name].rows
        look = self.looks.setdefault(segment.stage, Look(segment.stage, [], [], []))
        self.answered(self.ledger.gate(segment.stage, lane.answer(segment.name, exit_.value), rows, look))

    def finish(self, lane: Lane) -> None:
        """Take a run's answers and free its lane."""
        work = lane.work
        assert work is not None
        for segment in self.plan.segments:
            if segment.branch == HEAD and segment.name in lane.rows:
                self.gate(lane, segment)
        spans = lane.end()
        for span in spans:
            self.ledger.outcome.spans.append(span)
            if ":" not in span.step:
                self.ledger.spent(span.step, span.end - span.start)
        ended = {span.step for span in spans}
        for segment in self.plan.segments:
            if segment.branch != HEAD and f"out:{segment.name}" in ended:
                for value in {*segment.writes} & {*self.embedding_of}:
                    rows = lane.rows[segment.name].rows
                    self.ledger.embedded(self.embedding_of[value], rows, work.views[f"{segment.name}/answer/{value}"])
        for name, values in work.watched.items():
            rows = lane.rows[name].rows
            self.executor.watches[name].deliver(rows, {key: value[: len(rows)] for key, value in values.items()})
        work.watched.clear()


class _Cascade(_Running):
    """A stage runs over all rows that wait for it before the next begins, so that survivors fill buckets.

    Where the slots don't hold all rows, the deepest stage drains first: its samples give their slots back.
    """

    def all_rows(self) -> None:
        self.waiting: list[list[int]] = [[] for _ in range(self.plan.stages)]
        next_row = 0
        while True:
            while next_row < self.count and len(self.slots):
                self.admit(next_row)
                self.waiting[0].append(next_row)
                next_row += 1
            stage = self._choose(all_in=next_row == self.count)
            if stage is None:
                return
            rows, self.waiting[stage] = self.waiting[stage], []
            self._stage(stage, rows)

    def _choose(self, *, all_in: bool) -> int | None:
        stages = [stage for stage, rows in enumerate(self.waiting) if rows]
        if not stages or stages[0] == 0 or all_in:
            return stages[0] if stages else None
        full = [stage for stage in stages if len(self.waiting[stage]) >= self.bucket]
        return (full or stages)[-1]

    def _stage(self, stage: int, rows: list[int]) -> None:
        segments = list(self.plan.stage(stage))
        heads = [segment for segment in segments if segment.branch == HEAD]
        encoders = [_Supply(self, segment, rows) for segment in segments if segment.branch != HEAD]
        ready: deque[int] = deque()
        checked = 0
        while True:
            taken = {supply.segment.name: supply.take(self.bucket) for supply in encoders}
            while checked < len(rows) and all(supply.has_passed(rows[checked]) for supply in encoders):
                if heads and self.ledger.wants_head(heads[0], rows[checked]):
                    ready.append(rows[checked])
                checked += 1
            if heads and (len(ready) >= self.bucket or checked == len(rows)):
                chosen = [ready.popleft() for _ in range(min(self.bucket, len(ready)))]
                taken[heads[0].name] = self._numbers(chosen)
            if any(found.rows for found in taken.values()):
                self._submit(stage, segments, taken)
            elif checked == len(rows) and not ready:
                break
        self.land()
        last = stage == self.plan.stages - 1
        for row in rows:
            if last or not bool(self.ledger.live_N[row]):
                if bool(self.ledger.live_N[row]):
                    self.answered(1)  # done with, though nothing answered
                self.dismiss(row)
            else:
                self.waiting[stage + 1].append(row)

    def _numbers(self, rows: list[int]) -> Rows:
        return Rows(rows, [self.slot_of[row] for row in rows])

    def _submit(self, stage: int, segments: Sequence[Segment], taken: Mapping[str, Rows]) -> None:
        lane = self.lane()
        work = self.begin(lane, stage)
        for segment in segments:
            if taken[segment.name].rows:
                self.write(work, segment, taken[segment.name])
        lane.submit_all(taken)
        for segment in segments:
            self.submitted(lane, segment, taken[segment.name])


class _Supply:
    """The rows of one encoder's segment in one stage, a bucket at a time, in order."""

    def __init__(self, run: _Running, segment: Segment, rows: Sequence[int]) -> None:
        self.run, self.segment = run, segment
        mine = run.ledger.having(segment.branch, rows)
        self._left = dict.fromkeys(mine)  # in order; what has been handed on is gone
        feeds = segment.name in run.feeders and segment.branch in run.executor.media
        self._source = run.open(segment.branch, mine) if feeds else iter([(row, -2) for row in mine])

    def has_passed(self, row: int) -> bool:
        """Whether a row has been handed on, has failed, or was never one of these."""
        return row not in self._left

    def take(self, count: int) -> Rows:
        found = Rows([], [])
        while len(found.rows) < count and self._left:
            row, media = next(self._source)
            del self._left[row]
            if media == -1:
                continue
            found.rows.append(row)
            found.slots.append(self.run.slot_of[row])
            if media >= 0:
                found.media.append(media)
        return found


class _Parallel(_Running):
    """Every branch of a bucket's rows starts at once, those of later exits too. When a gate has let all rows leave,
    what has not begun is dropped."""

    def all_rows(self) -> None:
        everyone = list(range(self.count))
        asked = {name: self.ledger.having(name, everyone) for name in self.executor.media}
        self.supplies = {name: self.open(name, rows) for name, rows in asked.items()}
        self.rows_of: dict[int, list[int]] = {}  # lane → rows of its bucket
        self.gated: set[tuple[int, str]] = set()
        for start in range(0, self.count, self.bucket):
            self._bucket(everyone[start : start + self.bucket])
        self.land()
        self.ledger.outcome.files_opened = {name: len(rows) for name, rows in asked.items()}
        self.ledger.forget_speculation()

    def _bucket(self, rows: list[int]) -> None:
        lane = self.lane()
        self.rows_of[lane.number] = rows
        for row in rows:
            self.admit(row)
        work = self.begin(lane, 0)
        chosen: dict[str, Rows | None] = {}
        for step in work.stage_plan.steps:
            segment = self.plan.segment(step.segment)
            if step.does == "in":
                chosen[segment.name] = found = self._rows(lane, segment, rows)
                if found is not None:
                    self.write(work, segment, found)
            lane.submit(step, chosen[segment.name])
            if step.does == "in" and (found := chosen[segment.name]) is not None:
                self.submitted(lane, segment, found)

    def _rows(self, lane: Lane, segment: Segment, rows: list[int]) -> Rows | None:
        """The rows of one segment; None where there are none, or nobody needs it any more."""
        assert lane.run is not None
        self._look(lane)
        if lane.run.stopped:
            return None
        if segment.branch == HEAD:
            wanted = [row for row in rows if self.ledger.wants_head(segment, row)]
            found = Rows(wanted, [self.slot_of[row] for row in wanted])
        elif segment.name in self.feeders and segment.branch in self.supplies:
            found = self._fed(segment.branch, rows)
        else:
            wanted = self.ledger.having(segment.branch, rows)
            found = Rows(wanted, [self.slot_of[row] for row in wanted])
        return found if found.rows else None

    def _fed(self, branch: str, rows: list[int]) -> Rows:
        found = Rows([], [])
        media = self.executor.media[branch]
        left = set(self.ledger.having(branch, rows))
        while left:
            row, slot = next(self.supplies[branch])
            if row not in left:  # of a bucket that all rows had left before this was asked for
                if slot >= 0:
                    media.release(slot)
                continue
            left.discard(row)
            if slot >= 0:
                found.rows.append(row)
                found.slots.append(self.slot_of[row])
                found.media.append(slot)
        return found

    def _look(self, lane: Lane) -> None:
        """Take the answers that are there, without waiting, and cancel what they made useless."""
        for segment in self.plan.segments:
            event = lane.events.get(f"out:{segment.name}")
            if segment.branch == HEAD and segment.name in lane.rows:
                if event is None or not event.done():
                    return  # gates answer in the order of their stages
                self.gate(lane, segment)

    def gate(self, lane: Lane, segment: Segment) -> None:
        if (lane.number, segment.name) in self.gated:
            return
        rows = self.rows_of[lane.number]
        if bool(self.ledger.live_N[rows].any()):
            super().gate(lane, segment)
            self.gated.add((lane.number, segment.name))
        if not bool(self.ledger.live_N[rows].any()) and lane.run is not None:
            lane.run.cancel()

    def finish(self, lane: Lane) -> None:
        super().finish(lane)
        self.gated = {(number, name) for number, name in self.gated if number != lane.number}
        for row in self.rows_of.pop(lane.number):
            if bool(self.ledger.live_N[row]):
                self.answered(1)  # done with, though nothing answered
            self.dismiss(row)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with this many threads, whatever the caller has set; part of the numerics."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
