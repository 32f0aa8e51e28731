"""In which number type an encoder is faster that is too small for a rule: measured once, by a job that wins it back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from mmpipe.graphs.backends import Target, lower
from mmpipe.graphs.plan import Plan, Segment
from mmpipe.parity import MIN_COSINE, bucket
from mmpipe.runtime.executor import threads_of

LEAST_ROWS = 500  # of a job, for each core that computes: measuring takes as long as some fifty rows
_ROWS, _RUNS = 8, 3
_LEAST_S = 50e-6  # of a row: less is no matter
_GAIN = 1.3  # how much faster it has to be, so that another measurement would hardly say otherwise

Segments = Mapping[Segment, GraphModule]
Real = Mapping[str, Sequence[Tensor]]


def faster(plan: Plan, encoders: Mapping[str, Segments], threads: int, real: Real) -> list[tuple[GraphModule, str]]:
    """Each encoder's modules with its one type: bfloat16 where that is surely faster, and at parity over `real`."""
    found = []
    for segments in encoders.values():
        try:
            with threads_of(threads), torch.inference_mode():
                dtype = _faster(plan, segments, real)
        except Exception:  # noqa: BLE001 - a graph of a user's own that can't be computed so: nothing is lost
            dtype = "float32"
        found += [(module, dtype) for module in segments.values()]
    return found


def _faster(plan: Plan, segments: Segments, real: Real) -> str:
    inputs = {segment: bucket(plan, segment, _ROWS, real) for segment in segments}
    plain, wanted = _timed(segments, inputs, torch.float32)
    if plain < _LEAST_S * _ROWS:
        return "float32"
    short, got = _timed(segments, inputs, torch.bfloat16)
    counts = [count for segment, (_, count) in inputs.items() for _ in segment.writes]
    near = all(_near(*values) for values in zip(wanted, got, counts, strict=True))
    return "bfloat16" if near and plain >= _GAIN * short else "float32"


def _timed(
    segments: Segments, inputs: Mapping[Segment, tuple[list[Tensor], int]], dtype: torch.dtype
) -> tuple[float, list[Tensor]]:
    """Seconds of the fastest run, after one that warms up, and the results."""
    seconds, results = 0.0, []
    for segment, module in segments.items():
        given, _ = inputs[segment]
        run = lower("eager", segment, module, Target(_ROWS, dtype))
        results += [value.clone() for value in run(*given)]
        times = []
        for _ in range(_RUNS):
            began = time.perf_counter()
            run(*given)
            times.append(time.perf_counter() - began)
        seconds += min(times)
    return seconds, results


def _near(wanted: Tensor, got: Tensor, count: int) -> bool:
    one, other = (value[:count].float().flatten(1) for value in (wanted, got))
    return bool((torch.nn.functional.cosine_similarity(one, other, dim=1) >= MIN_COSINE).all())  # not a number is not
