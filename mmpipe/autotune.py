"""`mmpipe autotune`: every encoder segment × bucket × backend × number type, measured here; the winners are kept.

Each way is compiled, compared with eager float32 on real samples, and timed alone on the machine, with the threads that
the plan gives it. What is not at parity can't win; what can't be had says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from mmpipe.errors import InputError
from mmpipe.graphs.backends import BACKENDS, Lowered, Target, Unlowerable, examples_of, lower
from mmpipe.graphs.plan import HEAD, PRESENCE, Segment
from mmpipe.lowering import compiled_folder
from mmpipe.machine import bfloat16_gain
from mmpipe.parity import MIN_COSINE, real_rows
from mmpipe.pipeline import Pipeline
from mmpipe.resolved import PLAIN, Choice
from mmpipe.runtime.executor import threads_of
from mmpipe.tuned import Best, Tuned
from mmpipe.types import Sample

_LEAST_RUNS, _MOST_RUNS, _SECONDS = 3, 50, 1.5  # for one way, after a run that warms it up
_HEAD_START = 1.03  # how much faster than the way without a compiler one with must be


@dataclass(frozen=True)
class Tried:
    """One way of one segment. `why`: why it can't win; "" where it may."""

    segment: str
    rows: int
    threads: int
    choice: Choice
    row_seconds: float = 0.0
    cosine: float = 1.0  # the least to eager float32, over the real rows
    compile_seconds: float = 0.0
    ready_seconds: float = 0.0  # the second time, with what is kept of the first
    why: str = ""


@dataclass(frozen=True)
class Tuning:
    """All that was tried, in order, and the winner of each (segment, rows, threads)."""

    tried: Sequence[Tried]
    best: Mapping[tuple[str, int, int], Best]

    def plain(self) -> dict[str, Any]:
        """For --json."""
        winners = [{"segment": name, "rows": rows, "threads": threads, **asdict(best)}
                   for (name, rows, threads), best in self.best.items()]  # fmt: skip
        return {"tried": [asdict(one) for one in self.tried], "best": winners}


def autotune(
    pipeline: Pipeline,
    samples: Sequence[Sample],
    *,
    backends: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Tuning:
    """Measure, and keep the winners for this machine. `backends`: those to try; empty: all that are installed.

    Where `samples` is empty, parity is judged on made-up media. Raises InputError on a backend that there is none of.
    """
    if unknown := [name for name in backends if name not in BACKENDS]:
        raise InputError(f"no backend {unknown[0]!r}: there are {', '.join(BACKENDS)}")
    real = real_rows(samples, pipeline.built.preparations, pipeline.limits)
    tried: list[Tried] = []
    best: dict[tuple[str, int, int], Best] = {}
    won: list[tuple[GraphModule, int, int, Best]] = []
    for segment, rows, threads in _places(pipeline):
        module = pipeline.modules[segment.name]
        inputs = _inputs(pipeline, segment, rows, real)
        bench = _Bench(segment, module, rows, threads, inputs)
        here = [bench.tried(choice) for choice in _choices(backends)]
        tried += here
        for one in here:
            say(line(one))
        winner = _winner(here)
        if winner is not None:
            best[segment.name, rows, threads] = winner
            won.append((module, rows, threads, winner))
    Tuned().keep(won)
    return Tuning(tried, best)


def line(one: Tried) -> str:
    """One way, for a terminal."""
    name = f"{one.segment:<10} {one.rows:>3} rows  {one.choice.backend + ' ' + one.choice.dtype:<20}"
    if one.why and not one.row_seconds:
        return f"{name} not tried: {one.why}"
    ready = f"  ready in {one.ready_seconds:.1f} s" if one.choice.backend != "eager" else ""
    return f"{name} {1e3 * one.row_seconds:9.3f} ms a row{ready}" + (f"  NOT USED: {one.why}" if one.why else "")


def _places(pipeline: Pipeline) -> Iterator[tuple[Segment, int, int]]:
    """Where a choice is to be made: the encoders' segments, as batches and as single calls run them."""
    ways = dict.fromkeys(
        (way.batch_size, way.threads) for way in (pipeline.resolved, pipeline.runners.resolved("call"))
    )
    for rows, threads in ways:
        for segment in pipeline.plan.segments:
            if segment.branch != HEAD:
                yield segment, rows, threads


def _choices(backends: Sequence[str]) -> list[Choice]:
    """The plain way first, then every other."""
    types = ("float32", "bfloat16") if bfloat16_gain() > 0 else ("float32",)
    wanted = [name for name in BACKENDS if (not backends or name in backends or name == "eager") and name != "tensorrt"]
    return [Choice(backend, dtype) for backend in wanted for dtype in types if (backend, dtype) != ("onnx", "bfloat16")]


class _Bench:
    """One segment in one bucket."""

    def __init__(
        self, segment: Segment, module: GraphModule, rows: int, threads: int, inputs: tuple[Sequence[Tensor], int]
    ) -> None:
        self.segment, self.module, self.rows, self.threads = segment, module, rows, threads
        self.inputs, self.real = inputs
        with threads_of(threads), torch.inference_mode():
            plain = lower("eager", segment, module, self._target(PLAIN))
            self.wanted = [result.clone() for result in plain(*self.inputs)]

    def tried(self, choice: Choice) -> Tried:
        about = partial(Tried, self.segment.name, self.rows, self.threads, choice)
        try:
            began = time.perf_counter()
            self._lowered(choice)
            compiled = time.perf_counter() - began
            began = time.perf_counter()
            run = self._lowered(choice)
            ready = time.perf_counter() - began
            with threads_of(self.threads), torch.inference_mode():
                cosine = self._cosine(run)
                seconds = self._seconds(run) / self.rows
        except Unlowerable as error:
            return about(why=str(error))
        why = "" if cosine >= MIN_COSINE else f"cosine {cosine:.4f} to eager float32"
        return about(row_seconds=seconds, cosine=cosine, compile_seconds=compiled, ready_seconds=ready, why=why)

    def _lowered(self, choice: Choice) -> Lowered:
        return lower(choice.backend, self.segment, self.module, self._target(choice), self.inputs)

    def _target(self, choice: Choice) -> Target:
        return Target(self.rows, getattr(torch, choice.dtype), self.threads, compiled_folder())

    def _cosine(self, run: Lowered) -> float:
        """The least over the rows that are real (all, where none is) and the segment's results."""
        least = 1.0
        for wanted, got in zip(self.wanted, run(*self.inputs), strict=True):
            one, other = (value[: self.real].float().flatten(1) for value in (wanted, got))
            found = torch.nn.functional.cosine_similarity(one, other, dim=1).min()
            least = min(least, float(found)) if found == found else -1.0
        return least

    def _seconds(self, run: Lowered) -> float:
        """The fastest of some runs: what else the machine does only ever adds."""
        run(*self.inputs)
        times: list[float] = []
        while len(times) < _LEAST_RUNS or (sum(times) < _SECONDS and len(times) < _MOST_RUNS):
            began = time.perf_counter()
            run(*self.inputs)
            times.append(time.perf_counter() - began)
        return min(times)


def _inputs(
    pipeline: Pipeline, segment: Segment, rows: int, real: Mapping[str, Sequence[Tensor]]
) -> tuple[list[Tensor], int]:
    """A bucket of the samples' own rows, repeated, and how many are real; made up where there are none."""
    names = (*segment.inputs, *segment.reads)
    found, count = list(examples_of(pipeline.plan, segment, rows)), rows
    for place, name in enumerate(names):
        if name != PRESENCE and real.get(name):
            found[place] = torch.stack([real[name][n % len(real[name])] for n in range(rows)])
            count = min(rows, len(real[name]))
    return found, count


def _winner(tried: Sequence[Tried]) -> Best | None:
    """The fastest at parity; one that needs a compiler must be faster by a little, for what it costs to have it."""
    fair = [one for one in tried if not one.why]
    plain = min((one for one in fair if one.choice.backend == "eager"), key=lambda one: one.row_seconds, default=None)
    if plain is None:
        return None
    best = min(fair, key=lambda one: one.row_seconds * (1.0 if one.choice.backend == "eager" else _HEAD_START))
    return Best(best.choice, best.row_seconds, plain.row_seconds, plain.choice, best.ready_seconds)
