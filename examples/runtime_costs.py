"""What running a plan costs beyond its segments, measured side by side, in interleaved pairs.

    python examples/runtime_costs.py quickstart
    python examples/full_size.py MODELS && python examples/runtime_costs.py MODELS/clip_clap.yaml --rows 1 8

prints, for each number of rows a bucket: how long the proofs take, how close scratch is to the least that any plan
could need, what orchestration adds to the bare segments, the schedules against one another and against the modules
called one after the other, what observers cost, and whether memory stays flat. Ratios with their spread; times drift,
ratios less.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from mmpipe import MediaError, Pipeline, Sample, media
from mmpipe.encoders import load as load_encoder
from mmpipe.explain.collect import made_up
from mmpipe.fusion.checkpoint import load_head, read_checkpoint
from mmpipe.fusion.heads import ZeroShotHead
from mmpipe.graphs import memory
from mmpipe.graphs.backends import Target, lower
from mmpipe.graphs.check import check
from mmpipe.graphs.plan import PRESENCE, Plan
from mmpipe.loading import keep_freed_memory
from mmpipe.placing import resolve
from mmpipe.resolved import placed
from mmpipe.runtime.executor import Executor
from mmpipe.runtime.lanes import Watch
from mmpipe.runtime.measure import MadeUp, plausible

T_95 = {20: 1.729, 30: 1.699, 40: 1.685}  # one-sided, pairs - 1 degrees of freedom


def executor(pipeline: Pipeline, plan: Plan, threads: int, watches: dict[str, Watch] | None = None) -> Executor:
    lowered = {
        s.name: lower("eager", s, pipeline.modules[s.name], Target(plan.stage_plans[0].rows)) for s in plan.segments
    }

    def never(exit_index: int, logits_RL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        probabilities_RL = logits_RL.softmax(-1)
        last = exit_index == len(plan.exits) - 1
        leaves_R = torch.full((len(logits_RL),), last)
        return probabilities_RL, probabilities_RL.amax(-1), leaves_R

    return Executor(plan, lowered, threads=threads, gate=never if plan.exits else None, watches=watches)


@contextlib.contextmanager
def threads_of(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def whole(runner: Executor, buckets: int) -> Callable[[], None]:
    """A run of full buckets of samples that have everything."""
    rows = runner.plan.stage_plans[0].rows * buckets
    present_NM = torch.ones(rows, len(runner.plan.branches), dtype=torch.bool)
    feed = MadeUp(runner)
    return lambda: void(runner.run(present_NM, feed))


def bare(pipeline: Pipeline, plan: Plan, buckets: int, threads: int) -> Callable[[], None]:
    """The same segments on the same numbers, called one after the other: no rows, no slots, no streams, no gate."""
    rows = plan.stage_plans[0].rows
    known = {value.name: torch.stack([plausible(value)] * rows) for value in plan.values}
    known[PRESENCE] = torch.ones(rows, len(plan.branches), dtype=torch.bool)
    lowered = {
        segment.name: lower("eager", segment, pipeline.modules[segment.name], Target(rows)) for segment in plan.segments
    }

    def run() -> None:
        with threads_of(threads):
            for _ in range(buckets):
                for segment in plan.segments:
                    arguments = [known[name] for name in (*segment.inputs, *segment.reads)]
                    known.update(zip(segment.writes, lowered[segment.name](*arguments), strict=True))

    return run


def one_by_one(pipeline: Pipeline, samples: Sequence[Sample], rows: int) -> Callable[[], None]:
    """What a script does: decode, prepare, call each encoder's own module, one after the other, then the head's."""
    made = {}
    base = pipeline.config.source.folder
    for modality, its in pipeline.config.encoders.items():
        limits = {"max_tokens": its.max_tokens, "max_seconds": its.max_seconds, "options": its.options}
        made[modality] = load_encoder(its.model, modality, weights=its.weights, base=base, **limits)
    dims = {modality: encoder.dim for modality, encoder in made.items()}
    head = head_of(pipeline, dims).eval()

    def some(samples: Sequence[Sample]) -> None:
        tables = {modality: torch.zeros(len(samples), dim) for modality, dim in dims.items()}
        presence_NM = torch.zeros(len(samples), len(dims), dtype=torch.bool)
        for column, (modality, encoder) in enumerate(made.items()):
            prepared, numbers = [], []
            for number, sample in enumerate(samples):
                if modality in sample.media:
                    with contextlib.suppress(MediaError):  # the demo has two broken files
                        prepared.append(encoder.prepare(media.load(modality, sample.media[modality])))
                        numbers.append(number)
            if prepared:
                inputs = {name: torch.stack([row[name] for row in prepared]) for name in prepared[0]}
                tables[modality][numbers] = encoder.module(**inputs)
                presence_NM[numbers, column] = True
        probabilities_NL = head(tables, presence_NM).softmax(-1)
        for number, (confidence, label) in enumerate(zip(*probabilities_NL.max(-1), strict=True)):
            found.append((samples[number].id, pipeline.labels[int(label)], float(confidence)))

    found: list[tuple[str, str, float]] = []

    def run() -> None:
        found.clear()
        with torch.inference_mode():
            for start in range(0, len(samples), rows):
                some(samples[start : start + rows])

    return run


def head_of(pipeline: Pipeline, dims: dict[str, int]) -> torch.nn.Module:
    """The configuration's own head; prompts cost nothing later, so any prototypes do."""
    fusion = pipeline.config.fusion
    if fusion.head == "zero_shot":
        torch.manual_seed(0)
        return ZeroShotHead({name: torch.randn(len(pipeline.labels), dim) for name, dim in dims.items()})
    checkpoint = read_checkpoint(pipeline.config.resolve(fusion.checkpoint)) if fusion.checkpoint else None
    base = pipeline.config.source.folder
    return load_head(fusion.head, dims, pipeline.labels, checkpoint=checkpoint, options=fusion.options, base=base)


def void(value: object) -> None:
    del value


def pairs(one: Callable[[], None], other: Callable[[], None], count: int) -> list[tuple[float, float]]:
    """Seconds of both, in turn: A B, B A, A B, …, after a run of each that warms up."""
    one(), other()
    found = []
    for number in range(count):
        seconds = {}
        for run in (one, other) if number % 2 == 0 else (other, one):
            began = time.perf_counter()
            run()
            seconds[run] = time.perf_counter() - began
        found.append((seconds[one], seconds[other]))
    return found


def ratio(found: Sequence[tuple[float, float]]) -> str:
    ratios = sorted(a / b for a, b in found)
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    return f"{statistics.median(ratios):.3f} (80% of pairs {low:.3f}–{high:.3f})"


def upper_bound(values: Sequence[float]) -> float:
    """One-sided 95% bound of the mean."""
    t = min((value for size, value in T_95.items() if size <= len(values)), default=2.0)
    return statistics.mean(values) + t * statistics.stdev(values) / len(values) ** 0.5


def proofs(pipeline: Pipeline, plan: Plan) -> None:
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        check(plan)
        seconds.append(time.perf_counter() - began)
    print(f"  proofs: {min(seconds) * 1e3:.2f} ms for {sum(len(s.steps) for s in plan.stage_plans)} steps")
    for stage_plan in plan.stage_plans:
        least = memory.lower_bound(stage_plan.steps, stage_plan.buffers)
        apart = sum(memory.aligned(b.bytes) for b in stage_plan.buffers if b.home == "scratch")
        size = stage_plan.scratch_bytes
        shared = f"{size / least:.2f} × the lower bound; without sharing {apart / size:.2f} × as much"
        print(f"  scratch of {stage_plan.name}: {size:,} bytes = {shared}")


def orchestration(pipeline: Pipeline, plan: Plan, threads: int, buckets: int, count: int) -> None:
    with contextlib.closing(executor(pipeline, plan, threads)) as runner:
        found = pairs(whole(runner, buckets), bare(pipeline, plan, buckets, threads), count)
    segments = buckets * len(plan.segments)
    extra = [a / b - 1 for a, b in found]
    each = [1e3 * (a - b) / segments for a, b in found]
    bound = f"95% upper bound of the mean {upper_bound(extra):+.1%}"
    over = f"{statistics.median(extra):+.1%} over the bare segments ({bound})"
    a_segment = f"{statistics.median(each):.3f} ms a segment (upper bound {upper_bound(each):.3f})"
    print(f"  orchestration: {over}, {a_segment}; {count} pairs of {buckets} buckets")


def schedules(pipeline: Pipeline, samples: Sequence[Sample], rows: int, count: int) -> None:
    """The same samples by each schedule, exits as configured: in batches, or one call after the other."""
    runs: dict[str, Callable[[], None]] = {"modules one by one": one_by_one(pipeline, samples, rows)}
    with contextlib.ExitStack() as stack:
        for name in ("cascade", "parallel", "auto"):
            runtime = pipeline.config.runtime.model_copy(update={"schedule": name})
            made = stack.enter_context(Pipeline(pipeline.config.model_copy(update={"runtime": runtime})))
            runs[name] = calls(made, samples) if rows == 1 else partial(made.predict, samples)
            runs[name]()
            runs[name]()  # the second time, single calls know how samples leave
            chosen = made.runners.resolved("call" if rows == 1 else "batch")
            how = f"streams {chosen.streams}, lanes {chosen.lanes}, threads {chosen.threads}"
            print(f"    {name}: {chosen.schedule}, {how}: {chosen.reasons['schedule']}")
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(count):
            for name in list(runs) if number % 2 == 0 else list(reversed(runs)):
                began = time.perf_counter()
                runs[name]()
                times[name].append(time.perf_counter() - began)
    best = min(("cascade", "parallel"), key=lambda name: statistics.median(times[name]))
    for name, values in times.items():
        print(f"    {name:<20} {statistics.median(values) * 1e3 / len(samples):9.2f} ms a sample")
    print(f"  auto ÷ the better schedule ({best}): {ratio(list(zip(times['auto'], times[best], strict=True)))}")
    print(f"  auto ÷ modules one by one: {ratio(list(zip(times['auto'], times['modules one by one'], strict=True)))}")


def calls(pipeline: Pipeline, samples: Sequence[Sample]) -> Callable[[], None]:
    def run() -> None:
        for sample in samples:
            pipeline(**sample.media)

    return run


def observers(pipeline: Pipeline, plan: Plan, threads: int, buckets: int, count: int) -> None:
    watches = {segment.name: Watch((), lambda rows, values: None) for segment in plan.segments}
    with (
        contextlib.closing(executor(pipeline, plan, threads, watches)) as seen,
        contextlib.closing(executor(pipeline, plan, threads)) as unseen,
    ):
        found = pairs(whole(seen, buckets), whole(unseen, buckets), count)
    bound = upper_bound([a / b for a, b in found])
    print(f"  observers on every segment ÷ none: {ratio(found)}, 95% upper bound of the mean {bound:.3f}")


def flat(pipeline: Pipeline, plan: Plan, threads: int, batches: int) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    with contextlib.closing(executor(pipeline, plan, threads)) as runner:
        run, seen = whole(runner, 10), []
        for _ in range(batches // 10):
            run()
            seen.append(resident())
    at = ", ".join(f"{seen[len(seen) * n // 10 - 1] / 1e6:.1f} MB after {batches * n // 10}" for n in (1, 5, 10))
    print(f"  resident: {at} batches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32], help="buckets to measure")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--buckets", type=int, default=2, help="full buckets a run")
    parser.add_argument("--samples", type=int, default=64, help="for the schedules")
    parser.add_argument("--batches", type=int, default=2000, help="for flat memory; 0 leaves it out")
    options = parser.parse_args()
    keep_freed_memory()  # else the same executor made twice differs by a tenth: arenas of threads
    # every pass computes: what is known from the pass before would cost nothing
    with Pipeline.load(options.config, overrides=["runtime.cache=off"], say=print) as pipeline:
        given = pipeline.config.input.folder is not None
        samples = list(pipeline.find().samples)[: options.samples] if given else made_up(pipeline, options.samples)
        for rows in options.rows:
            print(f"{options.config}, {rows} rows a bucket, {torch.get_num_threads()} threads")
            runtime = pipeline.config.runtime.model_copy(update={"batch_size": rows})
            config = pipeline.config.model_copy(update={"runtime": runtime})
            chosen = resolve(config, pipeline.runners.cut, pipeline.runners.device)
            plan = placed(pipeline.runners.cut.plan, chosen)
            proofs(pipeline, plan)
            orchestration(pipeline, plan, chosen.threads, options.buckets, options.pairs)
            print(f"  schedules, {options.samples} samples" + (", one call each" if rows == 1 else ""))
            schedules(pipeline, samples, rows, options.pairs)
            observers(pipeline, plan, chosen.threads, options.buckets, options.pairs)
        if options.batches:
            flat(pipeline, plan, chosen.threads, options.batches)


if __name__ == "__main__":
    main()
