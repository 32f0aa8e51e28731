"""What both schedules share: rows and their slots, media as they come, runs in lanes, gates as they answer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from mmpipe.errors import MediaError
from mmpipe.graphs.plan import HEAD, Segment
from mmpipe.runtime.lanes import Lane, Rows, Work
from mmpipe.runtime.ledger import Ledger, Look
from mmpipe.runtime.pool import MediaRows, SlotRows
from mmpipe.runtime.streams import Event

if TYPE_CHECKING:
    from mmpipe.runtime.executor import Executor

Answered = Callable[[int], None]


class Feed(Protocol):
    """Where rows come from: opens and prepares one modality of the rows asked for, in their order, into media slots."""

    def __call__(self, branch: str, rows: Sequence[int], media: MediaRows) -> Iterator[int | MediaError]: ...


class Running:
    """What both schedules share: rows and their slots, media as they come, gates as they answer."""

    def __init__(self, executor: Executor, present_NM: Tensor, feed: Feed, answered: Answered) -> None:
        self.executor, self.plan, self.feed, self.answered = executor, executor.plan, feed, answered
        self.ledger = Ledger(executor.plan, present_NM, executor.gate)
        self.count = present_NM.shape[0]
        self.bucket = executor.plan.stage_plans[0].rows
        self.slots = SlotRows(executor.plan.slots)
        self.slot_of: dict[int, int] = {}
        self.feeders = {executor.plan.feeder(branch.name).name for branch in executor.plan.branches}
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
                for branch, value in self.plan.embeddings:
                    if value in segment.writes:
                        rows = lane.rows[segment.name].rows
                        self.ledger.embedded(branch, rows, work.views[f"{segment.name}/answer/{value}"])
        for name, values in work.watched.items():
            rows = lane.rows[name].rows
            self.executor.watches[name].deliver(rows, {key: value[: len(rows)] for key, value in values.items()})
        work.watched.clear()
