"""What every `auto` of `runtime` became, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mmpipe.graphs.plan import Plan
from mmpipe.graphs.schedule import place

Kind = Literal["batch", "call"]  # many samples, for throughput; or one, for latency


@dataclass(frozen=True)
class Choice:
    """What one segment is lowered to."""

    backend: str
    dtype: str  # of its matrix products; "float32", "bfloat16", "float16"
    lengths: tuple[int, ...] = ()  # a text is padded to the least of these that holds it; (): all to one


PLAIN = Choice("eager", "float32")


@dataclass(frozen=True)
class Resolved:
    """Every `auto`, decided: value and reason. Nothing changes the configuration afterwards."""

    device: str
    dtype: str
    backend: str
    schedule: str
    streams: str  # how steps are laid on streams: a name of schedule.LAYOUTS
    batch_size: int
    lanes: int
    slots: int
    threads: int  # of each stream that computes
    processes: int  # processes that do all of this side by side, each over parts of a job
    decode: str  # pictures: exact or fast
    decode_workers: int  # of each process
    decoding: str  # on threads, or handed on by them to processes
    memory_limit: int  # bytes
    cache: str
    memory: Mapping[str, int]  # bytes of all processes: weights, slots, …, what processes take for themselves
    reasons: Mapping[str, str]
    segments: Mapping[str, Choice] = field(default_factory=dict)  # lowered otherwise than eager float32
    more_from: int | None = None  # rows from which a compiled backend would be waited for; None: from no number on
    measured: Mapping[str, float] = field(default_factory=dict)  # "parallel" → seconds a bucket, where it was measured


def placed(plan: Plan, resolved: Resolved) -> Plan:
    """The plan scheduled, laid out in memory and proved, as it was resolved."""
    return place(
        plan,
        rows=resolved.batch_size,
        layout=resolved.streams,
        lanes=resolved.lanes,
        slots=resolved.slots,
        parallel=resolved.schedule == "parallel",
        restores=[b.name for b in plan.branches if resolved.cache == "on" and plan.restorable(b.name)],
    )
