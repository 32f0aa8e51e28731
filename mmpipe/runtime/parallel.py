"""The parallel schedule: all branches of one bucket at once; a gate drops what its answers made useless: latency."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from mmpipe.errors import MediaError
from mmpipe.graphs.plan import HEAD, Segment
from mmpipe.runtime.lanes import Lane, Rows
from mmpipe.runtime.running import Done, Running
from mmpipe.runtime.shard import Known, Shard, Source


class Parallel(Running):
    """Every branch of a bucket's rows starts at once, those of later exits too. When a gate has let all rows leave,
    what has not begun is dropped."""

    def run(self, shards: Iterable[Shard], done: Done) -> None:
        for shard in shards:
            self.begun.append(shard)
            self._shard(shard)
            self.begun.remove(shard)
            done(shard)

    def _shard(self, shard: Shard) -> None:
        self.shard = shard
        everyone = list(range(shard.count))
        self.asked: dict[str, deque[int]] = {}
        self.sources: dict[str, Source] = {}
        for name, media in self.executor.media.items():
            self.asked[name] = deque(shard.ledger.having(name, everyone))
            self.sources[name] = shard.feed.open(name, media)
            self.sources[name].put(self.asked[name])
        opened = {name: len(rows) for name, rows in self.asked.items()}
        self.rows_of: dict[int, list[int]] = {}  # lane → rows of its bucket
        self.answers: set[tuple[int, str]] = set()  # (lane, head's segment) that have been taken
        for start in range(0, shard.count, self.bucket):
            self._bucket(everyone[start : start + self.bucket])
        self.land()
        for source in self.sources.values():
            source.drop()
        shard.ledger.outcome.files_opened = opened
        shard.ledger.forget_speculation()

    def _bucket(self, rows: list[int]) -> None:
        lane = self.lane()
        self.rows_of[lane.number] = rows
        for row in rows:
            self.admit(self.shard, row)
        work = self.begin(lane, self.shard, 0)
        chosen: dict[str, Rows] = {}
        for step in work.stage_plan.steps:
            segment = self.plan.segment(step.segment)
            if segment.name not in chosen:
                chosen[segment.name] = found = self._rows(lane, segment, rows)
                if found:
                    self.write(self.shard, work, segment, found)
            lane.submit(step, chosen[segment.name])
            if step.does == "in":
                self.submitted(lane, segment, chosen[segment.name])

    def _rows(self, lane: Lane, segment: Segment, rows: list[int]) -> Rows:
        """The rows of one segment; none where nobody needs it any more."""
        assert lane.run is not None
        self._look(lane)
        if lane.run.stopped:
            return Rows()
        if segment.branch == HEAD:
            wanted = [row for row in rows if self.shard.ledger.wants_head(segment, row)]
        elif segment.name in self.feeders and segment.branch in self.sources:
            return self._fed(segment.branch, rows)
        else:
            wanted = self.shard.ledger.having(segment.branch, rows)
        return Rows(wanted, [self.shard.slot_of[row] for row in wanted])

    def _fed(self, branch: str, rows: list[int]) -> Rows:
        found = Rows()
        media, ledger = self.executor.media[branch], self.shard.ledger
        left = set(ledger.having(branch, rows))
        while left:
            clock = time.perf_counter()
            medium = self.sources[branch].get()
            ledger.spent("waiting", time.perf_counter() - clock)
            row = self.asked[branch].popleft()
            if isinstance(medium, Known):
                ledger.recalled(branch, row)
            else:
                ledger.opened(branch, row, medium if isinstance(medium, MediaError) else None)
            if row not in left:  # of a bucket that all rows had left before this was asked for
                if isinstance(medium, int):
                    media.release(medium)
                continue
            left.discard(row)
            if isinstance(medium, Known):
                found.restored.add(row, self.shard.slot_of[row], medium.embedding)
            elif isinstance(medium, int):
                found.rows.append(row)
                found.slots.append(self.shard.slot_of[row])
                found.media.append(medium)
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
        if (lane.number, segment.name) in self.answers:
            return
        rows, live_N = self.rows_of[lane.number], self.shard.ledger.live_N
        if bool(live_N[rows].any()):
            super().gate(lane, segment)
            self.answers.add((lane.number, segment.name))
        if not bool(live_N[rows].any()) and lane.run is not None:
            lane.run.cancel()

    def finish(self, lane: Lane) -> None:
        super().finish(lane)
        self.answers = {(number, name) for number, name in self.answers if number != lane.number}
        for row in self.rows_of.pop(lane.number):
            if self.shard.ledger.is_live(row):
                self.shard.answered(1)  # done with, though nothing answered
            self.dismiss(self.shard, row)
