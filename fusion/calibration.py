"""Exits that keep their promise: temperatures, the order and thresholds from one split, the test on another.

    risk   share of ALL samples whose early answer differs from the full pipeline's
    claim  P(risk of what is returned ≤ max_disagreement) ≥ certainty, over the draw of the samples

Learn then Test with one fixed sequence. Temperatures, the order of the modalities and the whole path of threshold
vectors are functions of the learn split alone. The test split, independent of it, tests the path's points in order,
from conservative down, each by an exact binomial p-value of "its risk exceeds max_disagreement", and stops at the first
that doesn't reach the level. On a fixed path the first point that breaks the promise passes with a probability of at
most 1 - certainty, and nothing after it is tested unless it does: so no further correction is needed, for several exits
(one path runs over the whole vector, and risk counts every sample once, wherever it left) or for several orders (one is
chosen before the test). Risk need not be monotone. Certified points hold together, so the one that saves most may be
picked by any data.

Source: Angelopoulos, Bates, Candès, Jordan, Lei, "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk
Control" (2021), fixed-sequence testing.

Shapes: E exit, N sample, L label, K point of the path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmpipe.fusion.binomial import items_for, least_items, lower_limit, most_errors, p_value, upper_limit
from mmpipe.fusion.thresholds import Bools, Exits, Floats, Rows, threshold_path

LEARN_SHARE = 0.4  # of the samples; the larger part decides how close to the limit one may go
_BEYOND = 1.5  # how far past the limit the path goes on the learn split: the test is to stop it, not its end
_HOTTEST, _COLDEST = 10.0, 0.2  # temperatures


class CalibrationError(ValueError):
    """What was given can't be calibrated on. The message says why."""


@dataclass(frozen=True)
class Split:
    """Rows to learn from and rows to test on: they share none."""

    learn: Rows
    test: Rows


@dataclass(frozen=True)
class Certified:
    """The outcome of one calibration. `point` None: nothing could be certified, and no sample may leave early."""

    order: int  # which of the candidates was chosen, on the learn split
    exits: Exits  # that candidate, all samples
    split: Split
    max_disagreement: float
    certainty: float
    path_KE: Floats
    errors_K: Rows  # on the test split
    saving_K: Floats  # on the test split
    passed: int  # points of the path that are certified: the first ones
    point: int | None  # index into the path

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One for each exit; infinite where nobody leaves."""
        if self.point is None:
            return (math.inf,) * len(self.exits.names)
        return tuple(float(value) for value in self.path_KE[self.point])

    @property
    def observed(self) -> float:
        """Share of the test samples whose early answer differs."""
        return 0.0 if self.point is None else float(self.errors_K[self.point]) / len(self.split.test)

    @property
    def saving(self) -> float:
        return 0.0 if self.point is None else float(self.saving_K[self.point])

    def needed(self) -> int | None:
        """About how many samples would certify something; None: at this rate of errors, no number would."""
        level = 1.0 - self.certainty
        rate = 0.0
        if len(self.path_KE):
            together = np.concatenate([self.split.test, self.split.learn])
            errors, count = int(self.exits.rows(together).outcome(self.path_KE[:1])[0][0]), len(together)
            if lower_limit(errors, count, level) >= self.max_disagreement:
                return None
            rate = min(errors / count, self.max_disagreement / 2)  # few items: so many errors may be chance
        items = items_for(rate, self.max_disagreement, level)
        return None if items is None else math.ceil(items / (1 - LEARN_SHARE))


def split(count: int, seed: int = 0, share: float = LEARN_SHARE) -> Split:
    """`count` samples at random into two parts."""
    order = np.random.default_rng(seed).permutation(count)
    cut = round(share * count)
    return Split(np.sort(order[:cut]), np.sort(order[cut:]))


def temperature(logits_NL: Tensor, labels_N: Tensor) -> float:
    """The temperature under which the labels are likeliest, between 0.2 and 10; 1 for no rows.

    The likelihood is concave in 1 / temperature, so its slope tells on which side the best lies.
    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks" (2017).
    """
    finite_N = torch.isfinite(logits_NL).all(dim=1)
    logits_NL, labels_N = logits_NL[finite_N].double(), labels_N[finite_N]
    if not len(labels_N):
        return 1.0
    of_label_N = logits_NL.gather(1, labels_N[:, None]).squeeze(1)
    low, high = 1.0 / _HOTTEST, 1.0 / _COLDEST
    for _ in range(28):  # to a part in 10⁷
        middle = math.sqrt(low * high)
        expected_N = (torch.softmax(logits_NL * middle, dim=1) * logits_NL).sum(dim=1)
        rising = float((of_label_N - expected_N).mean()) > 0
        low, high = (middle, high) if rising else (low, middle)
    return 1.0 / math.sqrt(low * high)


def learnt_paths(candidates: Sequence[Exits], parts: Split, max_disagreement: float, points: int = 64) -> list[Floats]:
    """A path of thresholds [K, E] for each candidate, from the learn split alone."""
    most = math.ceil(_BEYOND * max_disagreement * len(parts.learn))
    return [threshold_path(candidate.rows(parts.learn), most, points) for candidate in candidates]


def certify(
    candidates: Sequence[Exits],
    parts: Split,
    *,
    max_disagreement: float,
    certainty: float,
    paths: Sequence[Floats] | None = None,
) -> Certified:
    """Choose a candidate and its path on the learn split, test the path on the other.

    `candidates`: sequences of exits (one for each order of the modalities), over the same samples. `paths`: as
    `learnt_paths` made them of these candidates and parts, where they are at hand. Raises CalibrationError for shares
    that aren't between 0 and 1, and where the splits share rows.
    """
    if not (0.0 < max_disagreement < 1.0 and 0.0 < certainty < 1.0):
        raise CalibrationError(f"max disagreement {max_disagreement} and certainty {certainty} lie between 0 and 1")
    if np.intersect1d(parts.learn, parts.test).size:
        raise CalibrationError("the splits to learn from and to test on share samples: the test would prove nothing")
    if not candidates:
        raise CalibrationError("no sequence of exits to choose from")
    level = 1.0 - certainty
    paths = learnt_paths(candidates, parts, max_disagreement) if paths is None else paths
    order = _best(candidates, paths, parts, max_disagreement, level)
    exits, path_KE = candidates[order], paths[order]
    test = exits.rows(parts.test)
    errors_K, saving_K = test.outcome(path_KE)
    passed = fixed_sequence(errors_K, len(parts.test), max_disagreement, level)
    point = int(np.argmax(saving_K[:passed])) if passed and saving_K[:passed].max() > 0 else None
    return Certified(order, exits, parts, max_disagreement, certainty, path_KE, errors_K, saving_K, passed, point)


def fixed_sequence(errors_K: Sequence[int] | Rows, n: int, limit: float, level: float) -> int:
    """How many hypotheses "the rate of point k exceeds limit" are rejected: in order, until the first that isn't."""
    for passed, errors in enumerate(errors_K):
        if p_value(int(errors), n, limit) > level:
            return passed
    return len(errors_K)


def _best(candidates: Sequence[Exits], paths: Sequence[Floats], parts: Split, limit: float, level: float) -> int:
    """The candidate that saves most at the errors that the test will allow: judged on the learn split alone."""
    tested = len(parts.test)
    allowed = len(parts.learn) * max(most_errors(tested, limit, level), 0) / max(tested, 1)

    def saved(number: int) -> float:
        errors_K, saving_K = candidates[number].rows(parts.learn).outcome(paths[number])
        return float(saving_K[errors_K <= allowed].max(initial=0.0))

    return max(range(len(candidates)), key=saved)


@dataclass(frozen=True)
class AccuracyLoss:
    """What leaving early costs in accuracy, on the test samples whose true label is known."""

    items: int
    lost: int  # the full pipeline was right, the early answer wrong
    won: int  # the other way round
    bound: float  # upper confidence limit of the share lost less the share won
    certainty: float

    @property
    def observed(self) -> float:
        return (self.lost - self.won) / self.items


def accuracy_loss(certified: Certified, right_FN: Bools, known_N: Bools) -> AccuracyLoss | None:
    """The loss of accuracy at the certified point, with an upper limit. A statement beside the promise, at the same
    certainty of its own: the promise spends none of its level on it.

    `right_FN` [E + 1, N]: whether each exit's label, the full pipeline's last, is the true one; `known_N`: whether that
    is known. Paired: only samples that change count. Exact limits (Clopper-Pearson) of both shares; since the point was
    picked by the test split, the level is shared among all points of the path and the two limits (Bonferroni). That
    alone is never better than the promise, which bounds the loss as well: no more answers are lost than differ.
    """
    rows = certified.split.test[known_N[certified.split.test]]
    if certified.point is None or not len(rows):
        return None
    exits = certified.exits.rows(rows)
    at_N = exits.leaving(certified.path_KE[certified.point, None])[0]
    early_N = np.take_along_axis(right_FN[:, rows], at_N[None], axis=0)[0]
    full_N = right_FN[-1, rows]
    lost, won, n = int((full_N & ~early_N).sum()), int((early_N & ~full_N).sum()), len(rows)
    level = (1.0 - certified.certainty) / (2 * len(certified.path_KE))
    bound = upper_limit(lost, n, level) - lower_limit(won, n, level)
    return AccuracyLoss(n, lost, won, bound, certified.certainty)


@dataclass(frozen=True)
class ClassRisk:
    """Disagreement among the test samples of one class; the interval is two-sided, of this class alone."""

    label: int  # as the full pipeline has it
    items: int
    errors: int
    low: float
    high: float


def worst_classes(certified: Certified, full_N: Rows, certainty: float = 0.95) -> list[ClassRisk]:
    """Per class that the full pipeline predicts, how often leaving early changes it; the worst first. No promise."""
    if certified.point is None:
        return []
    rows = certified.split.test
    exits = certified.exits.rows(rows)
    at_N = exits.leaving(certified.path_KE[certified.point, None])[0]
    wrong_N = np.take_along_axis(exits.differs_FN(), at_N[None], axis=0)[0]
    level, found = (1.0 - certainty) / 2, []
    for label in np.unique(full_N[rows]):
        of_class = full_N[rows] == label
        n, errors = int(of_class.sum()), int(wrong_N[of_class].sum())
        found.append(ClassRisk(int(label), n, errors, lower_limit(errors, n, level), upper_limit(errors, n, level)))
    return sorted(found, key=lambda one: (-one.errors / one.items, -one.items))


__all__ = [
    "AccuracyLoss",
    "CalibrationError",
    "Certified",
    "ClassRisk",
    "Exits",
    "Split",
    "accuracy_loss",
    "certify",
    "fixed_sequence",
    "least_items",
    "split",
    "temperature",
    "worst_classes",
]
