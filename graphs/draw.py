"""A plan for people: as text for a terminal; and what was measured of it, as a trace for Perfetto.

as_text    stages, segments, steps by stream with their waits, bytes of scratch
as_trace   measured steps → Chrome's trace format, which chrome://tracing and ui.perfetto.dev open
as_svg     segments as a graph: see draw_svg.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from mmpipe.graphs.draw_svg import as_svg
from mmpipe.graphs.plan import Plan, Segment, StagePlan, Step

__all__ = ["SpanLike", "as_svg", "as_text", "as_trace", "size"]


class SpanLike(Protocol):
    """One measured step of one run; seconds of one clock."""

    @property
    def step(self) -> str: ...
    @property
    def stream(self) -> str: ...
    @property
    def lane(self) -> int: ...
    @property
    def run(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...


def size(amount: float) -> str:
    """Bytes in words: 512 → 512 B; 6656 → 6.5 KiB; 5 · 2³⁰ → 5 GiB."""
    value, unit = float(amount), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000:  # 1000 to 1023 would take a fourth digit
            break
        value, unit = value / 1024, larger
    digits = f"{value:.0f}" if unit == "B" or value >= 99.5 else f"{value:.1f}".removesuffix(".0")
    return f"{digits} {unit}"


def as_text(plan: Plan) -> str:
    """The plan, a line for each thing, ending in a newline."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    yield ", ".join(
        (
            _count(plan.stages, "stage"),
            _count(len(plan.segments), "segment"),
            _count(plan.lanes, "lane"),
            _count(plan.slots, "slot"),
        )
    )
    width = max((len(segment.name) for segment in plan.segments), default=0)
    for stage in range(plan.stages):
        yield ""
        yield f"stage {stage}" + (f", exit {_exit(plan, stage)}" if plan.exits else "")
        for segment in plan.stage(stage):
            yield f"  {segment.name:{width}}  {_count(segment.nodes, 'node'):>9}  {_flow(segment)}"
    for stage_plan in plan.stage_plans:
        yield ""
        yield f"{stage_plan.name}: {_count(len(stage_plan.steps), 'step')}, {size(stage_plan.scratch_bytes)} of scratch"
        yield from _streams(stage_plan)


def _exit(plan: Plan, stage: int) -> str:
    exit_ = plan.exits[stage]
    return f"{exit_.name} (sees {', '.join(exit_.sees)})"


def _flow(segment: Segment) -> str:
    rows = "  [every live row]" if segment.every_row else ""
    return f"{', '.join((*segment.inputs, *segment.reads))} → {', '.join(segment.writes)}{rows}"


def _streams(stage_plan: StagePlan) -> Iterator[str]:
    """A block of lines for each stream: its steps in order, and what each waits for; "⏎": the run ends with it."""
    width = max((len(stream) for stream in stage_plan.streams), default=0)
    longest = max((len(step.name) for step in stage_plan.steps), default=0)
    for stream in stage_plan.streams:
        head = stream
        for step in (step for step in stage_plan.steps if step.stream == stream):
            tail = f"after {', '.join(step.waits)}" if step.waits else ""
            ends = "  ⏎" if step.name in stage_plan.ends else ""
            yield f"  {head:{width}}  {step.name:{longest}}  {_moved(stage_plan, step):>9}  {tail}{ends}".rstrip()
            head = ""


def _moved(stage_plan: StagePlan, step: Step) -> str:
    """What a step writes into scratch."""
    written = {buffer.name: buffer.bytes for buffer in stage_plan.buffers if buffer.home == "scratch"}
    amount = sum(written.get(name, 0) for name in step.writes)
    return size(amount) if amount else ""


def _count(amount: int, noun: str) -> str:
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def as_trace(spans: Sequence[SpanLike]) -> dict[str, Any]:
    """Measured steps as Chrome's trace format: one thread for each stream, microseconds from the first start."""
    origin = min((span.start for span in spans), default=0.0)
    threads = {stream: number for number, stream in enumerate(_streams_of(spans), 1)}
    events: list[dict[str, Any]] = [_name("process_name", 0, "mmpipe")]
    for stream, thread in threads.items():
        events.append(_name("thread_name", thread, stream))
        events.append({"name": "thread_sort_index", "ph": "M", "pid": 1, "tid": thread, "args": {"sort_index": thread}})
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        events.append(
            {
                "name": span.step,
                "cat": _does(span.step),
                "ph": "X",
                "ts": 1e6 * (span.start - origin),
                "dur": 1e6 * max(span.end - span.start, 0.0),
                "pid": 1,
                "tid": threads[span.stream],
                "args": {"run": span.run, "lane": span.lane, "rows": span.rows},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _streams_of(spans: Iterable[SpanLike]) -> Iterator[str]:
    """Streams in the order of their first start."""
    yield from dict.fromkeys(span.stream for span in sorted(spans, key=lambda span: span.start))


def _name(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}


def _does(step: str) -> str:
    """ "in:image@0" → in; "image@0" → run."""
    does, colon, _ = step.partition(":")
    return does if colon else "run"
