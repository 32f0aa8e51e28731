"""A cut graph and a machine → the plan that runs: which schedule and streams, how many rows, lanes and slots.

Every `auto` of `runtime` is decided here, with its reason; what does not fit into `memory_limit` is refused with
figures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mmpipe import decoders, machine, workers
from mmpipe.budget import Budget, shown
from mmpipe.cache import folder as cache_folder
from mmpipe.config import Config
from mmpipe.config.check import ON_A_GPU, ON_THE_HOST
from mmpipe.config.values import OWN, parse_model
from mmpipe.errors import ConfigError
from mmpipe.graphs import cost
from mmpipe.graphs.backends import OPERATION_BY_OPERATION
from mmpipe.graphs.cut import Cut
from mmpipe.graphs.plan import Plan
from mmpipe.lowering import Lowering
from mmpipe.resolved import Kind, Resolved
from mmpipe.runtime.device import Device, available_bytes, cuda_devices, device_for
from mmpipe.runtime.measure import BUCKETS_A_LANE, PASSES

_ROWS = 32  # of a bucket, where memory allows
_ROWS_A_THREAD = 16  # of a large encoder's: one thread alone gains nothing from more, and fewer are left to padding
_LANES = 2  # one run computes while the next one's media are copied in
_MOST_LANES = 8  # where each has a core
# CPU libraries treat the last rows of other batches apart: a row's last bit would depend on its place
_ROWS_MULTIPLE = 4
# Operations on few numbers end before a second thread has begun; on a busy machine waiting for it costs 40 times more.
_NUMBERS_FOR_THREADS = 5_000_000
_SHARE = 0.8  # of the memory that is available

_EXACT = "pictures as the model's reference prepares them, to the bit; input.decode: fast comes close in less time"
_CORES_FOR_PROCESSES, _ROWS_FOR_PROCESSES = 6, 2_000
_BUCKETS_A_PROCESS = 4  # from so many on the last ones of each stage, which are not full, weigh little
_ONE_INSTEAD = "auto uses one process where several can't be had"
_WORTH = 0.05  # the share of a job that measuring before it may take

Measure = Callable[[Resolved], float]  # → seconds: to an answer, or for a bucket


def device_of(config: Config) -> Device:
    """The device that the configuration asks for; `auto`: a GPU that PyTorch can use, else the CPU. ConfigError where
    this machine has none such."""
    name = config.runtime.device
    if name == "auto":
        if (found := _gpu(config)) is not None:
            return found
        if config.runtime.backend in ON_A_GPU:
            message = f"{config.runtime.backend} computes on an NVIDIA GPU, and PyTorch sees none that it can use"
            raise config.error("runtime.backend", message, "backend: eager, inductor, openvino or onnx")
        return device_for("cpu")
    try:
        return device_for(name)
    except RuntimeError as error:
        hint = "runtime.device: cpu runs anywhere"
        raise config.error("runtime.device", str(error).splitlines()[0], hint) from error


def _gpu(config: Config) -> Device | None:
    """The GPU, where there is one, it computes, and the backend can use it."""
    if config.runtime.backend in ON_THE_HOST or not cuda_devices():
        return None
    try:
        device = device_for("cuda")
        _ = float(device.held(torch.ones(1)) + 1)  # an older GPU than PyTorch was built for is seen, and can do nothing
    except RuntimeError:
        return None
    return device


def _why_device(config: Config, device: Device) -> str:
    if device.kind != "cpu":
        return "PyTorch sees a GPU that it can use; runtime.device: cpu computes without it"
    if config.runtime.backend in ON_THE_HOST and cuda_devices():
        return f"runtime.backend: {config.runtime.backend} computes on the CPU"
    return "PyTorch sees no GPU that it can use"


def resolve(
    config: Config,
    made: Cut,
    device: Device,
    kind: Kind = "batch",
    lowering: Lowering | None = None,
    *,
    measure: Measure | None = None,
    rows: int = 0,
    alone: str = "",
) -> Resolved:
    """Decide what the configuration leaves open.

    `measure` times a plan: a call takes the way that is fastest; a batch, too, when its `rows` are so many that
    measuring is won back, else (and without `measure`) the way that its rule says. `lowering` chooses backends and
    number types; None: eager float32. `alone`: why it must be done in one process. Raises ConfigError where nothing
    fits memory_limit.
    """
    runtime = config.runtime
    reasons: dict[str, str] = {}

    def decided(key: str, value: Any, reason: str) -> Any:
        given = getattr(runtime, key)
        reasons[key] = reason if given == "auto" else "configured"
        return value if given == "auto" else given

    def lowered(way: Resolved, *, forked: bool = False) -> Resolved:
        if lowering is None:
            return way
        chosen = lowering.choose(made, way.batch_size, way.threads, rows, forked=forked)
        told = {**way.reasons, **chosen.reasons}
        return replace(
            way,
            segments=chosen.segments,
            dtype=chosen.dtype,
            backend=chosen.backend,
            reasons=told,
            more_from=chosen.more_from,
        )

    available = device.memory_bytes()
    of_that = f"{_SHARE:.0%} of the {shown(available)} that are available"
    cores = machine.cores()
    computing = (
        cores if device.kind == "cpu" else 1
    )  # what the host does beside a GPU is small: threads would only spin
    weights = cost.weight_bytes(list(made.modules.values()))
    reasons |= {"dtype": "float32 unless something lowers", "backend": "eager unless something lowers"}
    base = Resolved(
        device=decided("device", device.kind, _why_device(config, device)),
        dtype="float32",
        backend="eager",
        cache=decided("cache", *_cache(made.plan, single=kind == "call")),
        memory_limit=int(decided("memory_limit", int(available * _SHARE), of_that)),
        batch_size=decided("batch_size", _ROWS if kind == "batch" else 1, "rows of the one bucket of every segment"),
        schedule="cascade",
        streams="one" if device.kind == "cpu" else "staged",
        lanes=_LANES,
        slots=0,
        threads=computing,
        processes=1,
        decode=config.input.decode,
        decode_workers=cores,
        decoding=decided("decoding", *_decoding(cores, available_bytes(), rows, single=kind == "call")),
        memory={},
        reasons=reasons,
    )
    reasons["decode"] = "configured" if base.decode == "fast" else _EXACT
    reasons["decode_workers"] = f"{cores} cores"
    if base.cache == "on" and (inside := [b.name for b in made.plan.branches if not made.plan.restorable(b.name)]):
        reasons["cache"] += f"; not {', '.join(inside)}: an exit, or another branch, looks inside"
    if base.batch_size > 1 and base.batch_size % _ROWS_MULTIPLE:
        base = replace(base, batch_size=base.batch_size + -base.batch_size % _ROWS_MULTIPLE)
        reasons["batch_size"] = f"configured as {runtime.batch_size}; rounded up to a multiple of {_ROWS_MULTIPLE}"
    small = weights < 4 * _NUMBERS_FOR_THREADS and device.kind == "cpu"

    def fitting(ways: Sequence[Resolved], *, shrink: bool, batches: bool) -> list[Resolved]:
        copies = 0 if lowering is None else lowering.copied_bytes(made)
        try:
            budget = Budget(config, made, weights + copies)
            return [budget.largest(way, shrink=shrink, batches=batches) for way in ways]
        except ConfigError:
            if lowering is None or not lowering.give_up_copies(made):
                raise
            return fitting(ways, shrink=shrink, batches=batches)

    if kind == "call":
        if runtime.batch_size == "auto":
            reasons["batch_size"] = "one sample alone: a whole bucket for it would be felt"
        ways = _for_calls(base, made, runtime.schedule, small, computing)
        return _fastest([lowered(way) for way in fitting(ways, shrink=False, batches=False)], measure)
    shrink = runtime.batch_size == "auto"
    of_each = base.batch_size if small or not shrink else _ROWS_A_THREAD
    count, reasons["processes"] = _processes(config, device, cores, rows, of_each, alone)
    ways = fitting(_for_batches(base, made, runtime.schedule, small, computing), shrink=shrink, batches=True)
    ways = [lowered(way) for way in ways]  # the first is what the rule says
    if count > 1:
        why = f"{count} processes do not fit runtime.memory_limit ({shown(base.memory_limit)})"
        compiled = _compiled(ways[0])
        if compiled and runtime.backend == "auto" and lowering is not None:
            compiled = set() if lowering.quicker_forked(made, ways[0], of_each, count) else compiled
        if not compiled:
            copies = 0 if lowering is None else lowering.copied_bytes(made)
            asked = _in_processes(base, count, runtime.schedule)
            if of_each != base.batch_size:
                told = {**asked.reasons, "batch_size": "one thread gains nothing from more rows, and fewer are padding"}
                asked = replace(asked, batch_size=of_each, reasons=told)
            with contextlib.suppress(ConfigError):
                way = Budget(config, made, weights + copies).largest(asked, shrink=False, batches=True)
                way = lowered(way, forked=True)
                compiled = _compiled(way)
                if not compiled and way.slots >= min(config.output.shard_rows, _BUCKETS_A_PROCESS * way.batch_size):
                    return way
        if compiled:
            why = f"{' and '.join(sorted(compiled))} has threads of its own, which a forked process would not have"
        if runtime.processes != "auto":
            raise config.error("runtime.processes", why, _ONE_INSTEAD)
        ways = [replace(way, reasons={**way.reasons, "processes": why}) for way in ways]
    if measure is None or not _worth_measuring(ways, rows):
        return ways[0]
    return _fastest(ways, measure)


def _worth_measuring(ways: Sequence[Resolved], rows: int) -> bool:
    """Whether trying each way takes so few buckets, against those of the job, that the time is won back."""
    buckets = sum(PASSES * BUCKETS_A_LANE * way.lanes for way in ways)
    return len(ways) > 1 and buckets <= _WORTH * rows / ways[0].batch_size


def _for_batches(base: Resolved, made: Cut, schedule: str, small: bool, cores: int) -> list[Resolved]:
    """Throughput: first the way that holds by rule, so that nobody has to wait for a measurement, then what else
    could be faster."""
    branches, reasons = len(made.plan.branches), dict(base.reasons)
    reasons["lanes"] = "one run is staged while another computes"
    reasons["threads"] = _threads_why(base, cores)
    if schedule == "parallel":
        return [_side_by_side(replace(base, reasons=reasons | {"schedule": "configured"}), branches, small, cores)]
    reasons["schedule"] = "configured" if schedule == "cascade" else "a cascade computes only what is needed"
    if base.streams == "staged":
        reasons["streams"] = "copies in and out on streams of their own, so that they overlap with computing"
        ways = [replace(base, reasons=reasons)]
    else:
        why = "the caller's own thread: a segment fills the cores, and malloc serves that thread best"
        waits = "a second run would only wait for the cores"
        alone = replace(base, streams="caller", lanes=1, reasons=reasons | {"streams": why, "lanes": waits})
        ways = [alone]
        lanes = min(cores, _MOST_LANES)
        for threads in dict.fromkeys((1, cores // lanes)) if cores > 1 else ():
            why = "one for each lane: buckets side by side gain more than threads within a small segment"
            told = {"streams": why, "lanes": f"{cores} cores, {threads} for each", "threads": f"{threads} a lane"}
            ways.append(replace(base, streams="lanes", lanes=lanes, threads=threads, reasons=reasons | told))
        if small and cores > 1:
            ways[:2] = ways[1::-1]
    if schedule == "auto" and branches > 1:
        ways.append(_side_by_side(replace(base, reasons=reasons), branches, small, cores))
    return ways


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
            reasons = {**base.reasons, **why, "threads": _threads_why(base, cores, f"{threads} of ")}
            ways.append(replace(base, streams=streams, threads=threads, reasons=reasons))
    if schedule == "parallel" or (schedule == "auto" and branches > 1):
        reasons = {**base.reasons, "schedule": "configured" if schedule == "parallel" else ""}
        ways.append(_side_by_side(replace(base, reasons=reasons), branches, small, cores))
    return ways


def _processes(config: Config, device: Device, cores: int, rows: int, bucket: int, alone: str) -> tuple[int, str]:
    """(processes that a job is done in, why): one for each core, or one. Raises ConfigError where more are configured
    than can be."""
    asked, least = config.runtime.processes, cores * _BUCKETS_A_PROCESS * bucket
    never = ""
    if device.kind != "cpu":
        never = "a GPU computes"
    elif not workers.available():
        never = "this system can't fork a process that has loaded torch"
    elif config.runtime.schedule == "parallel":
        never = "runtime.schedule: parallel is for branches side by side in one process"
    elif config.runtime.decoding == "processes":
        never = "runtime.decoding: processes is for one process that computes"
    if asked != "auto" and asked > 1 and never:
        raise config.error("runtime.processes", never, _ONE_INSTEAD)
    if asked == 1 or never or alone:
        return 1, "configured" if asked == 1 else never or alone
    if asked != "auto":
        return asked, "configured"
    own = [name for name, encoder in config.encoders.items() if parse_model(encoder.model).kind == OWN]
    if cores == 1:
        return 1, "one core"
    if own:
        return 1, f"{own[0]}: what your own prepare() holds may not be for several; runtime.processes: {cores} if it is"
    if rows < least:
        return 1, f"{rows:,} samples: from {least:,} on each of {cores} cores has enough full buckets"
    return cores, f"one for each of {cores} cores: none waits for Python's lock, or for another core's part"


def _compiled(way: Resolved) -> set[str]:
    return {choice.backend for choice in way.segments.values()} - {*OPERATION_BY_OPERATION}


def _in_processes(base: Resolved, count: int, schedule: str) -> Resolved:
    """Each with one thread that computes and one that decodes, in turns."""
    reasons = {
        **base.reasons,
        "schedule": "configured" if schedule == "cascade" else "a cascade computes only what is needed",
        "lanes": "one run at a time in each process",
        "streams": "the process's own thread",
        "threads": "one in each process",
        "decode_workers": "one in each process, while it does not compute",
        "decoding": "each process decodes what it computes",
    }
    return replace(
        base,
        streams="caller",
        lanes=1,
        threads=1,
        processes=count,
        decode_workers=1,
        decoding="threads",
        reasons=reasons,
    )


def _threads_why(base: Resolved, cores: int, which: str = "", after: str = "") -> str:
    return (
        f"{which}{cores} cores{after}" if base.device == "cpu" else "a GPU computes: what is left to the host is small"
    )


def _side_by_side(base: Resolved, branches: int, small: bool, cores: int) -> Resolved:
    """The parallel schedule: a stream for each branch, and the cores shared among them."""
    threads = 1 if small else max(1, cores // max(1, branches))
    streams = "one for each branch: the schedule is parallel"
    reasons = {
        **base.reasons,
        "streams": streams,
        "threads": _threads_why(base, cores, after=f" for {branches} branches"),
    }
    return replace(base, schedule="parallel", streams="parallel", threads=threads, reasons=reasons)


def _fastest(ways: Sequence[Resolved], measure: Measure | None) -> Resolved:
    """The way that was measured to be fastest, where there is more than one."""
    if len(ways) == 1 or measure is None:
        return ways[0]
    names = [f"{one.schedule}, {one.streams}, {one.lanes} x {one.threads} threads" for one in ways]
    seconds = {name: measure(one) for name, one in zip(names, ways, strict=True)}
    best = min(zip(seconds.values(), range(len(ways)), strict=True))[1]
    told = "measured: " + "; ".join(f"{name}: {value * 1e3:.1f} ms" for name, value in seconds.items())
    chosen, reasons = ways[best], dict(ways[best].reasons)
    for key in ("schedule", "streams", "lanes", "threads"):
        reasons[key] = reasons[key] if reasons[key] == "configured" else told
    return replace(chosen, reasons=reasons, measured=seconds)


def _decoding(cores: int, available: int, rows: int, *, single: bool) -> tuple[str, str]:
    """(what `auto` becomes, why): threads wait for Python's lock from some number on, and processes take seconds to
    start."""
    if single:
        return "threads", "a single call decodes on its own thread"
    if not decoders.available():
        return "threads", "this system has no memory that processes share without a name"
    if cores < _CORES_FOR_PROCESSES:
        return "threads", f"{cores} cores: so few threads seldom wait for Python's lock"
    if rows < _ROWS_FOR_PROCESSES:
        return "threads", f"processes take seconds to start: from {_ROWS_FOR_PROCESSES:,} samples of a job on"
    needs = cores * decoders.MEMORY_BYTES
    if needs > available * (1 - _SHARE) / 2:
        return "threads", f"{cores} processes would take {shown(needs)} beside memory_limit"
    return "processes", f"{cores} cores, {rows:,} samples: threads would wait for Python's lock"


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
