"""A lane: one run in flight, with scratch and host buffers of its own, its steps bound once to where they work.

    Work     a stage plan's steps as functions without arguments, for one lane
    Lane     puts them on the streams, run after run: begin → submit … or submit_all → end

What changes from run to run are numbers that the host writes into buffers (which rows), never a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmpipe.graphs.backends import Lowered
from mmpipe.graphs.plan import PRESENCE, Plan, StagePlan, Step
from mmpipe.runtime.ledger import Span
from mmpipe.runtime.pool import Pool
from mmpipe.runtime.streams import Event, HostEvent, Run, Stream

Deliver = Callable[[Sequence[Any], Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Watch:
    """Somebody watches a segment: `extra` names what its lowered form returns beyond its writes."""

    extra: tuple[str, ...]
    deliver: Deliver  # names of the rows, name → [rows, …] copies


@dataclass
class Restored:
    """Rows that a segment is spared, because the host knows their embeddings [dim]."""

    rows: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    embeddings: list[Tensor] = field(default_factory=list)

    def add(self, row: int, slot: int, embedding: Tensor) -> None:
        self.rows.append(row)
        self.slots.append(slot)
        self.embeddings.append(embedding)


@dataclass
class Rows:
    """The rows of one segment in one run: of the run, of the slots, and of the media slots where it takes from them."""

    rows: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    media: list[int] = field(default_factory=list)
    restored: Restored = field(default_factory=Restored)

    def of(self, step: Step) -> list[int]:
        """Those that a step works on."""
        return self.restored.rows if step.does == "restore" else self.rows

    def __bool__(self) -> bool:
        return bool(self.rows or self.restored.rows)


class Work:
    """One stage plan, bound to one lane's memory."""

    def __init__(
        self,
        plan: Plan,
        stage_plan: StagePlan,
        lane: int,
        pool: Pool,
        lowered: Mapping[str, Lowered],
        watches: Mapping[str, Watch],
    ) -> None:
        self.stage_plan, self.pool, self.lane = stage_plan, pool, lane
        self.plan, self.device, self.watches = plan, pool.device, watches
        self.views = {buffer.name: pool.view(lane, buffer) for buffer in stage_plan.buffers}
        # row numbers where the device's copies can read them
        self.near = {n: self.device.near(v) for n, v in self.views.items() if n.endswith(("/get", "/put", "/back"))}
        self.watched: dict[str, dict[str, Tensor]] = {}
        self.steps: dict[str, Callable[[], None]] = {}
        for step in stage_plan.steps:
            if step.does == "run":
                self.steps[step.name] = self._run(step, lowered[step.segment], watches.get(step.segment))
            else:
                bind = {"in": self._in, "out": self._out, "restore": self._restore}[step.does]
                self.steps[step.name] = bind(step)

    def write_rows(self, segment: str, rows: Rows) -> None:
        """Tell the steps of a segment which rows they work on: the first fills up a bucket that is not full."""
        count = self.stage_plan.rows
        missing = count - len(rows.rows)
        for what, numbers, filler in (
            ("media", rows.media, rows.media[:1]),
            ("get", rows.slots, rows.slots[:1]),
            ("put", rows.slots, [self.plan.slots]),  # the spare row
        ):
            view = self.views.get(f"{segment}/{what}")
            if view is not None:
                view.numpy()[:] = [*numbers, *filler * missing]

    def write_restored(self, segment: str, restored: Restored) -> None:
        """Give the restoring step of a segment, where it has one, its embeddings and where they go to."""
        view = self.views.get(f"{segment}/back")
        if view is None:
            return
        missing = self.stage_plan.rows - len(restored.rows)
        view.numpy()[:] = [*restored.slots, *[self.plan.slots] * missing]  # the spare row
        known = self.views[f"{segment}/known/{self.plan.embedding(self.plan.segment(segment).branch)}"]
        for place, embedding in enumerate(restored.embeddings):
            known[place] = embedding

    def write_presence(self, segment: str, present_KM: Tensor) -> None:
        view = self.views.get(f"{segment}/{PRESENCE}")
        if view is not None:
            view[: len(present_KM)] = present_KM
            view[len(present_KM) :] = present_KM[:1]

    def _in(self, step: Step) -> Callable[[], None]:
        """Gather: decoded media, slots and presence → the segment's bucket; inputs that are needed again → slots."""
        views, device, name = self.views, self.device, step.segment
        moves: list[Callable[[], object]] = []
        for what in ("get", "put"):
            numbers = views.get(f"{name}/{what}")
            if numbers is not None and self.near[f"{name}/{what}"] is not numbers:
                moves.append(partial(device.copy, self.near[f"{name}/{what}"], numbers))
        for buffer in step.reads:
            home, _, value = buffer.rpartition("/")
            bucket = views.get(f"{name}/in/{value}")
            if home == "media":
                assert bucket is not None
                moves.append(partial(device.upload, bucket, views[buffer], views[f"{name}/media"]))
                if f"slots/{value}" in step.writes:
                    moves.append(partial(scatter, views[f"slots/{value}"], self.near[f"{name}/put"], bucket))
            elif home == "slots":
                assert bucket is not None
                moves.append(partial(gather, bucket, views[buffer], self.near[f"{name}/get"]))
            elif value == PRESENCE:
                assert bucket is not None
                moves.append(partial(device.copy, bucket, views[buffer]))
        return partial(_all, moves)

    def _out(self, step: Step) -> Callable[[], None]:
        """Scatter what the segment wrote: to slots by row, to the host as it is."""
        views, name = self.views, step.segment
        moves: list[Callable[[], object]] = []
        for buffer in step.writes:
            home, _, value = buffer.rpartition("/")
            source = views[f"{name}/out/{value}"]
            if home == "slots":
                moves.append(partial(scatter, views[buffer], self.near[f"{name}/put"], source))
            else:
                moves.append(partial(self.device.copy, views[buffer], source))
        return partial(_all, moves)

    def _restore(self, step: Step) -> Callable[[], None]:
        """The host's embeddings → the device → their rows of the slots."""
        numbers, known = (self.views[name] for name in step.reads)
        bucket, slots = (self.views[name] for name in step.writes)
        near, copy = self.near[f"{step.segment}/back"], self.device.copy
        moves = [partial(copy, near, numbers)] if near is not numbers else []
        return partial(_all, [*moves, partial(copy, bucket, known), partial(scatter, slots, near, bucket)])

    def _run(self, step: Step, lowered: Lowered, watch: Watch | None) -> Callable[[], None]:
        arguments = [self.views[name] for name in step.reads]
        results = [self.views[name] for name in step.writes]
        segment = step.segment
        names = [name.rpartition("/")[2] for name in step.writes]

        def run() -> None:
            for target, value in zip(results, lowered(*arguments), strict=True):
                target.copy_(value)

        def run_watched() -> None:
            assert watch is not None
            values = lowered(*arguments)
            for target, value in zip(results, values, strict=False):
                target.copy_(value)
            self.watched[segment] = {n: v.clone() for n, v in zip((*names, *watch.extra), values, strict=True)}

        return run if watch is None else run_watched


def gather(bucket: Tensor, table: Tensor, rows: Tensor) -> None:
    """bucket[i] = table[rows[i]], nothing allocated."""
    torch.index_select(table, 0, rows, out=bucket)


def scatter(table: Tensor, rows: Tensor, bucket: Tensor) -> None:
    """table[rows[i]] = bucket[i]."""
    table.index_copy_(0, rows, bucket)


def _all(moves: Sequence[Callable[[], object]]) -> None:
    for move in moves:
        move()


class Lane:
    """One run at a time: `begin`, `submit` for each step in the plan's order, then whoever began it waits.

    A segment without rows in this run submits no work; its waits and its event keep the order all the same.
    """

    def __init__(self, number: int, streams: Mapping[str, Stream]) -> None:
        self.number, self.streams = number, streams
        self.run: Run | None = None
        self.work: Work | None = None
        self.rows: dict[str, Rows] = {}
        self.events: dict[str, Event] = {}
        self.before: Mapping[str, Event] = {}
        self.serial = 0

    def begin(self, work: Work, serial: int, before: Mapping[str, Event]) -> None:
        """`before`: the events of the run before this one, where it was of the same stage plan."""
        assert self.run is None, "a lane has one run at a time"
        self.work, self.run, self.serial = work, Run(self.number), serial
        self.rows, self.events, self.before = {}, {}, before

    def submit(self, step: Step, rows: Rows) -> None:
        """Put one step on its stream. Where it has no rows in this run, it has nothing to do."""
        assert self.work is not None
        assert self.run is not None
        stream = self.streams[step.stream]
        for name in step.waits:
            stream.wait(self.events[name])
        if step.name in self.work.stage_plan.follows and step.name in self.before:
            stream.wait(self.before[step.name])
        if rows.of(step):
            self.rows[step.segment] = rows
            stream.submit(self.work.steps[step.name], self.run, step.name)
        if step.records:
            self.events[step.name] = stream.record(self.run)

    def submit_all(self, rows: Mapping[str, Rows]) -> None:
        """The whole run at once: as one graph where the device has it and every segment has rows."""
        assert self.work is not None
        assert self.run is not None
        work, full = self.work, all(chosen.rows for chosen in rows.values())
        graph = work.device.graph_of(work, self.streams) if full else None
        for step in work.stage_plan.steps:
            if graph is None or step.name in graph.prologue:
                self.submit(step, rows[step.segment])
        if graph is not None:
            self.rows = dict(rows)
            self.events.update(graph.replay(self.run))

    def answer(self, segment: str, value: str) -> Tensor:
        """The bucket of an answer, when the segment has written it. The host waits. Raises StepFailed."""
        assert self.work is not None
        self.events[f"out:{segment}"].wait()
        return self.work.views[f"{segment}/answer/{value}"]

    def ended(self) -> bool:
        """Whether every step has ended, so that `end` need not wait."""
        assert self.work is not None
        return all(self.events[name].done() for name in self.work.stage_plan.ends if name in self.events)

    def pause(self, seconds: float) -> None:
        """Wait for the run's end, but no longer than this. Of lanes that have streams of their own."""
        assert self.work is not None
        for name in self.work.stage_plan.ends:
            event = self.events.get(name)
            if isinstance(event, HostEvent) and not event.done():
                event.pause(seconds)
                return

    def end(self) -> list[Span]:
        """Wait for every step; the lane is free again. Raises StepFailed."""
        assert self.work is not None
        assert self.run is not None
        for name in self.work.stage_plan.ends:
            if name in self.events:
                self.events[name].wait()
        run, self.run = self.run, None
        run.settle()
        steps = {step.name: step for step in self.work.stage_plan.steps}
        counts = {
            name: len(self.rows[step.segment].of(step)) for name, step in steps.items() if step.segment in self.rows
        }
        return [
            Span(step, stream, self.number, self.serial, counts[step], start, end)
            for step, stream, start, end in run.spans
        ]

    def drop(self) -> None:
        """Cancel what has not begun. The caller waits for the streams."""
        if self.run is not None:
            self.run.cancel()
            self.run = None
