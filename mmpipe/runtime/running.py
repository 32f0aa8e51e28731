"""What both schedules share: rows and their slots, runs in lanes, gates as they answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from mmpipe.graphs.plan import HEAD, Segment
from mmpipe.runtime.lanes import Lane, Rows, Work
from mmpipe.runtime.ledger import Look
from mmpipe.runtime.pool import SlotRows
from mmpipe.runtime.shard import Shard
from mmpipe.runtime.streams import Event

if TYPE_CHECKING:
    from mmpipe.runtime.executor import Executor

Done = Callable[[Shard], None]

_LOOK_SECONDS = 0.001  # how often to see whether a younger run has ended before the oldest


class Running:
    """One run of an executor, over one shard or many."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.plan = executor, executor.plan
        self.bucket = executor.plan.stage_plans[0].rows
        self.slots = SlotRows(executor.plan.slots)
        self.feeders = {executor.plan.feeder(branch.name).name for branch in executor.plan.branches}
        self.heads = [segment for segment in executor.plan.segments if segment.branch == HEAD]
        # lanes with streams of their own end in any order; who watches sees buckets in the order of the rows
        self.any_order = executor.plan.own_streams and not executor.watches
        self.flying: deque[Lane] = deque()
        self.shard_of: dict[int, Shard] = {}  # lane → whose rows its run has
        self.begun: list[Shard] = []  # and not yet handed on
        self.serial = 0
        self.events_before: dict[int, Mapping[str, Event]] = {}  # stage plan → events of its last run

    def run(self, shards: Iterable[Shard], done: Done) -> None:
        """Run shards to their answers; `done` gets each, in order, when all its rows have been done with."""
        raise NotImplementedError

    def close(self) -> None:
        """However it ended: no decoder is at work, and every row of media is free."""
        for shard in self.begun:
            shard.feed.close()
        for media in self.executor.media.values():
            media.reset()

    def admit(self, shard: Shard, row: int) -> None:
        shard.slot_of[row] = self.slots.take()

    def dismiss(self, shard: Shard, row: int) -> None:
        self.slots.give_back(shard.slot_of.pop(row))

    def lane(self) -> Lane:
        """A free lane: a run is finished first when all are in flight."""
        if len(self.flying) == len(self.executor.lanes):
            self.finish_one()
        lane = next(lane for lane in self.executor.lanes if lane.run is None)
        self.flying.append(lane)
        return lane

    def finish_one(self) -> None:
        """Finish one run: the one that ends first, or the oldest where runs end in order."""
        while self.any_order and not self.finish_ended():
            self.flying[0].pause(_LOOK_SECONDS)
        if not self.any_order:
            self.finish(self.flying.popleft())

    def finish_ended(self) -> bool:
        """Finish the runs that have ended; whether there were any."""
        before = len(self.flying)
        for lane in list(self.flying):
            if lane.ended():
                self.flying.remove(lane)
                self.finish(lane)
            elif not self.any_order:
                break
        return len(self.flying) < before

    def in_flight(self, shard: Shard) -> bool:
        """Whether a run with rows of this shard has not been finished."""
        return any(self.shard_of[lane.number] is shard for lane in self.flying)

    def land(self) -> None:
        """Finish every run in flight, the oldest first."""
        while self.flying:
            self.finish(self.flying.popleft())

    def begin(self, lane: Lane, shard: Shard, stage_plan: int) -> Work:
        work = self.executor.works[stage_plan][lane.number]
        lane.begin(work, self.serial, self.events_before.get(stage_plan, {}))
        self.events_before[stage_plan] = lane.events
        self.shard_of[lane.number] = shard
        self.serial += 1
        return work

    def write(self, shard: Shard, work: Work, segment: Segment, rows: Rows) -> None:
        """The host's part of a segment's run: row numbers, who has what, and embeddings that are known."""
        if rows.rows:
            work.write_rows(segment.name, rows)
        if segment.branch == HEAD:
            work.write_presence(segment.name, shard.ledger.outcome.present_NM[rows.rows])
        else:
            work.write_restored(segment.name, rows.restored)
        if rows.restored.rows:
            shard.ledger.embedded(segment.branch, rows.restored.rows, torch.stack(rows.restored.embeddings))

    def submitted(self, lane: Lane, segment: Segment, rows: Rows) -> None:
        if rows.media:
            self.executor.media[segment.branch].read(rows.media, lane.events[f"in:{segment.name}"])

    def gate(self, lane: Lane, segment: Segment) -> None:
        """Wait for a head's answer and let the sure rows leave."""
        shard, exit_ = self.shard_of[lane.number], self.plan.exits[segment.stage]
        rows = lane.rows[segment.name].rows
        look = shard.looks.setdefault(segment.stage, Look(segment.stage, [], [], []))
        answer = lane.answer(segment.name, exit_.value)
        shard.answered(shard.ledger.gate(segment.stage, answer, rows, look))

    def finish(self, lane: Lane) -> None:
        """Take a run's answers and free its lane."""
        work, shard = lane.work, self.shard_of[lane.number]
        assert work is not None
        for segment in self.heads:
            if segment.name in lane.rows:
                self.gate(lane, segment)
        spans = lane.end()
        for span in spans:
            shard.ledger.outcome.spans.append(span)
            if ":" not in span.step:
                shard.ledger.spent(span.step, span.end - span.start)
        ended = {span.step for span in spans}
        for segment in self.plan.segments:
            if segment.branch != HEAD and f"out:{segment.name}" in ended:
                rows = lane.rows[segment.name].rows
                for branch, value in self.plan.embeddings:
                    if value in segment.writes:
                        bucket_RD = work.views[f"{segment.name}/answer/{value}"]
                        shard.ledger.embedded(branch, rows, bucket_RD)
                        shard.computed(branch, rows, bucket_RD[: len(rows)])
        for name, values in work.watched.items():
            rows = lane.rows[name].rows
            found = {key: value[: len(rows)] for key, value in values.items()}
            self.executor.watches[name].deliver([shard.names[row] for row in rows], found)
        work.watched.clear()
