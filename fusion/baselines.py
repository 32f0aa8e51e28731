"""What a trained head has to beat: one modality, averaged answers of single modalities, one regression over everything.

All are multinomial logistic regressions on L2-normalised embeddings, to convergence, with the penalty that is best on
the validation part, found once more on both parts: what somebody would write in an afternoon.

Shapes: N sample, M modality, L label, D embedding, F feature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmpipe.fusion.experts import single, unit
from mmpipe.fusion.items import Items
from mmpipe.fusion.regression import regression


@dataclass(frozen=True)
class Baselines:
    """Probabilities [N, L] on the test part. A modality alone answers only who has it; NaN elsewhere."""

    alone: dict[str, Tensor]
    averaged: Tensor
    concatenated: Tensor


def baselines(
    training: Items, validation: Items, test: Items, classes: int, *, class_weights_L: Tensor | None = None
) -> Baselines:
    """Fit all on `training`, choose penalties on `validation`, fit once more on both, answer `test`."""
    alone: dict[str, Tensor] = {}
    total_NL = torch.zeros(len(test), classes)
    for name, answer in single(training, validation, classes, class_weights_L, refit=True).items():
        asked_N1 = test.presence_NM[:, list(test.embeddings).index(name), None]
        p_NL = answer(unit(test, name))
        alone[name] = torch.where(asked_N1, p_NL, torch.full_like(p_NL, torch.nan))
        total_NL += torch.where(asked_N1, p_NL, torch.zeros_like(p_NL))
    joined = regression(
        side_by_side(training),
        training.labels_N,
        (side_by_side(validation), validation.labels_N),
        classes,
        class_weights_L=class_weights_L,
        refit=True,
    )
    return Baselines(alone, total_NL / total_NL.sum(dim=1, keepdim=True).clamp_min(1e-12), joined(side_by_side(test)))


def side_by_side(items: Items) -> Tensor:
    """[N, all D + M]: normalised embeddings, zeros where absent, then presence."""
    present = [items.presence_NM[:, m : m + 1] for m in range(len(items.embeddings))]
    units = [unit(items, name) for name in items.embeddings]
    parts = [torch.where(flag, unit, torch.zeros_like(unit)) for unit, flag in zip(units, present, strict=True)]
    return torch.cat([*parts, items.presence_NM.float()], dim=1)
