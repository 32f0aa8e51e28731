"""Do certified exits keep their promise? Thousands of calibrations on populations whose true risk is known.

    python examples/guarantee.py                 # a few minutes on two cores
    python examples/guarantee.py --trials 200

A population is a large table of scores; a calibration sees 3,000 items drawn from it at random (with replacement), and
its thresholds' true risk is their disagreement on the whole table. For each shape, limit ε and level δ the program
prints the share of calibrations whose true risk exceeds ε, with its exact 95% lower limit, which must not exceed δ; and
the true saving against an oracle's, which chooses thresholds (and order) knowing the population. Last, what happens
when the data drift after calibration: the promise fails, as it says it may.
"""

from __future__ import annotations

import argparse
import importlib.resources
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from mmpipe.calibrating.certifying import temperatures_of
from mmpipe.calibrating.scores import Scores, read_scores
from mmpipe.fusion.binomial import lower_limit
from mmpipe.fusion.calibration import Certified, certify, learnt_paths, split
from mmpipe.fusion.thresholds import Exits, threshold_path

ITEMS = 3_000  # of one calibration
POPULATION = 50_000
LIMITS = (0.005, 0.01, 0.02, 0.05)
LEVELS = (0.05, 0.10)
T = TypeVar("T")
Risk = tuple[float, float]  # true risk, true saving


@dataclass(frozen=True)
class Shape:
    """How sure exits are and how often they differ: margins are normal, a sample differs with sigmoid(-margin)."""

    bases: tuple[float, ...]  # mean margin of each exit
    spread: float
    shared: float  # of a margin's spread, and of the luck that decides: 1 is the same sample's for every exit
    overconfident: float = 1.0  # confidence is that of a margin so many times as wide
    surely_wrong: float = 0.0  # share of samples that the first exit gets wrong at the highest confidence


SHAPES = {
    "easy": Shape((4.0, 5.5), 2.0, 0.3),
    "hard": Shape((1.0, 1.8), 1.5, 0.3),
    "correlated": Shape((2.5, 3.2), 2.0, 0.97),
    "eight exits": Shape(tuple(np.linspace(0.5, 4.0, 8)), 2.0, 0.6),
    "overconfident": Shape((2.5, 3.5), 2.0, 0.3, overconfident=2.5, surely_wrong=0.004),
}


def population(shape: Shape, seed: int, noise: float = 0.0) -> Exits:
    """A table of scores. `noise`: added to what decides whether an exit differs, unseen by its confidence: drift."""
    random = np.random.default_rng(seed)
    exits = len(shape.bases)

    def mixed(own_EN: np.ndarray, common_N: np.ndarray) -> np.ndarray:
        return np.sqrt(shape.shared) * common_N + np.sqrt(1 - shape.shared) * own_EN

    margin_EN = np.array(shape.bases)[:, None] + shape.spread * mixed(
        random.normal(size=(exits, POPULATION)), random.normal(size=POPULATION)
    )
    luck_EN = mixed(random.normal(size=(exits, POPULATION)), random.normal(size=POPULATION))
    chance_EN = 0.5 * (1 + torch.erf(torch.from_numpy(luck_EN / np.sqrt(2))).numpy())
    true_EN = margin_EN + noise * random.normal(size=margin_EN.shape)
    differs_EN = chance_EN < 1 / (1 + np.exp(true_EN))
    confidence_EN = 1 / (1 + np.exp(-shape.overconfident * margin_EN))
    wrong_N = random.random(POPULATION) < shape.surely_wrong
    confidence_EN[0, wrong_N], differs_EN[0, wrong_N] = confidence_EN[0].max(), True
    gated_EN = random.random((exits, POPULATION)) >= 0.05  # the modality that it brings is missing
    cost_FN = np.linspace(1, exits + 1, exits + 1)[:, None] * np.ones(POPULATION)
    names = tuple(f"exit {e + 1}" for e in range(exits))
    return Exits(names, confidence_EN.astype(np.float32).astype(np.float64), differs_EN, gated_EN, cost_FN)


def truth(exits: Exits, certified: Certified) -> Risk:
    """Risk and saving of what was certified, on a whole population."""
    if certified.point is None:
        return 0.0, 0.0
    errors_K, saving_K = exits.outcome(certified.path_KE[certified.point, None])
    return float(errors_K[0]) / exits.count, float(saving_K[0])


def oracle(candidates: Sequence[Exits], limit: float) -> float:
    """The saving of the best thresholds that are known to keep the limit."""
    paths = [threshold_path(exits, int(limit * exits.count), 10_000) for exits in candidates]
    return max(
        (float(exits.outcome(path[-1:])[1][0]) for exits, path in zip(candidates, paths, strict=True) if len(path)),
        default=0.0,
    )


def of_shape(name: str, trial: int, drifted: float = 0.0) -> dict[tuple[float, float], Risk]:
    """One calibration on a synthetic population → its truth for each (limit, level)."""
    whole = _once(f"{name}/0", lambda: population(SHAPES[name], 1))
    judged = whole if not drifted else _once(f"{name}/{drifted}", lambda: population(SHAPES[name], 2, drifted))
    drawn = whole.rows(np.random.default_rng([trial, 7]).integers(0, whole.count, ITEMS))
    parts, found = split(ITEMS, trial), {}
    for limit in LIMITS:
        paths = learnt_paths([drawn], parts, limit)
        for level in LEVELS:
            made = certify([drawn], parts, max_disagreement=limit, certainty=1 - level, paths=paths)
            found[limit, level] = truth(judged, made)
    return found


def products() -> Scores:
    """The packaged held-out scores of quickstart."""
    folder = Path(str(importlib.resources.files("mmpipe.configs")))
    return _once("products", lambda: read_scores(folder / "quickstart" / "scores.safetensors"))


def of_products(trial: int) -> dict[tuple[float, float], Risk]:
    """The same on quickstart's held-out scores: temperatures and all six orders, as `mmpipe calibrate` has them."""
    whole = products()
    rows = torch.from_numpy(np.random.default_rng([trial, 7]).integers(0, whole.count, ITEMS))
    drawn = taken(whole, rows)
    parts, found = split(ITEMS, trial), {}
    temperatures = temperatures_of(drawn, parts)
    sequences = list(drawn.sequences())
    candidates = [drawn.exits(sequence, temperatures, "max_probability") for sequence in sequences]
    everything: dict[int, Exits] = {}
    for limit in LIMITS:
        paths = learnt_paths(candidates, parts, limit)
        for level in LEVELS:
            made = certify(candidates, parts, max_disagreement=limit, certainty=1 - level, paths=paths)
            if made.order not in everything:
                everything[made.order] = whole.exits(sequences[made.order], temperatures, "max_probability")
            found[limit, level] = truth(everything[made.order], made)
    return found


def taken(scores: Scores, rows: torch.Tensor) -> Scores:
    return replace(
        scores,
        logits={name: logits_NL[rows] for name, logits_NL in scores.logits.items()},
        present_NM=scores.present_NM[rows],
        full_N=scores.full_N[rows],
        truth_N=scores.truth_N[rows],
    )


_KEPT: dict[str, object] = {}


def _once(name: str, make: Callable[[], T]) -> T:
    if name not in _KEPT:
        _KEPT[name] = make()
    return _KEPT[name]  # type: ignore[return-value]


def lines(name: str, results: Sequence[dict[tuple[float, float], Risk]], best: dict[float, float]) -> Iterator[str]:
    trials = len(results)
    for limit in LIMITS:
        for level in LEVELS:
            risks = np.array([result[limit, level] for result in results])
            broken = int((risks[:, 0] > limit).sum())
            low = lower_limit(broken, trials, 0.05)
            saving, none = float(risks[:, 1].mean()), float((risks[:, 1] == 0).mean())
            ratio = saving / best[limit] if best[limit] else float("nan")
            verdict = "kept" if low <= level else "BROKEN"
            yield (
                f"{name:<14} {limit:>5.1%} {level:>4.0%}  {broken / trials:>7.2%} {low:>7.2%}  {verdict:<6}"
                f"  {saving:>6.1%} {best[limit]:>6.1%} {ratio:>6.2f}  {none:>6.1%}"
            )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2_000, help="calibrations of each shape")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", help="shapes (or products, drift); default: all")
    options = parser.parse_args(arguments)
    print("shape          limit level   broken   low.95  verdict saving oracle  ratio  uncertified")
    failed = False
    with multiprocessing.get_context("spawn").Pool(options.jobs, torch.set_num_threads, (1,)) as pool:
        for name in (*SHAPES, "products"):
            if options.only and name not in options.only:
                continue
            began = time.perf_counter()
            work = of_products if name == "products" else partial(of_shape, name)
            results = pool.map(work, range(options.trials), chunksize=20)
            if name == "products":
                scores = products()
                tempers = temperatures_of(scores, split(scores.count, share=1.0))
                candidates = [scores.exits(one, tempers, "max_probability") for one in scores.sequences()]
            else:
                candidates = [population(SHAPES[name], 1)]
            for line in lines(name, results, {limit: oracle(candidates, limit) for limit in LIMITS}):
                failed |= "BROKEN" in line
                print(line)
            print(f"{'':<14} {options.trials:,} calibrations, {time.perf_counter() - began:.0f} s", flush=True)
        if not options.only or "drift" in options.only:
            print("\nDrift after calibration (noisier exits, as sure as before): no promise holds")
            name = "easy"
            results = pool.map(partial(of_shape, name, drifted=2.0), range(options.trials // 4), chunksize=20)
            best = {limit: oracle([population(SHAPES[name], 2, 2.0)], limit) for limit in LIMITS}
            print("\n".join(lines("easy, drifted", results, best)))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
