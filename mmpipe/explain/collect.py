"""A pipeline and a measured run → what `mmpipe explain` tells, as plain data.

What is measured: real runs over real media (or made-up rows where there are none). What is counted: operations, matrix
products, bytes, from the graph. What is concluded: where the time goes, what bounds it, which fast path was not taken.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmpipe import resizing
from mmpipe.budget import shown
from mmpipe.explain.timing import products_seconds
from mmpipe.explain.words import duration
from mmpipe.graphs import cost, memory
from mmpipe.graphs.cost import Product
from mmpipe.graphs.draw_svg import as_svg
from mmpipe.graphs.fuse import FusedGraph, mark_of
from mmpipe.graphs.plan import HEAD, Plan, StagePlan
from mmpipe.graphs.precision import lowered
from mmpipe.loading import freed_memory_is_kept
from mmpipe.machine import cores, versions
from mmpipe.pipeline import Pipeline
from mmpipe.resolved import PLAIN
from mmpipe.runtime.device import cuda_devices, device_name
from mmpipe.runtime.ledger import Outcome, Span
from mmpipe.types import Prediction, Sample

_RATE_HZ = 44_100  # of made-up sound
_PRODUCTS = 0.6  # from this share of its time on, a segment is its matrix products


def explain(
    pipeline: Pipeline, samples: Sequence[Sample], *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Run `samples` twice, measure the second time, and tell all there is to tell. Changes nothing in the pipeline."""
    say(f"measuring a run of {len(samples)} samples")
    warm = samples[: 4 * pipeline.resolved.batch_size]
    pipeline.run(warm, deliberate=False, cached=False)  # what is slow only once: memory, kernels, caches
    began = time.perf_counter()
    # one look, nothing known: what is told of is one plan's run
    predictions, outcome = pipeline.run(samples, deliberate=False, cached=False)
    wall = time.perf_counter() - began
    plan = pipeline.plan
    say("timing the matrix products alone")
    segments = _segments(pipeline, plan, outcome)
    seconds = _seconds(outcome, wall, pipeline.resolved.processes)
    return {
        "title": pipeline.config.source.name or "mmpipe",
        "machine": machine(pipeline.resolved.device),
        "verdict": "",
        "advice": [],
        "seconds": seconds,
        "items": len(samples),
        "items_per_second": len(samples) / wall if wall else 0.0,
        "answered_by": _answered(pipeline, predictions),
        "segments": segments,
        "autos": _autos(pipeline),
        "not_taken": not_taken(pipeline, outcome, segments),
        "memory": dict(pipeline.resolved.memory),
        "passes": dict(pipeline.built.removed),
        "versions": versions(),
        "svg": as_svg(plan, seconds={s["name"]: s["seconds"] for s in segments}),
        "timeline": _timeline(outcome, began),
        "pool": {"stages": [_pool(stage_plan) for stage_plan in plan.stage_plans]},
        "fingerprints": dict(pipeline.fingerprints(samples)),
        "notes": list(pipeline.notes),
    } | dict(zip(("verdict", "advice"), verdict(segments, seconds, pipeline, outcome), strict=True))


def made_up(pipeline: Pipeline, count: int) -> list[Sample]:
    """Samples that need no files: noise of common sizes, a few words, every modality that the pipeline has."""
    make = np.random.default_rng(0)
    noise = make.integers(0, 256, (480, 640, 3), dtype=np.uint8)
    sound = make.standard_normal(10 * _RATE_HZ).astype(np.float32) / 10
    words = ("red jacket with two pockets, hardly worn, " * 4).split()
    media: dict[str, Callable[[int], Any]] = {
        "image": lambda number: np.roll(noise, number, axis=0),
        "text": lambda number: " ".join(words[: 4 + number % (len(words) - 4)]),
        "audio": lambda number: (np.roll(sound, number), _RATE_HZ),
    }
    return [Sample(str(n), {name: media[name](n) for name in pipeline.config.modalities}) for n in range(count)]


def machine(device: str = "cpu") -> str:
    """This machine in a line: processor, cores, what PyTorch may use of it; the GPU where `device` is one."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    gpu = "" if device == "cpu" else f"{device_name(device)}, "
    return f"{gpu}{name}, {cores()} cores, {torch.backends.cpu.get_cpu_capability()}, PyTorch {torch.__version__}"


def _answered(pipeline: Pipeline, predictions: Sequence[Prediction]) -> dict[str, int]:
    names = [exit_.name for exit_ in pipeline.plan.exits] or ["all"]
    return {name: sum(p.answered_by == name for p in predictions) for name in names}


def _segments(pipeline: Pipeline, plan: Plan, outcome: Outcome) -> list[dict[str, Any]]:
    """One line a segment: measured, and counted for a full bucket."""
    modules = pipeline.modules
    total = sum(outcome.seconds.get(segment.name, 0.0) for segment in plan.segments) or 1.0
    timed: dict[Product, float] = {}
    lines = []
    for segment in plan.segments:
        spans = [span for span in outcome.spans if span.step == segment.name]
        rows = next(s.rows for s in plan.stage_plans if segment.stage in s.stages)
        full = [span.end - span.start for span in spans if span.rows == rows] or [s.end - s.start for s in spans]
        bucket = statistics.median(full) if full else 0.0
        flops = cost.count_flops(plan, segment, modules[segment.name], rows)
        way = pipeline.resolved.segments.get(segment.name, PLAIN)
        as_run = lowered(modules[segment.name], getattr(torch, way.dtype))
        found = cost.products(plan, segment, as_run, rows)
        alone = products_seconds(found, timed, pipeline.resolved.threads, pipeline.runners.device)
        spent, done = sum(s.end - s.start for s in spans), sum(span.rows for span in spans)
        lines.append(
            {
                "name": segment.name,
                "stage": segment.stage,
                "branch": segment.branch,
                "seconds": spent,
                "share": spent / total,
                "runs": len(spans),
                "rows": done,
                "ms_per_row": 1e3 * spent / done if done else 0.0,
                "nodes": segment.nodes,
                "flops": flops,
                "gflops_per_second": flops / bucket / 1e9 if bucket else 0.0,
                "products_seconds": alone,
                "bucket_seconds": bucket,
                "products_share": min(1.0, alone / bucket) if bucket else 0.0,
                "workspace_bytes": cost.workspace_bytes(modules[segment.name], rows),
                "backend": way.backend,
            }
        )
    return lines


def _seconds(outcome: Outcome, wall: float, processes: int) -> dict[str, float]:
    """wall = compute (somewhere a segment runs) + waiting (none does, the host waits for media) + other; of several
    processes the mean."""
    by_process: dict[str, list[tuple[float, float]]] = {}
    for span in outcome.spans:
        if ":" not in span.step:
            by_process.setdefault(span.stream.partition("/")[0] if processes > 1 else "", []).append(
                (span.start, span.end)
            )
    compute = sum(map(covered, by_process.values())) / processes
    waiting = min(outcome.seconds.get("waiting", 0.0) / processes, max(0.0, wall - compute))
    return {
        "wall": wall,
        "compute": compute,
        "waiting": waiting,
        "decode_core": outcome.seconds.get("decode", 0.0),
        "other": max(0.0, wall - compute - waiting),
    }


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _autos(pipeline: Pipeline) -> list[dict[str, Any]]:
    """Every choice: what the configuration leaves open became what, and why."""
    values = vars(pipeline.resolved)
    lines = []
    for key, why in pipeline.resolved.reasons.items():
        value = shown(values[key]) if key == "memory_limit" else values[key]
        section = "runtime." if key in _CONFIGURED else "input." if key == "decode" else ""
        lines.append({"key": section + key, "value": str(value), "why": why})
    call = pipeline.runners.resolved("call")
    for key in ("batch_size", "schedule", "streams", "threads"):
        lines.append({"key": f"{key} of a single call", "value": str(vars(call)[key]), "why": call.reasons[key]})
    return lines


_CONFIGURED = ("device", "dtype", "backend", "schedule", "batch_size", "memory_limit", "cache", "processes", "decoding")


def not_taken(pipeline: Pipeline, outcome: Outcome, segments: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Each fast path that this run did not take, and why."""
    resolved, plan = pipeline.resolved, pipeline.plan
    found: list[tuple[str, str]] = []
    if resolved.device == "cpu":
        why = resolved.reasons["device"]
        if why == "configured" and (seen := cuda_devices()):
            why = f"runtime.device is cpu; cuda would use one of {seen}"
        found.append(("CUDA", why))
    found += [("a CUDA graph", note) for note in pipeline.runners.device.notes]
    if not freed_memory_is_kept():
        why = (
            "malloc is the whole process's: the command line does it; elsewhere MALLOC_TRIM_THRESHOLD_=2000000000 and "
        )
        found.append(("freed memory kept", why + "MALLOC_MMAP_THRESHOLD_=2000000000 in the environment do"))
    if resolved.dtype == "float32":
        found.append(("bfloat16", resolved.reasons["dtype"]))
    if resolved.backend == "eager":
        found.append(("a compiled backend", resolved.reasons["backend"]))
    if resolved.schedule == "cascade" and len(plan.branches) > 1:
        found.append(("branches side by side", resolved.reasons["schedule"]))
    if resolved.decode == "exact" and "image" in pipeline.built.preparations:
        found.append(("fast decoding", resolved.reasons["decode"]))
    if resolved.decode == "exact" and pipeline.runners.resizes and (why := resizing.why_not()):
        found.append(("pictures resized by native code", why))
    if resolved.decoding == "threads":
        found.append(("decoding in processes", resolved.reasons["decoding"]))
    if resolved.processes == 1 and resolved.device == "cpu":
        found.append(("a process for each core", resolved.reasons["processes"]))
    if resolved.lanes == 1 and resolved.processes == 1:
        found.append(("a second lane", resolved.reasons["lanes"]))
    if len(plan.exits) == 1:
        empty = "the calibration certified none" if pipeline.config.fusion.calibration else "fusion.exits is empty"
        found.append(("exits", f"{empty}: every sample goes through every encoder it has a medium for"))
    if resolved.cache == "off":
        found.append(("embedding cache", resolved.reasons["cache"]))
    for segment in segments:
        rows = next(s.rows for s in plan.stage_plans if segment["stage"] in s.stages)
        room = segment["runs"] * rows
        if segment["rows"] < 0.9 * room:
            padding = 1 - segment["rows"] / room
            why = f"{segment['rows']} rows in {segment['runs']} × {rows}: {padding:.0%} padding"
            found.append((f"full buckets in {segment['name']}", why))
    passes = {"fold_normalisation": "folding normalisation into a convolution", "share_weights": "storing weights once"}
    why_not = {
        "fold_normalisation": "no unpadded convolution follows one (padding would make it inexact)",
        "share_weights": "no two weights are equal",
    }
    for name, text in passes.items():
        if not pipeline.built.removed.get(name):
            found.append((text, why_not[name]))
    found += left_as_written(pipeline.graph)
    return [{"what": what, "why": why} for what, why in found]


def left_as_written(graph: FusedGraph) -> list[tuple[str, str]]:
    """What encoders compute in a form that no pass could change for a faster one."""
    nodes = [node for node in graph.graph.nodes if mark_of(node).branch != HEAD]
    norms = sum(node.target is torch.ops.aten.batch_norm.default for node in nodes)
    softmaxes = sum(
        node.target is torch.ops.aten.softmax.int
        and any(user.target in (torch.ops.aten.matmul.default, torch.ops.aten.bmm.default) for user in node.users)
        for node in nodes
    )
    found = []
    if norms:
        found.append(("folding batch norms", f"{norms} follow no convolution that only they read"))
    if softmaxes:
        why = "softmax(q kᵀ · scale + bias) v in float32 on [batch, heads, tokens, width] with scores of its own"
        found.append(("attention as one operation", f"{softmaxes} are not {why}"))
    return found


def verdict(
    segments: Sequence[Mapping[str, Any]], seconds: Mapping[str, float], pipeline: Pipeline, outcome: Outcome
) -> tuple[str, list[str]]:
    """What bounds this run, in a sentence, and what to do about it: the largest of computing, waiting and the rest."""
    if not any(segment["runs"] for segment in segments):
        return "Nothing was computed: no sample had a medium that could be read.", []
    share = {name: seconds[name] / (seconds["wall"] or 1.0) for name in ("compute", "waiting", "other")}
    largest = max(share, key=lambda name: share[name])
    if largest == "compute":
        slowest = max(segments, key=lambda segment: segment["seconds"])
        text = (
            f"Bound by computing ({share['compute']:.0%} of the time): {slowest['name']} takes {slowest['share']:.0%} "
            f"of it, {duration(slowest['ms_per_row'] / 1e3)} a row."
        )
        return text, _faster(slowest, pipeline.plan)
    if largest == "waiting":
        spent: dict[str, float] = {}
        for one in outcome.decodings:
            spent[one.branch] = spent.get(one.branch, 0.0) + one.end - one.start
        worst = max(spent, key=lambda name: spent[name])
        part, resolved = spent[worst] / (sum(spent.values()) or 1.0), pipeline.resolved
        workers = resolved.processes * resolved.decode_workers
        text = (
            f"Bound by decoding: the model waits {share['waiting']:.0%} of the time; {worst} takes {part:.0%} of the "
            f"decoding, on {workers} workers."
        )
        advice = [f"Smaller {worst} files, more cores, or an exit before {worst} help; a faster model would not."]
        if worst == "image" and resolved.decode == "exact":
            advice.append("So does input.decode: fast, where answers may differ a little from the reference's.")
        return text, advice
    text = (
        f"Bound by neither computing ({share['compute']:.0%} of the time) nor decoding ({share['waiting']:.0%}): "
        "the run is so short that beginning and gating it is what remains."
    )
    return text, ["More samples in one run, or a larger runtime.batch_size, make this share smaller."]


def _faster(slowest: Mapping[str, Any], plan: Plan) -> list[str]:
    """What would make the slowest segment faster."""
    name, share = slowest["name"], slowest["products_share"]
    advice = []
    if slowest["branch"] != HEAD and share >= _PRODUCTS:
        text = f"{share:.0%} of {name} is matrix products: fewer rows (an exit before it) or a smaller model help."
        advice.append(text)
    elif slowest["branch"] != HEAD:
        advice.append(f"{name}'s matrix products alone would take {share:.0%} of its time: the rest lies between them.")
    if len(plan.exits) == 1 and len(plan.branches) > 1:
        advice.append("An exit (fusion.exits) would spare the samples that an earlier modality has settled.")
    return advice


def _timeline(outcome: Outcome, began: float) -> dict[str, Any]:
    def relative(value: float) -> float:
        return round(value - began, 6)

    decodings = sorted(outcome.decodings, key=lambda d: d.start)
    worker = {name: str(number) for number, name in enumerate(dict.fromkeys(d.worker for d in decodings), 1)}
    return {
        "spans": [span_of(span, relative) for span in sorted(outcome.spans, key=lambda span: span.start)],
        "decoding": [
            {"branch": d.branch, "worker": worker[d.worker], "start": relative(d.start), "end": relative(d.end)}
            for d in decodings
        ],
    }


def span_of(span: Span, relative: Callable[[float], float]) -> dict[str, Any]:
    return {**vars(span), "start": relative(span.start), "end": relative(span.end)}


def _pool(stage_plan: StagePlan) -> dict[str, Any]:
    """Scratch of one stage plan: each buffer from its first to its last step, and the least that it could take."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, step in enumerate(stage_plan.steps):
        for name in (*step.reads, *step.writes):
            first.setdefault(name, index)
            last[name] = index
    scratch = [b for b in stage_plan.buffers if b.home == "scratch"]
    return {
        "name": stage_plan.name,
        "scratch_bytes": stage_plan.scratch_bytes,
        "lower_bound": memory.lower_bound(stage_plan.steps, stage_plan.buffers),
        "unshared": sum(memory.aligned(b.bytes) for b in scratch),
        "steps": [step.name for step in stage_plan.steps],
        "buffers": [
            {"name": b.name, "bytes": b.bytes, "offset": b.offset, "first": first[b.name], "last": last[b.name]}
            for b in scratch
            if b.name in first
        ],
    }
