"""The cascade: stage by stage over all rows, survivors in full buckets, several lanes in flight: throughput."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from mmpipe.graphs.plan import HEAD, Segment
from mmpipe.runtime.lanes import Rows
from mmpipe.runtime.running import Running


class Cascade(Running):
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

    def __init__(self, run: Running, segment: Segment, rows: Sequence[int]) -> None:
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
