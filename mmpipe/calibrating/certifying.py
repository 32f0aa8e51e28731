"""Scores → the calibration, with all that the report tells of it.

Shapes: N sample, L label, E exit, K point of the path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmpipe import __version__
from mmpipe.calibrated import Accuracy, BindsTo, CalibratedExit, Calibration, Expected, Promise
from mmpipe.calibrating.scores import Scores
from mmpipe.errors import ConfigError
from mmpipe.fusion import gate
from mmpipe.fusion.calibration import (
    AccuracyLoss,
    CalibrationError,
    Certified,
    ClassRisk,
    Split,
    accuracy_loss,
    certify,
    split,
    temperature,
    worst_classes,
)
from mmpipe.fusion.thresholds import Bools

_BINS = 10


@dataclass(frozen=True)
class Told:
    """One exit on the test split, as the report tells of it."""

    name: str
    threshold: float | None  # None: nobody leaves here
    temperature: float
    looked_at: int
    left: int
    differed: int  # of those that left
    confidence: Sequence[int]  # counts in bins of [0, 1] of those it looked at
    agreement: Sequence[tuple[int, float, float]]  # per bin of the tempered largest probability: items, mean, agree


@dataclass(frozen=True)
class Result:
    """A calibration and its story."""

    calibration: Calibration
    scores: Scores
    certified: Certified
    needed: int | None  # where nothing was certified: about how many items it would take; None: no number would do
    exits: tuple[Told, ...]
    classes: tuple[ClassRisk, ...]
    accuracy: AccuracyLoss | None


def calibrate(
    scores: Scores,
    *,
    max_disagreement: float = 0.01,
    certainty: float = 0.95,
    confidence: str = "max_probability",
    seed: int = 0,
) -> Result:
    """Temperatures, order and thresholds from one random part of the samples, the test on the other.

    Raises ConfigError for a pipeline that has nowhere to leave early, or shares that are none.
    """
    parts = split(scores.count, seed)
    sequences = [sequence for sequence in scores.sequences() if sequence]
    if not sequences:
        raise ConfigError("one encoder and no depth exits: there is nowhere to leave early", path="encoders")
    temperatures = temperatures_of(scores, parts)
    candidates = [scores.exits(sequence, temperatures, confidence) for sequence in sequences]
    try:
        certified = certify(candidates, parts, max_disagreement=max_disagreement, certainty=certainty)
    except CalibrationError as error:
        raise ConfigError(str(error), path="calibrate") from error
    sequence = sequences[certified.order]
    told = tuple(_told(scores, certified, e, after, temperatures) for e, after in enumerate(sequence))
    right_FN, known_N = _right(scores, sequence)
    loss = accuracy_loss(certified, right_FN, known_N)
    calibration = _calibration(scores, certified, sequence, told, loss, confidence, temperatures)
    needed = certified.needed() if certified.point is None else None
    return Result(
        calibration, scores, certified, needed, told, tuple(worst_classes(certified, scores.full_N.numpy())), loss
    )


def temperatures_of(scores: Scores, parts: Split) -> dict[str, float]:
    """By likelihood of the full pipeline's label, of the true one where it is given; the full pipeline's own from
    true labels alone. From the learn split."""
    learn = torch.from_numpy(parts.learn)
    known = bool((scores.truth_N[learn] >= 0).any())
    whole = "+".join(scores.modalities)
    found = {}
    for name, logits_NL in scores.logits.items():
        labels_N = scores.truth_N if known else scores.full_N
        rows = learn[labels_N[learn] >= 0]
        found[name] = 1.0 if name == whole and not known else temperature(logits_NL[rows], labels_N[rows])
    return found


def _told(scores: Scores, certified: Certified, e: int, after: Sequence[str], temperatures: dict[str, float]) -> Told:
    rows = certified.split.test
    exits = certified.exits.rows(rows)
    left_N = np.zeros(len(rows), dtype=bool)
    if certified.point is not None:
        left_N = exits.leaving(certified.path_KE[certified.point, None])[0] == e
    gated_N = exits.gated_EN[e]
    name = scores.subset(after)
    p_N = gate.probabilities(scores.logits[name][torch.from_numpy(rows)], temperatures[name]).amax(dim=1).numpy()
    bin_N = np.clip((p_N * _BINS).astype(int, copy=False), 0, _BINS - 1) if gated_N.all() else None
    bin_N = np.clip((np.nan_to_num(p_N) * _BINS).astype(int), 0, _BINS - 1) if bin_N is None else bin_N
    agreement = []
    for index in range(_BINS):
        here = gated_N & (bin_N == index)
        n = int(here.sum())
        agreement.append(
            (n, float(p_N[here].mean()), float(1 - exits.differs_EN[e, here].mean())) if n else (0, 0.0, 0.0)
        )
    confidence_N = np.clip(np.where(gated_N, exits.confidence_EN[e], 0.0), 0, 1 - 1e-9)
    counts = np.bincount((confidence_N[gated_N] * 2 * _BINS).astype(int), minlength=2 * _BINS)
    threshold = certified.thresholds[e]
    return Told(
        name="+".join(after),
        threshold=None if math.isinf(threshold) else threshold,
        temperature=temperatures[name],
        looked_at=int(gated_N.sum()),
        left=int(left_N.sum()),
        differed=int((left_N & exits.differs_EN[e]).sum()),
        confidence=counts.tolist(),
        agreement=agreement,
    )


def _right(scores: Scores, sequence: Sequence[Sequence[str]]) -> tuple[Bools, Bools]:
    truth_N = scores.truth_N
    labels = [scores.logits[scores.subset(after)].argmax(dim=1) for after in sequence]
    right_FN = torch.stack([label_N == truth_N for label_N in (*labels, scores.full_N)])
    return right_FN.numpy(), (truth_N >= 0).numpy()


def _calibration(
    scores: Scores,
    certified: Certified,
    sequence: Sequence[Sequence[str]],
    told: Sequence[Told],
    loss: AccuracyLoss | None,
    confidence: str,
    temperatures: dict[str, float],
) -> Calibration:
    test = certified.exits.rows(certified.split.test)
    full_s = float(test.without().mean()) if test.count else 0.0
    # An exit that nobody leaves at stays where others follow: without it these would gate samples that were not tested.
    last = max((e for e, one in enumerate(told) if one.threshold is not None), default=-1)
    exits = tuple(
        CalibratedExit.model_validate(
            {
                "after": tuple(after),
                "threshold": one.threshold,
                "temperature": one.temperature,
                "answered": one.left / max(test.count, 1),
            }
        )
        for after, one in zip(sequence[: last + 1], told[: last + 1], strict=True)
    )
    passed = bool(exits)
    return Calibration(
        version=1,
        made_by=f"mmpipe {__version__}",
        labels=scores.labels,
        binds_to=BindsTo(model=scores.model, dtype=scores.dtype, backends=scores.backends, dtypes=scores.dtypes),
        confidence=confidence,  # type: ignore[arg-type]
        exits=exits,
        full_temperature=temperatures["+".join(scores.modalities)],
        promise=Promise(
            max_disagreement=certified.max_disagreement,
            certainty=certified.certainty,
            items_learn=len(certified.split.learn),
            items_test=len(certified.split.test),
            observed=certified.observed,
        )
        if passed
        else None,
        expected=Expected(
            saving=certified.saving, seconds_full=full_s, seconds_with_exits=full_s * (1 - certified.saving)
        ),
        accuracy=Accuracy(
            items=loss.items, lost=loss.lost, won=loss.won, loss_at_most=loss.bound, certainty=loss.certainty
        )
        if loss is not None
        else None,
    )
