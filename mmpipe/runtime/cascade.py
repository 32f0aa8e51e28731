"""The cascade: stage by stage, survivors in full buckets, several lanes in flight, decoding ahead: throughput.

    shard k      stage 0 ▓▓▓▓▓▓▓░            ▓ a full bucket, ░ the last one of a stage, filled up
                 stage 1    ▓  ▓  ▓░         a row is asked for in the next stage as soon as its gate has let it pass
    shard k + 1  stage 0         ▓▓▓▓▓▓▓░    begins where shard k asks for nothing more

The deepest stage of the oldest shard that has a full bucket goes first: its rows give their slots back soonest.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from mmpipe.graphs.plan import HEAD, Segment
from mmpipe.runtime.lanes import Lane, Rows
from mmpipe.runtime.running import Done, Running
from mmpipe.runtime.shard import Shard
from mmpipe.runtime.supply import Supply

_SHARDS = 2  # on their way at once


class Cascade(Running):
    """Buckets are formed of what has been decoded; the host waits only where nothing else can be done."""

    def run(self, shards: Iterable[Shard], done: Done) -> None:
        self.coming: Iterator[Shard] = iter(shards)
        self.passages: deque[Passage] = deque()
        self.stage_of: dict[int, Stage] = {}  # lane → the stage that its run is of
        self.moved = False  # rows have gone from one stage to another, or out
        while self._take_in():
            self.finish_ended()
            if self.passages[0].finished():
                passage = self.passages.popleft()
                self.begun.remove(passage.shard)
                done(passage.shard)
            elif not self._submit_full():
                self._wait()

    def _take_in(self) -> bool:
        """Give slots to rows that wait for one, and begin with the next shard. False: there is nothing left to do."""
        while True:
            for passage in self.passages:
                passage.admit()
            last = self.passages[-1] if self.passages else None
            if last is not None and (len(self.passages) == _SHARDS or not last.all_begun()):
                return True
            shard = next(self.coming, None)
            if shard is None:
                return bool(self.passages)
            self.begun.append(shard)
            self.passages.append(Passage(self, shard, last))

    def _submit_full(self) -> bool:
        """Submit one run, if a bucket is full. Whether anything has come of it, if only that rows have moved on."""
        self.moved = False
        for passage in self.passages:
            for stage in reversed(passage.stages):
                if stage.collect():
                    self._submit(stage)
                    return True
        return self.moved

    def _wait(self) -> None:
        """For a medium, where a lane is free and something is being decoded; else for a run; else make do with a
        bucket that is not full."""
        if len(self.flying) < len(self.executor.lanes):
            for passage in self.passages:
                for stage in reversed(passage.stages):
                    if stage.wait():
                        return
        if self.flying:
            self.finish_one()
            return
        for passage in self.passages:
            for stage in reversed(passage.stages):
                if stage.collect(make_do=True):
                    self._submit(stage, make_do=True)
                    return
        raise AssertionError("rows are left, and nothing can be done for them")

    def _submit(self, stage: Stage, *, make_do: bool = False) -> None:
        taken = stage.take(make_do=make_do)
        lane = self.lane()
        work = self.begin(lane, stage.shard, stage.number)
        self.stage_of[lane.number] = stage
        for segment in stage.segments:
            if taken[segment.name]:
                self.write(stage.shard, work, segment, taken[segment.name])
        stage.shard.feed.computing()
        lane.submit_all(taken)
        for segment in stage.segments:
            self.submitted(lane, segment, taken[segment.name])

    def finish(self, lane: Lane) -> None:
        super().finish(lane)
        stage = self.stage_of.pop(lane.number)
        rows = [row for head in stage.heads if head.name in lane.rows for row in lane.rows[head.name].rows]
        stage.gated(rows)

    def landed(self, serial: int) -> bool:
        """Whether all runs before this one have been finished."""
        return not self.flying or self.flying[0].serial >= serial


class Passage:
    """One shard on its way through the stages."""

    def __init__(self, run: Cascade, shard: Shard, before: Passage | None) -> None:
        self.run, self.shard = run, shard
        self.stages: list[Stage] = []
        for number in range(run.plan.stages):
            self.stages.append(Stage(run, self, number, before))
        self.next_row = 0

    def admit(self) -> None:
        """Let rows in, as far as there are slots."""
        count = min(len(self.run.slots), self.shard.count - self.next_row)
        if count:
            rows = list(range(self.next_row, self.next_row + count))
            for row in rows:
                self.run.admit(self.shard, row)
            self.next_row += count
            self.stages[0].put(rows)

    def complete(self, number: int) -> bool:
        """Whether no more rows come into a stage."""
        if self.next_row < self.shard.count:
            return False
        return number == 0 or (self.stages[number - 1].empty() and self.complete(number - 1))

    def all_begun(self) -> bool:
        """Whether the first stage has all its rows, and none waits for its decoding to begin."""
        return self.next_row == self.shard.count and self.stages[0].all_begun()

    def has_begun(self, number: int, place: int) -> bool:
        """Whether all media that one supply of a stage will ever ask for are being decoded, or have been."""
        return self.complete(number) and self.stages[number].supplies[place].all_begun()

    def finished(self) -> bool:
        last = len(self.stages) - 1
        return self.complete(last) and self.stages[last].empty() and not self.run.in_flight(self.shard)


class Stage:
    """The rows of one shard that wait for one stage, or are in it."""

    def __init__(self, run: Cascade, passage: Passage, number: int, before: Passage | None) -> None:
        self.run, self.number, self.shard = run, number, passage.shard
        self.passage: Passage = weakref.proxy(passage)  # which has this stage: a shard must not wait for the collector
        self.segments = list(run.plan.stage(number))
        self.heads: Sequence[Segment] = [segment for segment in self.segments if segment.branch == HEAD]
        self.supplies: list[Supply] = []
        for segment in self.segments:
            if segment.branch != HEAD:
                begun = None if before is None else partial(before.has_begun, number, len(self.supplies))
                self.supplies.append(Supply(run, self.shard, segment, begun))
        # branches on streams of their own are side by side within one run: it waits for a bucket of each
        (steps,) = (s.steps for s in run.plan.stage_plans if number in s.stages)
        self._together = len({step.stream for step in steps if step.does == "run" and step.branch != HEAD}) > 1
        self._waiting: deque[int] = deque()  # for their media
        self._ready: deque[int] = deque()  # for the head
        self._passed: deque[tuple[int, int]] = deque()  # (serial, row): past it when the runs before have landed
        self._in_head = 0

    def put(self, rows: Sequence[int]) -> None:
        self._waiting.extend(rows)
        for supply in self.supplies:
            supply.put(self.shard.ledger.having(supply.segment.branch, rows))

    def empty(self) -> bool:
        return not (self._waiting or self._ready or self._passed or self._in_head)

    def complete(self) -> bool:
        return self.passage.complete(self.number)

    def all_begun(self) -> bool:
        return all(supply.all_begun() for supply in self.supplies)

    def collect(self, *, make_do: bool = False) -> bool:
        """Place what has come; whether there is a full bucket for one of the segments, or the last one of the shard.
        `make_do`: any that has rows."""
        for supply in self.supplies:
            supply.collect()
        self._check()
        last = make_do or self.complete()
        if self._together and not make_do and not all(s.has_bucket(last) or s.idle() for s in self.supplies):
            return False
        return any(supply.has_bucket(last) for supply in self.supplies) or self._head_has_bucket(last)

    def wait(self) -> bool:
        """Wait for one medium. False: none is being decoded for this stage."""
        return any(supply.wait() for supply in self.supplies)

    def take(self, *, make_do: bool) -> dict[str, Rows]:
        """A bucket for each segment that has one."""
        last = make_do or self.complete()
        taken = {supply.segment.name: supply.take(last) for supply in self.supplies}
        self._check()
        full = self._head_has_bucket(last)
        for head in self.heads:
            count = min(self.run.bucket, len(self._ready)) if full else 0
            rows = [self._ready.popleft() for _ in range(count)]
            self._in_head += count
            taken[head.name] = Rows(rows, [self.shard.slot_of[row] for row in rows])
        return taken

    def gated(self, rows: Sequence[int]) -> None:
        """A head has answered for these rows, and the runs before it have landed."""
        self._in_head -= len(rows)
        while self._passed and self.run.landed(self._passed[0][0]):
            rows = [*rows, self._passed.popleft()[1]]
        self._move_on(rows)

    def _head_has_bucket(self, last: bool) -> bool:
        whole = last and not self._waiting
        return len(self._ready) >= self.run.bucket or (whole and bool(self._ready))

    def _check(self) -> None:
        """Rows that no supply of this stage holds back go to the head, or past it where it has nothing new for them."""
        while self._waiting and all(supply.has_passed(self._waiting[0]) for supply in self.supplies):
            row = self._waiting.popleft()
            if self.heads and self.shard.ledger.wants_head(self.heads[0], row):
                self._ready.append(row)
            else:
                self._passed.append((self.run.serial + 1, row))  # the run that is being made included
        if self._passed and self.run.landed(self._passed[0][0]):
            self.gated([])

    def _move_on(self, rows: Sequence[int]) -> None:
        self.run.moved |= bool(rows)
        live = [row for row in rows if self.shard.ledger.is_live(row)]
        stays = {*live}
        if self.number < len(self.passage.stages) - 1:
            if live:
                self.passage.stages[self.number + 1].put(live)
        else:
            self.shard.answered(len(live))  # done with, though nothing answered
            stays = set()
        for row in rows:
            if row not in stays:
                self.run.dismiss(self.shard, row)
