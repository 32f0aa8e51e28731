"""The cascade: stage by stage over all rows, survivors in full buckets, several lanes in flight: throughput."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from mmpipe.errors import MediaError
from mmpipe.graphs.plan import HEAD, Segment
from mmpipe.runtime.lanes import Restored, Rows
from mmpipe.runtime.running import Found, Known, Running, Same


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
            full = len(ready) >= self.bucket or checked == len(rows)
            for head in heads:
                chosen = [ready.popleft() for _ in range(min(self.bucket, len(ready)) if full else 0)]
                taken[head.name] = self._numbers(chosen)
            if any(taken.values()):
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
            if taken[segment.name]:
                self.write(work, segment, taken[segment.name])
        lane.submit_all(taken)
        for segment in segments:
            self.submitted(lane, segment, taken[segment.name])


class _Supply:
    """The rows of one encoder's segment in one stage, a bucket at a time.

    Rows to compute wait until they fill a bucket, or no more come; those whose embedding is known go on at once, and
    those that are like another row when that one has been computed.
    """

    def __init__(self, run: Running, segment: Segment, rows: Sequence[int]) -> None:
        self.run, self.segment = run, segment
        mine = run.ledger.having(segment.branch, rows)
        self._left = dict.fromkeys(mine)  # in order; what has been handed on is gone
        feeds = segment.name in run.feeders and segment.branch in run.executor.media
        self._source: Iterator[tuple[int, Found | None]] = (
            run.open(segment.branch, mine) if feeds else iter([(row, None) for row in mine])
        )
        self._to_come = len(mine)
        self._fed, self._restored = Rows(), Restored()
        self._same: list[tuple[int, int]] = []  # (row, the row that it is like)

    def has_passed(self, row: int) -> bool:
        """Whether a row has been handed on, has failed, or was never one of these."""
        return row not in self._left

    def take(self, count: int) -> Rows:
        """`count` rows to compute, fewer only at the end, or none; and up to `count` whose embedding is known."""
        self._settle(count)
        while self._to_come and len(self._fed.rows) < count and len(self._restored.rows) < count:
            self._place(*next(self._source))
        taken = Rows()
        if len(self._fed.rows) == count or not self._to_come:
            taken, self._fed = self._fed, Rows()
        if not taken and not self._restored.rows and self._same:
            self.run.land()  # what they are like is in flight
            self._settle(count)
        taken.restored, self._restored = self._restored, Restored()
        for row in (*taken.rows, *taken.restored.rows):
            del self._left[row]
        return taken

    def _place(self, row: int, found: Found | None) -> None:
        self._to_come -= 1
        if isinstance(found, MediaError):
            del self._left[row]
        elif isinstance(found, Known):
            self._restored.add(row, self.run.slot_of[row], found.embedding)
        elif isinstance(found, Same):
            self._same.append((row, found.row))
        else:
            self._fed.rows.append(row)
            self._fed.slots.append(self.run.slot_of[row])
            if found is not None:
                self._fed.media.append(found)

    def _settle(self, count: int) -> None:
        """Rows that are like one which has been computed since have its embedding."""
        waiting, self._same = self._same, []
        branch, outcome = self.segment.branch, self.run.ledger.outcome
        for row, like in waiting:
            there = bool(outcome.embedded_NM[like, self.run.ledger.columns[branch]])
            if there and len(self._restored.rows) < count:
                self._restored.add(row, self.run.slot_of[row], outcome.embeddings[branch][like])
            else:
                self._same.append((row, like))
