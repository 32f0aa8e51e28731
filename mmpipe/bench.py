"""`mmpipe bench`: what exits, number type, backend and the rest each bring, on this machine and these media.

The configuration as it is, and once more for each thing that it does fast, without that thing. Rounds are interleaved
in random order, so that what else the machine does falls on all alike; ratios are told with their spread.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmpipe.config import load
from mmpipe.explain.collect import made_up as samples_made_up
from mmpipe.loading import keep_freed_memory
from mmpipe.pipeline import Pipeline
from mmpipe.types import Sample

CONFIGURED = "as configured"
_COMPUTED = "runtime.cache=off"  # what is known from the round before would cost nothing


@dataclass
class Measured:
    """One variant. Seconds of each round; the split is the last round's, in seconds of one core (decoding) and of the
    thread that computes."""

    name: str
    what: str
    seconds: list[float] = field(default_factory=list)
    decode_core_seconds: float = 0.0
    compute_seconds: float = 0.0
    bound_seconds: float = 0.0  # no run over these cores can end earlier


def bench(
    source: str | Path,
    samples: Sequence[Sample] | None,
    *,
    made_up: int = 64,
    overrides: Sequence[str] = (),
    rounds: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[Measured], int]:
    """Measure every variant `rounds` times over the samples, after a run of each that warms it up; how many there were.

    `samples` None: `made_up` samples that need no files.
    """
    keep_freed_memory()
    found: dict[str, tuple[Measured, Pipeline]] = {}
    with ExitStack() as stack:
        first = stack.enter_context(Pipeline(load(source, overrides=[*overrides, _COMPUTED]), say=say))
        samples = samples_made_up(first, made_up) if samples is None else samples
        first.settle(samples)
        found[CONFIGURED] = Measured(CONFIGURED, _about(first)), first
        for name, changes in _variants(first):
            made = stack.enter_context(Pipeline(load(source, overrides=[*overrides, _COMPUTED, *changes])))
            made.settle(samples)
            found[name] = Measured(name, _about(made)), made
        for name, (_, pipeline) in found.items():
            say(f"warming up: {name}")
            pipeline.predict(samples[: 4 * pipeline.resolved.batch_size])
        shuffled = random.Random(0)
        for number in range(rounds):
            order = list(found)
            shuffled.shuffle(order)
            for name in order:
                say(f"round {number + 1} of {rounds}: {name}")
                _round(*found[name], samples)
    return [measured for measured, _ in found.values()], len(samples)


def table(measured: Sequence[Measured], count: int) -> Iterator[str]:
    """Lines for a terminal."""
    base = measured[0]
    yield f"{'':<22} {'items/s':>9} {'time ÷ configured':>22} {'decode':>9} {'compute':>9} {'of bound':>9}"
    for one in measured:
        ratios = sorted(a / b for a, b in zip(one.seconds, base.seconds, strict=True))
        middle = statistics.median(one.seconds)
        spread = "" if one is base else f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
        share = one.bound_seconds / middle if middle else 0.0
        decode, compute = (f"{1e3 * value / count:.2f} ms" for value in (one.decode_core_seconds, one.compute_seconds))
        yield f"{one.name:<22} {count / middle:9.1f} {spread:>22} {decode:>9} {compute:>9} {share:9.0%}"
        yield f"  {one.what}"


def plain(measured: Sequence[Measured], count: int) -> Mapping[str, object]:
    """For --json."""
    return {"items": count, "variants": [asdict(one) for one in measured]}


def _variants(pipeline: Pipeline) -> Iterator[tuple[str, list[str]]]:
    """What this pipeline does fast → overrides that leave it out."""
    resolved, config = pipeline.resolved, pipeline.config
    if len(pipeline.plan.exits) > 1:
        yield "without exits", ["fusion.exits=[]", "fusion.calibration=null"]
    if resolved.dtype != "float32":
        yield "float32", ["runtime.dtype=float32"]
    if resolved.backend != "eager":
        yield "eager", ["runtime.backend=eager"]
    if config.input.decode == "fast":
        yield "exact decoding", ["input.decode=exact"]
    if len(pipeline.plan.branches) > 1 and resolved.schedule == "cascade":
        yield "branches side by side", ["runtime.schedule=parallel"]
    if resolved.processes > 1:
        yield "one process", ["runtime.processes=1"]
    if resolved.batch_size > 1:
        yield "one row a bucket", ["runtime.batch_size=1", f"runtime.processes={resolved.processes}"]


def _about(pipeline: Pipeline) -> str:
    resolved = pipeline.resolved
    lanes = f"{resolved.lanes} lanes of {resolved.threads} threads, {resolved.batch_size} rows a bucket"
    processes = f"{resolved.processes} processes of " if resolved.processes > 1 else ""
    return f"{resolved.dtype}, {resolved.backend}, {resolved.schedule}, {processes}{lanes}"


def _round(measured: Measured, pipeline: Pipeline, samples: Sequence[Sample]) -> None:
    spent: Counter[str] = Counter()
    shard = pipeline.config.output.shard_rows
    began = time.perf_counter()
    pipeline.run_shards(
        [samples[start : start + shard] for start in range(0, len(samples), shard)],
        lambda samples, predictions, outcome: spent.update(outcome.seconds),
    )
    measured.seconds.append(time.perf_counter() - began)
    resolved = pipeline.resolved
    decode, compute = spent["decode"], sum(spent[segment.name] for segment in pipeline.plan.segments)
    measured.decode_core_seconds, measured.compute_seconds = decode, compute
    cores = resolved.processes * resolved.decode_workers
    decoding = decode / cores
    if resolved.device == "cpu":
        side_by_side = max(1, cores // resolved.threads)  # segments that the cores can run at once
        measured.bound_seconds = decoding + compute / side_by_side
    else:  # the cores decode while the GPU computes
        measured.bound_seconds = max(decoding, compute)
