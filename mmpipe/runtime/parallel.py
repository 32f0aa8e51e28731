"""The parallel schedule: all branches of one bucket at once; a gate drops what its answers made useless: latency."""

from __future__ import annotations

from mmpipe.graphs.plan import HEAD, Segment
from mmpipe.runtime.lanes import Lane, Rows
from mmpipe.runtime.running import Known, Running


class Parallel(Running):
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
        chosen: dict[str, Rows] = {}
        for step in work.stage_plan.steps:
            segment = self.plan.segment(step.segment)
            if segment.name not in chosen:
                chosen[segment.name] = found = self._rows(lane, segment, rows)
                if found:
                    self.write(work, segment, found)
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
            wanted = [row for row in rows if self.ledger.wants_head(segment, row)]
        elif segment.name in self.feeders and segment.branch in self.supplies:
            return self._fed(segment.branch, rows)
        else:
            wanted = self.ledger.having(segment.branch, rows)
        return Rows(wanted, [self.slot_of[row] for row in wanted])

    def _fed(self, branch: str, rows: list[int]) -> Rows:
        found = Rows()
        media = self.executor.media[branch]
        left = set(self.ledger.having(branch, rows))
        while left:
            row, medium = next(self.supplies[branch])
            if row not in left:  # of a bucket that all rows had left before this was asked for
                if isinstance(medium, int):
                    media.release(medium)
                continue
            left.discard(row)
            if isinstance(medium, Known):
                found.restored.add(row, self.slot_of[row], medium.embedding)
            elif isinstance(medium, int):
                found.rows.append(row)
                found.slots.append(self.slot_of[row])
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
