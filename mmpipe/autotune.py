"""`mmpipe autotune`: every encoder segment × bucket × backend × number type, measured here; the winners are kept.

Each way is compiled, compared with eager float32 on real samples, and timed alone on the machine, with the threads that
the plan gives it, in another process (`mmpipe.trying`). What is not at parity can't win; what can't be had, because its
compiler refuses, crashes or does not end, says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.fx import GraphModule

from mmpipe import resizing
from mmpipe.errors import InputError
from mmpipe.graphs.backends import BACKENDS, OPERATION_BY_OPERATION, lower
from mmpipe.graphs.plan import HEAD, Segment
from mmpipe.machine import bfloat16_gain
from mmpipe.parity import MIN_COSINE, bucket, real_rows
from mmpipe.pipeline import Pipeline
from mmpipe.resolved import Choice
from mmpipe.trying import Lower, Measured, Trial, Workbench
from mmpipe.tuned import Best, Tuned, compiled_folder
from mmpipe.types import Sample

_SECONDS = 1.5  # for one way to be timed
_HEAD_START = 1.03  # how much faster than the way without a compiler one with must be
_NONE_SUCH = {("onnx", "bfloat16"), ("native", "float32")}


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
    lower: Lower = lower,
) -> Tuning:
    """Measure, and keep the winners for this machine. `backends`: those to try; empty: all that are installed.

    Where `samples` is empty, parity is judged on made-up media. `lower` is for backends of your own: a function like
    `mmpipe.graphs.backends.lower` that another process can import. As it starts one, a script of yours calls this under
    `if __name__ == "__main__":`. Raises InputError on a backend that there is none of, and off the CPU.
    """
    if unknown := [name for name in backends if name not in BACKENDS]:
        raise InputError(f"no backend {unknown[0]!r}: there are {', '.join(BACKENDS)}")
    if pipeline.resolved.device != "cpu":
        raise InputError(
            f"autotune measures on the CPU, and runtime.device is {pipeline.resolved.device}: "
            "--set runtime.device=cpu measures there"
        )
    if "tensorrt" in backends:
        say("tensorrt is for GPUs, and is not measured here")
    real = real_rows(samples, pipeline.built.preparations, pipeline.limits)
    tried: list[Tried] = []
    best: dict[tuple[str, int, int], Best] = {}
    won: list[tuple[GraphModule, int, int, Best]] = []
    with Workbench(lower) as bench:
        for segment, rows, threads in _places(pipeline):
            module = pipeline.modules[segment.name]
            inputs, count = bucket(pipeline.plan, segment, rows, real)
            trial = Trial.of(segment, module, inputs, count, threads, compiled_folder(), _SECONDS)
            here = []
            for choice in _choices(backends):
                here.append(_tried(trial, choice, bench.measure(trial, choice)))
                say(line(here[-1]))
            tried += here
            winner = _winner(here)
            if winner is not None:
                best[segment.name, rows, threads] = winner
                won.append((module, rows, threads, winner))
    if pipeline.runners.resizes:
        resizing.load(compiled_folder())
        without = resizing.why_not()
        say(f"pictures are resized by {f'Pillow: {without}' if without else 'native code, to the same bits'}")
    try:
        kept = Tuned().keep(won)
        why = "the cache is off (MMPIPE_CACHE)"
    except OSError as error:
        kept, why = None, str(error)
    if won and kept is None:
        say(f"the winners are not kept, and no run will know them: {why}")
    return Tuning(tried, best)


def line(one: Tried) -> str:
    """One way, for a terminal."""
    name = f"{one.segment:<10} {one.rows:>3} rows  {one.choice.backend + ' ' + one.choice.dtype:<20}"
    if one.why and not one.row_seconds:
        return f"{name} not tried: {one.why}"
    ready = f"  ready in {one.ready_seconds:.1f} s" if one.choice.backend != "eager" else ""
    return f"{name} {1e3 * one.row_seconds:9.3f} ms a row{ready}" + (f"  NOT USED: {one.why}" if one.why else "")


def _places(pipeline: Pipeline) -> Iterator[tuple[Segment, int, int]]:
    """Where a choice is to be made: the encoders' segments, as batches, large jobs and single calls run them."""
    runners = pipeline.runners
    kinds = (pipeline.resolved, runners.for_many(), runners.resolved("call"))
    ways = dict.fromkeys((way.batch_size, way.threads) for way in kinds)
    for rows, threads in ways:
        for segment in pipeline.plan.segments:
            if segment.branch != HEAD:
                yield segment, rows, threads


def _choices(backends: Sequence[str]) -> list[Choice]:
    """The plain way first, then every other."""
    types = ("float32", "bfloat16") if bfloat16_gain() > 0 else ("float32",)
    wanted = [name for name in BACKENDS if (not backends or name in backends or name == "eager") and name != "tensorrt"]
    return [Choice(backend, dtype) for backend in wanted for dtype in types if (backend, dtype) not in _NONE_SUCH]


def _tried(trial: Trial, choice: Choice, found: Measured) -> Tried:
    why = found.why
    if not why and not found.cosine >= MIN_COSINE:
        why = f"cosine {found.cosine:.4f} to eager float32"
    figures = (found.row_seconds, found.cosine, found.compile_seconds, found.ready_seconds)
    return Tried(trial.segment.name, trial.rows, trial.threads, choice, *figures, why)


def _winner(tried: Sequence[Tried]) -> Best | None:
    """The fastest at parity; one that needs a compiler must be faster by a little, for what it costs to have it."""
    fair = [one for one in tried if not one.why]
    quick = [one for one in fair if one.choice.backend in OPERATION_BY_OPERATION]
    plain = min(quick, key=lambda one: one.row_seconds, default=None)
    if plain is None:
        return None
    best = min(fair, key=lambda one: one.row_seconds * (1.0 if one in quick else _HEAD_START))
    return Best(best.choice, best.row_seconds, plain.row_seconds, plain.choice, best.ready_seconds)
