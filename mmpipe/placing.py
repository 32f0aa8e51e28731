"""A cut graph and a machine → the plan that runs: which schedule and streams, how many rows, lanes and slots.

Every `auto` of `runtime` is decided here, with its reason; what does not fit into `memory_limit` is refused with
figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmpipe.config import Config
from mmpipe.graphs import cost
from mmpipe.graphs.cut import Cut
from mmpipe.graphs.plan import HEAD, Plan
from mmpipe.graphs.schedule import place
from mmpipe.runtime.device import Device, device_for
from mmpipe.runtime.pool import PoolSizes

_ROWS = 32  # of a bucket, where memory allows
_SMALLER = (32, 16, 8, 4, 1)
_LANES = 2  # one run computes while the next one's media are copied in
# CPU libraries treat the last rows of other batches apart: a row's last bit would depend on its place
_ROWS_MULTIPLE = 4
# Operations on few numbers end before a second thread has begun; on a busy machine waiting for it costs 40 times more.
_NUMBERS_FOR_THREADS = 5_000_000
_SIDE_BY_SIDE = 8  # from this many rows on, one branch's products fill the cores: others beside it only take turns
_SHARE = 0.8  # of the memory that is available
_DECODING = 1 << 30  # bytes at most for media while they are decoded; less where memory_limit is small

Measure = Callable[[Plan, int], float]  # (plan, threads of each stream) → seconds for one bucket


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
    decode_workers: int
    memory_limit: int  # bytes
    cache: str
    memory: Mapping[str, int]  # bytes: weights, slots, media, scratch, host, workspaces, decoding
    reasons: Mapping[str, str]
    measured: Mapping[str, float] = field(default_factory=dict)  # "parallel" → seconds a bucket, where it was measured

    @property
    def call_rows(self) -> int:
        """Rows of the bucket for one sample alone: computing a whole batch for it would be felt in a large graph."""
        large = self.memory["weights"] >= 4 * _NUMBERS_FOR_THREADS
        return 1 if large and not self.reasons["batch_size"].startswith("configured") else self.batch_size


def device_of(config: Config) -> Device:
    """The device that the configuration asks for. ConfigError where this machine has none such."""
    name = "cpu" if config.runtime.device == "auto" else config.runtime.device
    try:
        return device_for(name)
    except RuntimeError as error:
        hint = "runtime.device: cpu runs anywhere"
        raise config.error("runtime.device", str(error).splitlines()[0], hint) from error


def resolve(
    config: Config, made: Cut, device: Device, *, rows: int | None = None, measure: Measure | None = None
) -> Resolved:
    """Decide what the configuration leaves open. `rows`: another bucket than the configuration's, for single calls.

    `measure` times a plan where only a measurement can tell. Raises ConfigError where nothing fits memory_limit.
    """
    runtime = config.runtime
    reasons: dict[str, str] = {}

    def decided(key: str, value: Any, reason: str) -> Any:
        given = getattr(runtime, key)
        reasons[key] = reason if given == "auto" else "configured"
        return value if given == "auto" else given

    fixed = {
        "device": decided("device", "cpu", "a GPU is used where it is configured: runtime.device: cuda"),
        "dtype": decided("dtype", "float32", "the only type that is implemented"),
        "backend": decided("backend", "eager", "the only backend that is implemented"),
        "cache": decided("cache", "off", "no cache is implemented"),
    }
    available = device.memory_bytes()
    limit = decided(
        "memory_limit", int(available * _SHARE), f"{_SHARE:.0%} of the {shown(available)} that are available"
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    weights = cost.weight_bytes(list(made.modules.values()))
    small = weights < 4 * _NUMBERS_FOR_THREADS
    fits = _Fits(config, made, weights, int(limit))
    wanted = rows or decided("batch_size", _ROWS, "rows of the one bucket of every segment")
    if wanted > 1 and wanted % _ROWS_MULTIPLE:
        wanted += -wanted % _ROWS_MULTIPLE
        reasons["batch_size"] = f"configured as {runtime.batch_size}; rounded up to a multiple of {_ROWS_MULTIPLE}"
    if rows is not None:
        reasons["batch_size"] = "one sample alone"
    may_shrink = runtime.batch_size == "auto" and rows is None
    size, lanes, slots = fits.largest([n for n in _SMALLER if n <= wanted] if may_shrink else [wanted])
    if measure is not None:  # a call has one sample
        slots = size * lanes
    if size < wanted:
        reasons["batch_size"] = f"{wanted} rows do not fit runtime.memory_limit ({shown(int(limit))})"
    two = "one run is staged while another computes"
    reasons["lanes"] = two if lanes > 1 else "a second lane does not fit runtime.memory_limit"
    threads = 1 if small else cores
    reasons["threads"] = f"{cores} cores" if threads > 1 else f"{weights // 4:,} numbers: too few for threads to pay"
    reasons["decode_workers"] = f"{cores} cores"
    base = Resolved(
        **fixed,
        schedule="cascade",
        streams="one" if device.kind == "cpu" else "staged",
        batch_size=size,
        lanes=lanes,
        slots=slots,
        threads=threads,
        decode_workers=cores,
        memory_limit=int(limit),
        memory={},
        reasons=reasons,
    )
    chosen = _schedule(config, made, base, cores, small, measure)
    return replace(chosen, memory=fits.needs(placed(made.plan, chosen)))


def placed(plan: Plan, resolved: Resolved) -> Plan:
    """The plan scheduled, laid out in memory and proved, as it was resolved."""
    return place(
        plan,
        rows=resolved.batch_size,
        layout=resolved.streams,
        lanes=resolved.lanes,
        slots=resolved.slots,
        parallel=resolved.schedule == "parallel",
    )


def _schedule(config: Config, made: Cut, base: Resolved, cores: int, small: bool, measure: Measure | None) -> Resolved:
    """cascade or parallel, on one stream or one for each branch. Measured where only a measurement can tell."""
    given, rows = config.runtime.schedule, base.batch_size
    reasons = dict(base.reasons)
    encoders = [branch.name for branch in made.plan.branches]
    side_by_side = replace(
        base,
        schedule="parallel",
        streams="parallel",
        threads=1 if small else max(1, cores // max(1, len(encoders))),
    )
    if given == "parallel":
        reasons |= {"schedule": "configured", "streams": "one for each branch: the schedule is parallel"}
        reasons["threads"] = f"{cores} cores for {len(encoders)} branches"
        return replace(side_by_side, reasons=reasons)
    most = max(len([s for s in made.plan.stage(stage) if s.branch != HEAD]) for stage in range(made.plan.stages))
    reasons["streams"] = "one: side by side is not faster where one segment fills the cores"
    if base.streams == "staged":
        reasons["streams"] = "copies in and out on streams of their own, so that they overlap with computing"
    elif most < 2:
        reasons["streams"] = "one: no stage has two encoders"
    elif small and cores > 1:
        base = replace(base, streams="branches")
        reasons["streams"] = f"one for each branch: a segment has one thread, and there are {cores} cores"
    if given == "cascade":
        reasons["schedule"] = "configured"
    elif len(encoders) < 2:
        reasons["schedule"] = "one encoder: nothing to run beside it"
    elif measure is None and small:
        reasons["schedule"] = "small encoders: what an exit saves is worth more than what branches side by side gain"
    elif measure is None and rows >= _SIDE_BY_SIDE:
        reasons["schedule"] = f"buckets of {rows} rows: a cascade computes only what is needed, and fills the cores"
    elif measure is None:
        reasons["schedule"] = "nothing was measured"
    else:
        seconds = {one.schedule: measure(placed(made.plan, one), one.threads) for one in (base, side_by_side)}
        text = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in seconds.items())
        reasons["schedule"] = f"measured for {rows} {'row' if rows == 1 else 'rows'}: {text}"
        if seconds["parallel"] < seconds["cascade"]:
            reasons["streams"] = "one for each branch: measured to be faster"
            reasons["threads"] = f"{cores} cores for {len(encoders)} branches"
            return replace(side_by_side, reasons=reasons, measured=seconds)
        return replace(base, reasons=reasons, measured=seconds)
    return replace(base, reasons=reasons)


class _Fits:
    """What a plan takes of memory, and the largest that `memory_limit` allows."""

    def __init__(self, config: Config, made: Cut, weights: int, limit: int) -> None:
        self.config, self.made, self.weights, self.limit = config, made, weights, limit

    def needs(self, plan: Plan) -> dict[str, int]:
        sizes = PoolSizes(plan)
        streams: dict[str, int] = {}
        for stage_plan in plan.stage_plans:
            for step in stage_plan.steps:
                if step.does == "run":
                    inside = cost.workspace_bytes(self.made.modules[step.segment], stage_plan.rows)
                    streams[step.stream] = max(streams.get(step.stream, 0), inside)
        return {
            "weights": self.weights,
            "slots": sizes.slots,
            "media": sizes.media,
            "scratch": sizes.lanes * sizes.scratch,
            "host": sizes.lanes * sizes.host,
            "workspaces": sum(streams.values()),
            "decoding": decoding_bytes(self.limit),
        }

    def largest(self, rows: Sequence[int]) -> tuple[int, int, int]:
        """(rows, lanes, slots): the most rows that fit, then lanes, then slots up to a shard's samples."""
        parallel = self.config.runtime.schedule == "parallel"
        shard = self.config.output.shard_rows
        least: dict[str, int] = {}
        for count in rows:
            for lanes in (_LANES, 1):

                def total(slots: int, count: int = count, lanes: int = lanes) -> int:
                    layout = "parallel" if parallel else "one"
                    plan = place(self.made.plan, rows=count, layout=layout, lanes=lanes, slots=slots, parallel=parallel)
                    least.clear()
                    least.update(self.needs(plan))
                    return sum(least.values())

                fewest = count * lanes
                base, step = total(fewest), total(fewest + 64) - total(fewest)
                if base <= self.limit:
                    room = shard if step <= 0 else fewest + (self.limit - base) // step * 64
                    return count, lanes, max(fewest, min(shard, room))
        total(rows[-1])
        parts = ", ".join(f"{name} {shown(value)}" for name, value in least.items())
        raise self.config.error(
            "runtime.memory_limit",
            f"{shown(self.limit)} are not enough: {rows[-1]} {'row' if rows[-1] == 1 else 'rows'} a bucket need "
            f"{shown(sum(least.values()))} ({parts})",
            "give more, or a smaller runtime.batch_size, or smaller models",
        )


def decoding_bytes(limit: int) -> int:
    """What media may take while they are decoded, of `memory_limit`."""
    return min(_DECODING, limit // 4)


def shown(size: int) -> str:
    """Bytes for people: 1.3 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
