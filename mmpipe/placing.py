"""A cut graph and a machine → the plan that runs: which schedule and streams, how many rows, lanes and slots.

Every `auto` of `runtime` is decided here, with its reason; what does not fit into `memory_limit` is refused with
figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmpipe.cache import folder as cache_folder
from mmpipe.config import Config
from mmpipe.graphs import cost
from mmpipe.graphs.cut import Cut
from mmpipe.graphs.plan import Plan
from mmpipe.graphs.schedule import place
from mmpipe.runtime.device import Device, device_for
from mmpipe.runtime.pool import PoolSizes

_ROWS = 32  # of a bucket, where memory allows
_SMALLER = (32, 16, 8, 4, 1)
_LANES = 2  # one run computes while the next one's media are copied in
_MOST_LANES = 8  # where each has a core
_SLOTS = 64  # how finely slots are counted
# CPU libraries treat the last rows of other batches apart: a row's last bit would depend on its place
_ROWS_MULTIPLE = 4
# Operations on few numbers end before a second thread has begun; on a busy machine waiting for it costs 40 times more.
_NUMBERS_FOR_THREADS = 5_000_000
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


def device_of(config: Config) -> Device:
    """The device that the configuration asks for. ConfigError where this machine has none such."""
    name = "cpu" if config.runtime.device == "auto" else config.runtime.device
    try:
        return device_for(name)
    except RuntimeError as error:
        hint = "runtime.device: cpu runs anywhere"
        raise config.error("runtime.device", str(error).splitlines()[0], hint) from error


def resolve(config: Config, made: Cut, device: Device, *, measure: Measure | None = None) -> Resolved:
    """Decide what the configuration leaves open, for batches; with `measure`, which times a plan, for single calls.

    Raises ConfigError where nothing fits memory_limit.
    """
    runtime = config.runtime
    reasons: dict[str, str] = {}

    def decided(key: str, value: Any, reason: str) -> Any:
        given = getattr(runtime, key)
        reasons[key] = reason if given == "auto" else "configured"
        return value if given == "auto" else given

    available = device.memory_bytes()
    of_that = f"{_SHARE:.0%} of the {shown(available)} that are available"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    weights = cost.weight_bytes(list(made.modules.values()))
    base = Resolved(
        device=decided("device", "cpu", "a GPU is used where it is configured: runtime.device: cuda"),
        dtype=decided("dtype", "float32", "the only type that is implemented"),
        backend=decided("backend", "eager", "the only backend that is implemented"),
        cache=decided("cache", *_cache(made.plan, single=measure is not None)),
        memory_limit=int(decided("memory_limit", int(available * _SHARE), of_that)),
        batch_size=decided("batch_size", _ROWS if measure is None else 1, "rows of the one bucket of every segment"),
        schedule="cascade",
        streams="one" if device.kind == "cpu" else "staged",
        lanes=_LANES,
        slots=0,
        threads=cores,
        decode_workers=cores,
        memory={},
        reasons=reasons,
    )
    reasons["decode_workers"] = f"{cores} cores"
    if base.cache == "on" and (inside := [b.name for b in made.plan.branches if not made.plan.restorable(b.name)]):
        reasons["cache"] += f"; not {', '.join(inside)}: an exit, or another branch, looks inside"
    if base.batch_size > 1 and base.batch_size % _ROWS_MULTIPLE:
        base = replace(base, batch_size=base.batch_size + -base.batch_size % _ROWS_MULTIPLE)
        reasons["batch_size"] = f"configured as {runtime.batch_size}; rounded up to a multiple of {_ROWS_MULTIPLE}"
    small = weights < 4 * _NUMBERS_FOR_THREADS and device.kind == "cpu"
    fits = _Fits(config, made, weights)
    if measure is None:
        wanted = _for_batches(base, made, runtime.schedule, small, cores)
        return fits.largest(wanted, shrink=runtime.batch_size == "auto", batches=True)
    if runtime.batch_size == "auto":
        reasons["batch_size"] = "one sample alone: a whole bucket for it would be felt"
    ways = [
        fits.largest(way, shrink=False, batches=False) for way in _for_calls(base, made, runtime.schedule, small, cores)
    ]
    return _fastest(ways, made, measure)


def _for_batches(base: Resolved, made: Cut, schedule: str, small: bool, cores: int) -> Resolved:
    """Throughput, by rules: nobody waits for a measurement before the first batch."""
    branches, reasons = len(made.plan.branches), dict(base.reasons)
    reasons["lanes"] = "one run is staged while another computes"
    reasons["threads"] = f"{cores} cores"
    reasons["schedule"] = "configured" if schedule == "cascade" else "a cascade computes only what is needed"
    if schedule == "parallel":
        return _side_by_side(replace(base, reasons=reasons | {"schedule": "configured"}), branches, small, cores)
    if base.streams == "staged":
        reasons["streams"] = "copies in and out on streams of their own, so that they overlap with computing"
    elif small and cores > 1:
        base = replace(base, streams="lanes", lanes=min(cores, _MOST_LANES), threads=1)
        reasons["lanes"] = f"{cores} cores, one for each"
        reasons["streams"] = "one for each lane: buckets side by side gain more than threads within a small segment"
        reasons["threads"] = "small segments: one each, and a lane for every core"
    else:
        base = replace(base, streams="caller", lanes=1)
        reasons["streams"] = "the caller's own thread: a segment fills the cores, and malloc serves that thread best"
        reasons["lanes"] = "a second run would only wait for the cores"
    return replace(base, reasons=reasons)


def _for_calls(base: Resolved, made: Cut, schedule: str, small: bool, cores: int) -> list[Resolved]:
    """Latency: the ways in which one sample could go fastest."""
    branches, ways = len(made.plan.branches), []
    base = replace(base, lanes=1, reasons=dict(base.reasons) | {"lanes": "a call is one run"})
    if schedule != "parallel":
        streams = "caller" if base.streams == "one" else base.streams
        why = {
            "streams": "the caller's own thread: nothing to run beside it",
            "schedule": "configured" if schedule == "cascade" else "",
        }
        for threads in (cores, 1) if small and cores > 1 else (cores,):
            reasons = {**base.reasons, **why, "threads": f"{threads} of {cores} cores"}
            ways.append(replace(base, streams=streams, threads=threads, reasons=reasons))
    if schedule == "parallel" or (schedule == "auto" and branches > 1):
        reasons = {**base.reasons, "schedule": "configured" if schedule == "parallel" else ""}
        ways.append(_side_by_side(replace(base, reasons=reasons), branches, small, cores))
    return ways


def _side_by_side(base: Resolved, branches: int, small: bool, cores: int) -> Resolved:
    """The parallel schedule: a stream for each branch, and the cores shared among them."""
    threads = 1 if small else max(1, cores // max(1, branches))
    streams = "one for each branch: the schedule is parallel"
    reasons = {**base.reasons, "streams": streams, "threads": f"{cores} cores for {branches} branches"}
    return replace(base, schedule="parallel", streams="parallel", threads=threads, reasons=reasons)


def _fastest(ways: Sequence[Resolved], made: Cut, measure: Measure) -> Resolved:
    """The way that was measured to be fastest, where there is more than one."""
    if len(ways) == 1:
        return ways[0]
    seconds = {f"{one.schedule}, threads {one.threads}": measure(placed(made.plan, one), one.threads) for one in ways}
    best = min(zip(seconds.values(), range(len(ways)), strict=True))[1]
    told = "measured: " + "; ".join(f"{name}: {value * 1e3:.1f} ms" for name, value in seconds.items())
    chosen, reasons = ways[best], dict(ways[best].reasons)
    for key in ("schedule", "streams", "threads"):
        reasons[key] = reasons[key] if reasons[key] == "configured" else told
    return replace(chosen, reasons=reasons, measured=seconds)


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


def _cache(plan: Plan, *, single: bool) -> tuple[str, str]:
    """(what `auto` becomes, why): looking up takes far less than decoding and encoding, but for one sample alone there
    is nothing to keep that is likely to come again."""
    if single:
        return "off", "a single call: what is asked once is seldom asked again"
    if not any(plan.restorable(branch.name) for branch in plan.branches):
        return "off", "exits look inside every encoder: an embedding would not stand for it"
    where = cache_folder()
    if where is None:
        return "off", "MMPIPE_CACHE is off"
    return "on", f"batches: what was encoded before is not decoded or encoded again; in {where}"


class _Fits:
    """What a plan takes of memory, and the largest that `memory_limit` allows."""

    def __init__(self, config: Config, made: Cut, weights: int) -> None:
        self.config, self.made, self.weights = config, made, weights

    def needs(self, resolved: Resolved) -> dict[str, int]:
        """Bytes by what they are for."""
        plan = placed(self.made.plan, resolved)
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
            "workspaces": sum(streams.values()) * (plan.lanes if plan.own_streams else 1),
            "decoding": decoding_bytes(resolved.memory_limit),
        }

    def largest(self, wanted: Resolved, *, shrink: bool, batches: bool) -> Resolved:
        """`wanted` with the most rows that fit (where they may be fewer), then lanes, then slots up to a shard's."""
        smaller = [count for count in _SMALLER if shrink and count < wanted.batch_size]
        shard, least, reasons = self.config.output.shard_rows, {"": 0}, dict(wanted.reasons)
        limit = wanted.memory_limit
        for count in (wanted.batch_size, *smaller):
            for lanes in dict.fromkeys((wanted.lanes, 1)):
                fewest = count * lanes
                tried = replace(wanted, batch_size=count, lanes=lanes, slots=fewest)
                least = self.needs(tried)
                if sum(least.values()) > limit:
                    continue
                more = self.needs(replace(tried, slots=fewest + _SLOTS))
                step = sum(more.values()) - sum(least.values())
                room = fewest + (limit - sum(least.values())) // step * _SLOTS if step > 0 else shard
                slots = max(fewest, min(shard, room)) if batches else fewest
                if count < wanted.batch_size:
                    reasons["batch_size"] = f"{wanted.batch_size} rows do not fit runtime.memory_limit ({shown(limit)})"
                if lanes < wanted.lanes:
                    reasons["lanes"] = "more do not fit runtime.memory_limit"
                fitting = replace(tried, slots=slots, reasons=reasons)
                return replace(fitting, memory=self.needs(fitting))
        parts = ", ".join(f"{name} {shown(value)}" for name, value in least.items())
        needed = f"{count} {'row' if count == 1 else 'rows'} a bucket need {shown(sum(least.values()))} ({parts})"
        raise self.config.error(
            "runtime.memory_limit",
            f"{shown(limit)} are not enough: {needed}",
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
