"""Each encoder alone: milliseconds a row in each backend, and how much of them its matrix products alone would take.

    python examples/segments.py CONFIG [--backends eager,native] [--rounds 21] [--rows 32] [--set KEY=VALUE]
    python examples/segments.py CONFIG --backends native --peers inductor,openvino,onnx

Peers are compilers that are given the encoder as its library has it, without mmpipe's passes: what one gets without
mmpipe. One round runs every backend once and every product that the segment consists of (as `mmpipe explain` counts
them, on packed weights, with nothing between them; best of three) right after one another, so that what else the
machine does falls on all alike; the order changes from round to round. Told are medians over the rounds, and the
quartiles of the ratios within them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mmpipe.loading import keep_freed_memory, use_huge_pages

use_huge_pages()  # before torch is there

import torch  # noqa: E402
from torch import Tensor, fx  # noqa: E402

from mmpipe import Pipeline  # noqa: E402
from mmpipe.capturing import captured_encoder  # noqa: E402
from mmpipe.explain.timing import call_of  # noqa: E402
from mmpipe.graphs import cost  # noqa: E402
from mmpipe.graphs.backends import Target, Unlowerable, examples_of, lower  # noqa: E402
from mmpipe.graphs.cut import cut  # noqa: E402
from mmpipe.graphs.fuse import fuse  # noqa: E402
from mmpipe.graphs.plan import HEAD, Plan, Segment  # noqa: E402
from mmpipe.graphs.precision import lowered  # noqa: E402
from mmpipe.remembering import known_encoder  # noqa: E402
from mmpipe.runtime.executor import threads_of  # noqa: E402
from mmpipe.tuned import compiled_folder  # noqa: E402

_TIMES = 3  # that a product is run in a round


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def as_captured(pipeline: Pipeline, modality: str) -> tuple[Plan, Segment, fx.GraphModule]:
    """An encoder alone, with none of mmpipe's passes."""
    config = pipeline.config
    settings = next(its for name, its in config.encoders.items() if str(name) == modality)
    encoder = known_encoder(settings, modality, config.source.folder)
    made = cut(fuse([captured_encoder(encoder, modality, {"peer": settings.model})], None, []))
    (segment,) = made.plan.segments
    return made.plan, segment, made.modules[segment.name]


def lowered_by(
    plan: Plan, segment: Segment, module: fx.GraphModule, backend: str, target: Target, inputs: Mapping[str, Tensor]
) -> Callable[[], object]:
    """Raises Unlowerable."""
    values = [inputs[name] for name in (*segment.inputs, *segment.reads)]
    if backend == "onnx":  # ONNX Runtime multiplies nothing shorter on a processor
        target = replace(target, dtype=torch.float32)
    run = lower(backend, segment, module, target, examples_of(plan, segment, target.rows))
    return lambda: run(*values)


def measured(
    pipeline: Pipeline, segment: Segment, backends: Sequence[str], peers: Sequence[str], rows: int, rounds: int
) -> str:
    module, way = pipeline.modules[segment.name], pipeline.resolved
    dtype = getattr(torch, way.segments[segment.name].dtype if segment.name in way.segments else "float32")
    names = (*segment.inputs, *segment.reads)
    inputs = dict(zip(names, examples_of(pipeline.plan, segment, rows), strict=True))
    target = Target(rows, dtype, way.threads, compiled_folder())
    ours = (pipeline.plan, segment, module)
    lines: list[str] = []
    wanted = {backend: (*ours, backend) for backend in backends}
    whole = len([one for one in pipeline.plan.segments if one.branch == segment.branch]) == 1
    if peers and not whole:
        lines.append(f"{segment.name:<10} no peers: they would be given the whole encoder, of which this is a part")
    elif peers:
        theirs = as_captured(pipeline, segment.branch)
        wanted |= {f"peer {backend}": (*theirs, backend) for backend in peers}
    runs: dict[str, Callable[[], object]] = {}
    for name, what in wanted.items():
        try:
            runs[name] = lowered_by(*what, target, inputs)
        except Unlowerable as error:
            lines.append(f"{segment.name:<10} {name:<13} not: {error}")
    products = cost.products(pipeline.plan, segment, lowered(module, dtype), rows)
    calls = [(product.count, call_of(product, lambda tensor: tensor)) for product in products]
    alone: list[float] = []
    times: dict[str, list[float]] = {backend: [] for backend in runs}
    with threads_of(way.threads), torch.inference_mode():
        for number in range(-1, rounds):  # the first warms up
            for backend in random.sample(list(runs), len(runs)):
                spent = seconds(runs[backend])
                if number >= 0:
                    times[backend].append(spent)
            spent = sum(count * min(seconds(call) for _ in range(_TIMES)) for count, call in calls)
            if number >= 0:
                alone.append(spent)
    first = next(iter(times), "")
    for backend, found in times.items():
        share = _told([one / whole for one, whole in zip(alone, found, strict=True)])
        faster = _told([one / whole for one, whole in zip(times[first], found, strict=True)])
        ms = 1e3 * statistics.median(found) / rows
        name = f"{segment.name:<10} {backend:<13}"
        lines.append(f"{name} {ms:8.2f} ms a row   products alone / it: {share}   {first} / it: {faster}")
    return "\n".join(lines)


def _told(ratios: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="a configuration, or the name of a packaged one")
    parser.add_argument("--backends", default="eager,native", help="with commas between")
    parser.add_argument("--peers", default="", help="compilers that get the encoder without mmpipe's passes")
    parser.add_argument("--rounds", type=int, default=21, help="at least 2")
    parser.add_argument("--rows", type=int, default=32, help="of the bucket")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="as mmpipe's")
    options = parser.parse_args(arguments)
    if options.rounds < 2 or options.rows < 1:
        parser.error("at least two rounds, and one row")
    keep_freed_memory()
    with Pipeline.load(options.config, overrides=options.overrides) as pipeline:
        for segment in pipeline.plan.segments:
            if segment.branch != HEAD:
                named = [[name for name in given.split(",") if name] for given in (options.backends, options.peers)]
                print(measured(pipeline, segment, *named, options.rows, options.rounds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
