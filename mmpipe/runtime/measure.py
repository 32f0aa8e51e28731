"""How long a plan takes on this machine: real runs over made-up rows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mmpipe.graphs.plan import HEAD, Value
from mmpipe.runtime.executor import Executor
from mmpipe.runtime.ledger import Gate
from mmpipe.runtime.pool import MediaRows

PASSES, BUCKETS_A_LANE = 3, 2  # of seconds_a_bucket; the first pass warms up
_LEAST_RUNS, _MOST_RUNS = 2, 20
_BUDGET_SECONDS = 0.05  # for one plan, after the run that warms it up


class MadeUp:
    """A feed that needs no files: the same plausible numbers for every row."""

    def __init__(self, executor: Executor) -> None:
        self.values = {value.name: value for value in executor.plan.values}

    def open(self, branch: str, media: MediaRows) -> _MadeUpSource:
        """One branch's."""
        inputs = {name: plausible(self.values[f"{branch}.{name}"]) for name in media.tables}
        return _MadeUpSource(media, inputs)

    def computing(self) -> None:
        """Nothing is decoded."""

    def close(self) -> None:
        """Nothing is at work."""


class _MadeUpSource:
    def __init__(self, media: MediaRows, inputs: Mapping[str, Tensor]) -> None:
        self.media, self.inputs = media, inputs

    def put(self, rows: Iterable[int]) -> None:
        pass

    def ready(self) -> bool:
        return self.media.has_free()

    def get(self) -> int:
        slot = self.media.take()
        self.media.fill(slot, self.inputs)
        return slot

    def unstarted(self) -> int:
        return 0

    def drop(self) -> None:
        pass


def plausible(value: Value) -> Tensor:
    """One row: ones for whole numbers (token ids, masks), noise for others: zeros would be computed too fast."""
    make = torch.Generator().manual_seed(0)
    if value.dtype.is_floating_point:
        return torch.randn(value.shape, generator=make).to(value.dtype)
    if value.dtype == torch.uint8:
        return torch.randint(0, 256, value.shape, generator=make, dtype=torch.uint8)
    return torch.ones(value.shape, dtype=value.dtype)


def seconds_to_exits(executor: Executor) -> list[float]:
    """Seconds from the start of one full bucket to the answer of each exit, when no row leaves before the last.

    The fastest of a few runs; what else the machine does only ever adds.
    """
    rows = executor.plan.stage_plans[0].rows
    present_NM = torch.ones(rows, len(executor.plan.branches), dtype=torch.bool)
    feed = MadeUp(executor)
    executor.run(present_NM, feed)
    runs: list[list[float]] = []
    spent = 0.0
    while len(runs) < _LEAST_RUNS or (spent < _BUDGET_SECONDS and len(runs) < _MOST_RUNS):
        began = time.perf_counter()
        spans = executor.run(present_NM, feed).spans
        ended = time.perf_counter()
        answers = {span.step: span.end - began for span in spans if span.step.startswith(f"out:{HEAD}@")}
        runs.append([*sorted(answers.values())[:-1], ended - began])
        spent += ended - began
    return [min(times) for times in zip(*runs, strict=True)]


def expected_seconds(seconds: Sequence[float], shares: Sequence[float] | None) -> float:
    """The mean time to an answer, where `shares` leave at each exit; None: not known, as many at each."""
    if shares is None or len(shares) != len(seconds) or sum(shares) <= 0:
        shares = [1.0] * len(seconds)
    return sum(share * time for share, time in zip(shares, seconds, strict=True)) / sum(shares)


def seconds_a_bucket(executor: Executor) -> float:
    """Seconds for each bucket with all lanes busy: throughput. The gate of the executor says who leaves."""
    plan = executor.plan
    buckets = BUCKETS_A_LANE * plan.lanes
    present_NM = torch.ones(plan.stage_plans[0].rows * buckets, len(plan.branches), dtype=torch.bool)
    feed, times = MadeUp(executor), []
    for _ in range(PASSES):
        began = time.perf_counter()
        executor.run(present_NM, feed)
        times.append(time.perf_counter() - began)
    return min(times[1:]) / buckets


def leaving(shares: Sequence[float] | None, exits: int) -> Gate:
    """A gate that lets these shares of all samples leave at each exit, whatever they look like. None: not known, as
    many at each."""
    known = shares if shares is not None and len(shares) == exits and sum(shares) > 0 else [1.0] * exits

    def decide(exit_index: int, logits_RL: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        left, count = sum(known[exit_index:]), len(logits_RL)
        if exit_index < exits - 1:
            count = round(count * known[exit_index] / left) if left > 0 else 0
        leaves_R = torch.zeros(len(logits_RL), dtype=torch.bool)
        leaves_R[:count] = True
        return logits_RL, logits_RL.amax(dim=1), leaves_R

    return decide
