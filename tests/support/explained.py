"""A real plan, and what a run of it could have been measured as: the facts that the explain page is made of."""

from __future__ import annotations

import functools
import random
from typing import Any

from mmpipe.graphs import memory
from mmpipe.graphs.cut import cut
from mmpipe.graphs.draw import as_svg
from mmpipe.graphs.fuse import ExitSpec
from mmpipe.graphs.plan import Plan, StagePlan
from mmpipe.graphs.schedule import place
from support.parts import PARTS, fused

ROWS = 32
STEP_SECONDS = {"image": 0.0412, "text": 0.0127, "audio": 0.0268, "head": 0.0009}  # one full bucket
PRODUCTS = {"image": 0.83, "text": 0.61, "audio": 0.34, "head": 0.12}
RUNS = (16, 11, 4)  # of each stage
DECODE_SECONDS = {"image": 0.0061, "text": 0.0002, "audio": 0.0093}


@functools.cache
def plan(layout: str = "branches") -> Plan:
    graph = fused(PARTS, [ExitSpec("image", ("image",)), ExitSpec("image+text", ("image", "text"))])
    return place(cut(graph).plan, rows=ROWS, layout=layout, lanes=2)


def explained(**changed: Any) -> dict[str, Any]:
    """Everything that the page is told of a run of `plan()`; `changed` replaces keys."""
    made = plan()
    timeline = _timeline(made)
    segments = _segments(made)
    compute = sum(segment["seconds"] for segment in segments)
    wall = max(span["end"] for span in timeline["spans"])
    facts = {
        "title": "products",
        "machine": "AMD EPYC 7B13, 8 cores, AVX2, 32 GiB",
        "verdict": f"Computing bounds this run: image@0 takes {segments[0]['share']:.0%} of the segments' time, "
        "and most of it is matrix products.",
        "advice": [
            "precision: int8 would halve the products of image@0",
            "an exit on image.layer1 would spare 41% of the samples two thirds of the encoder",
        ],
        "seconds": {
            "wall": wall,
            "compute": min(compute, 0.86 * wall),
            "waiting": 0.09 * wall,
            "decode_core": sum(one["end"] - one["start"] for one in timeline["decoding"]),
            "other": wall - min(compute, 0.86 * wall) - 0.09 * wall,
        },
        "items": ROWS * RUNS[0],
        "items_per_second": ROWS * RUNS[0] / wall,
        "answered_by": {"image": 167, "image+text": 228, "all": 117},
        "segments": segments,
        "autos": [
            {"key": "runtime.precision", "value": "bf16", "why": "no AMX, but bf16 is 1.7× as fast as f32 here"},
            {"key": "runtime.batch", "value": "32", "why": "rows a second grow 3% from 32 to 64, and latency doubles"},
            {"key": "runtime.schedule", "value": "staged", "why": "67% of the samples leave before audio is opened"},
            {"key": "runtime.streams", "value": "branches", "why": "6.9 ms a bucket, against 7.4 on one stream"},
        ],
        "not_taken": [
            {"what": "TensorRT", "why": "no NVIDIA GPU"},
            {"what": "torch.compile for audio@2", "why": "it specialises windows × batch: 3 compilations"},
        ],
        "memory": {
            "weights": 612_368_384, "slots": 41_943_040, "media": 115_605_504, "scratch": 28_311_552,
            "host": 393_216, "workspaces": 67_108_864, "decoding": 201_326_592,
        },
        "passes": {"fold constants": 41, "share": 12, "merge linears": 6, "drop dropout": 18},
        "versions": {"mmpipe": "0.1.0", "torch": "2.9.1", "python": "3.11.9"},
        "svg": as_svg(made, seconds={segment["name"]: segment["seconds"] for segment in segments}),
        "timeline": timeline,
        "pool": {"stages": [_stage(stage) for stage in made.stage_plans]},
        "fingerprints": {"plan": "3f7a90c2d1", "graph": "a81be44f07"},
        "notes": ["Measured on 512 samples after one warm run."],
    }  # fmt: skip
    assert not set(changed) - set(facts)
    return facts | changed


def _segments(made: Plan) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for segment in made.segments:
        bucket, runs = STEP_SECONDS[segment.branch], RUNS[segment.stage]
        share, rows = PRODUCTS[segment.branch], runs * ROWS - (runs * 5 if segment.stage else 0)
        flops = int(bucket * share * 190e9)
        found.append(
            {
                "name": segment.name, "stage": segment.stage, "branch": segment.branch, "seconds": bucket * runs,
                "runs": runs, "rows": rows, "ms_per_row": 1e3 * bucket * runs / rows, "nodes": segment.nodes,
                "flops": flops, "gflops_per_second": flops / bucket / 1e9, "products_seconds": bucket * share,
                "bucket_seconds": bucket, "products_share": share, "workspace_bytes": segment.nodes << 16,
                "backend": "inductor" if segment.branch != "head" else "eager",
            }
        )  # fmt: skip
    whole = sum(segment["seconds"] for segment in found)
    return [segment | {"share": segment["seconds"] / whole} for segment in found]


def _timeline(made: Plan) -> dict[str, Any]:
    """Steps as streams would run them, two lanes in flight, and two workers that decode ahead."""
    chance = random.Random(7)
    free: dict[str, float] = {}
    spans: list[dict[str, Any]] = []
    lane_free = [0.012, 0.02]
    order = sorted(
        (number * (1.0, 1.5, 3.4)[stage] + stage, stage) for stage in range(3) for number in range(RUNS[stage])
    )
    for serial, (_, stage) in enumerate(order):
        lane = serial % 2
        done: dict[str, float] = {}
        for step in made.stage_plans[stage].steps:
            took = STEP_SECONDS[step.branch] if step.does == "run" else 0.0011
            start = max(free.get(step.stream, 0.0), lane_free[lane], *(done[name] for name in step.waits), 0.0)
            end = start + took * chance.uniform(0.92, 1.15)
            free[step.stream] = done[step.name] = end
            spans.append(
                {"step": step.name, "stream": step.stream, "lane": lane, "run": serial, "rows": ROWS, "start": start,
                 "end": end}
            )  # fmt: skip
        lane_free[lane] = max(done.values())
    return {"spans": spans, "decoding": _decoding(chance, max(span["end"] for span in spans))}


def _decoding(chance: random.Random, wall: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for branch, took in DECODE_SECONDS.items():
        for worker in range(2):
            at, pause = 0.0, 0.35 * took + 0.004
            while at < 0.9 * wall:
                end = at + took * chance.uniform(0.6, 1.5)
                found.append({"branch": branch, "worker": worker, "start": at, "end": end})
                at = end + pause * chance.uniform(0.2, 1.8)
    return found


def _stage(stage: StagePlan) -> dict[str, Any]:
    """One stage plan's scratch, as the page draws it."""
    used: dict[str, list[int]] = {}
    for index, step in enumerate(stage.steps):
        for name in (*step.reads, *step.writes):
            used.setdefault(name, []).append(index)
    scratch = [buffer for buffer in stage.buffers if buffer.home == "scratch"]
    return {
        "name": stage.name,
        "scratch_bytes": stage.scratch_bytes,
        "lower_bound": memory.lower_bound(stage.steps, stage.buffers),
        "unshared": sum(memory.aligned(buffer.bytes) for buffer in scratch),
        "steps": [step.name for step in stage.steps],
        "buffers": [
            {"name": b.name, "bytes": b.bytes, "offset": b.offset, "first": used[b.name][0], "last": used[b.name][-1]}
            for b in scratch
        ],
    }
