"""What a fitted head is worth, on samples that neither trained nor chose anything, and what it has to beat.

Shapes: N sample of the test part, L label, E exit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from mmpipe.fitting.embedding import Embedded
from mmpipe.fitting.splitting import Split
from mmpipe.fitting.training import Fitted, exit_probabilities, full_probabilities, gated, subsets
from mmpipe.fusion import gate
from mmpipe.fusion.baselines import baselines
from mmpipe.fusion.binomial import lower_limit, upper_limit
from mmpipe.fusion.items import Items

BINS = 10
LEVEL = 0.025  # each side of an interval: 95%


@dataclass(frozen=True)
class Score:
    """How many of how many were right."""

    right: int
    count: int

    @property
    def accuracy(self) -> float:
        return self.right / self.count if self.count else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95%, exact binomial (Clopper and Pearson)."""
        if not self.count:
            return 0.0, 1.0
        return lower_limit(self.right, self.count, LEVEL), upper_limit(self.right, self.count, LEVEL)


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy in `BINS` equal bins of confidence."""

    counts: tuple[int, ...]
    confidences: tuple[float, ...]  # the mean in each bin; NaN where it is empty
    accuracies: tuple[float, ...]

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance of the two, over samples."""
        total = sum(self.counts)
        gaps = zip(self.counts, self.confidences, self.accuracies, strict=True)
        return sum(n * abs(sure - right) for n, sure, right in gaps if n) / total if total else float("nan")


@dataclass(frozen=True)
class Compared:
    """A baseline on the test part. `better`, `worse`: samples that only the head, or only the baseline, got right."""

    name: str
    score: Score
    better: int
    worse: int

    @property
    def p_value(self) -> float:
        """Two-sided sign test of the samples on which the two differ."""
        n = self.better + self.worse
        tail = sum(comb(n, k) for k in range(max(self.better, self.worse), n + 1)) / 2**n
        return float(min(1.0, 2 * tail))


@dataclass(frozen=True)
class Seen:
    """The head with a set of modalities, on the test samples that have all of it."""

    name: str
    score: Score
    reliability: Reliability


@dataclass(frozen=True)
class Left:
    """An exit on the test part: `gated` looked at there, `left` of them left, `differ` of those not as in full."""

    name: str
    threshold: float | None
    gated: int
    left: int
    differ: int
    score: Score  # of all that were looked at, whether they left or not
    reliability: Reliability


@dataclass(frozen=True)
class Measured:
    """All of it."""

    full: Score
    balanced: float  # mean over labels of their accuracy
    with_exits: Score
    confusion: tuple[tuple[int, ...], ...]  # [true][answered]
    reliability: Reliability
    subsets: tuple[Seen, ...]
    exits: tuple[Left, ...]
    baselines: tuple[Compared, ...]


def measure(fitted: Fitted, embedded: Embedded, split: Split, labels: Sequence[str], confidence: str) -> Measured:
    """Answer the test part in every way there is."""
    test, classes = embedded.items.rows(split.test), len(labels)
    states = {name: state[split.test] for name, state in embedded.states.items()}
    full_NL = full_probabilities(fitted.head, test)
    answer_N, truth_N = full_NL.argmax(dim=1), test.labels_N
    confusion_LL = torch.zeros(classes, classes, dtype=torch.long)
    confusion_LL.index_put_((truth_N, answer_N), torch.ones_like(truth_N), accumulate=True)
    by_label_L = confusion_LL.diag() / confusion_LL.sum(dim=1).clamp_min(1)
    exits, exited_N = _exits(fitted, test, states, answer_N, confidence)
    return Measured(
        full=_score(answer_N, truth_N),
        balanced=float(by_label_L[confusion_LL.sum(dim=1) > 0].mean()),
        with_exits=_score(exited_N, truth_N),
        confusion=tuple(tuple(row) for row in confusion_LL.tolist()),
        reliability=_reliability(full_NL, truth_N, confidence),
        subsets=tuple(_seen(fitted, test, names, confidence) for names in subsets(list(test.embeddings))),
        exits=exits,
        baselines=tuple(_baselines(fitted, embedded.items, split, answer_N, classes)),
    )


def _score(answer_N: Tensor, truth_N: Tensor) -> Score:
    return Score(int((answer_N == truth_N).sum()), len(truth_N))


def _seen(fitted: Fitted, test: Items, names: Sequence[str], confidence: str) -> Seen:
    columns = [list(test.embeddings).index(name) for name in names]
    those = test.rows(torch.nonzero(test.presence_NM[:, columns].all(dim=1)).squeeze(1)).seeing(names)
    p_NL = full_probabilities(fitted.head, those)
    return Seen(
        "+".join(names), _score(p_NL.argmax(dim=1), those.labels_N), _reliability(p_NL, those.labels_N, confidence)
    )


def _exits(
    fitted: Fitted, test: Items, states: Mapping[str, Tensor], full_N: Tensor, confidence: str
) -> tuple[tuple[Left, ...], Tensor]:
    """Each exit with its threshold, in order; and what the pipeline with exits answers."""
    answer_N, waiting_N = full_N.clone(), torch.ones(len(test), dtype=torch.bool)
    gated_EN, found = gated(fitted.exits, test), []
    for e, (exit_, threshold) in enumerate(zip(fitted.exits, fitted.thresholds, strict=True)):
        p_NL = exit_probabilities(exit_, fitted.head, fitted.probes, test, states)
        label_N, looked_N = p_NL.argmax(dim=1), waiting_N & gated_EN[e]
        going_N = torch.zeros_like(waiting_N)
        if threshold is not None:
            going_N = looked_N & gate.leaves(gate.confidence(p_NL, confidence), threshold)
        differ = int((label_N != full_N)[going_N].sum())
        score = _score(label_N[gated_EN[e]], test.labels_N[gated_EN[e]])
        reliability = _reliability(p_NL[gated_EN[e]], test.labels_N[gated_EN[e]], confidence)
        found.append(Left(exit_.name, threshold, int(looked_N.sum()), int(going_N.sum()), differ, score, reliability))
        answer_N = torch.where(going_N, label_N, answer_N)
        waiting_N &= ~going_N
    return tuple(found), answer_N


def _reliability(p_NL: Tensor, truth_N: Tensor, confidence: str) -> Reliability:
    sure_N = gate.confidence(p_NL, confidence)
    right_N = (p_NL.argmax(dim=1) == truth_N).float()
    bin_N = (sure_N * BINS).long().clamp(0, BINS - 1)
    counts, confidences, accuracies = [], [], []
    for index in range(BINS):
        here_N = bin_N == index
        counts.append(int(here_N.sum()))
        confidences.append(float(sure_N[here_N].mean()))
        accuracies.append(float(right_N[here_N].mean()))
    return Reliability(tuple(counts), tuple(confidences), tuple(accuracies))


def _baselines(fitted: Fitted, items: Items, split: Split, answer_N: Tensor, classes: int) -> list[Compared]:
    """Who lacks a modality gets, from that modality alone, the commonest label."""
    training, validation, test = (items.rows(rows) for rows in (split.training, split.validation, split.test))
    found = baselines(training, validation, test, classes, class_weights_L=fitted.class_weights_L)
    commonest = training.labels_N.mode().values
    answers = {"the commonest label": torch.full_like(answer_N, int(commonest))}
    for name, p_NL in found.alone.items():
        answers[f"{name} alone"] = torch.where(p_NL.isnan().any(dim=1), commonest, p_NL.nan_to_num().argmax(dim=1))
    if len(found.alone) > 1:
        answers["averaged probabilities"] = found.averaged.argmax(dim=1)
    answers["logistic regression"] = found.concatenated.argmax(dim=1)
    right_N = answer_N == test.labels_N
    compared = []
    for name, theirs_N in answers.items():
        theirs = theirs_N == test.labels_N
        better, worse = int((right_N & ~theirs).sum()), int((theirs & ~right_N).sum())
        compared.append(Compared(name, _score(theirs_N, test.labels_N), better, worse))
    return compared
