"""Several views of one sample → one answer. Pure, in float64, on one sample at a time.

Shapes: V view, L label.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST = 2.0  # what the first look weighs beside others: encoders were made for whole media, not for parts of them
SURENESS = 2.0  # the power of a view's own confidence in its weight
FLOOR = 1e-4  # a view that rules a label out has said no more than this: it must not outvote all others


def weigh(probabilities_VL: Tensor, confidence_V: Tensor) -> Tensor:
    """Probabilities [L] from those of each view [V, L], the first look first, and how sure each is [V], in [0, 1].

    The weighted geometric mean of the views. A view weighs by its confidence (squared: a view that shows nothing says
    little) and by agreement: the share of all confidence that stands behind its label; the first look weighs double.
    One view alone is given back as it is. Views that are not finite must be left out before. Raises ValueError where
    nothing is left to weigh.
    """
    if probabilities_VL.ndim != 2 or not len(probabilities_VL) or confidence_V.shape != probabilities_VL.shape[:1]:
        shapes = f"{tuple(probabilities_VL.shape)} and {tuple(confidence_V.shape)}"
        raise ValueError(f"probabilities [views, labels] and confidence [views] have shapes {shapes}")
    if not (torch.isfinite(probabilities_VL).all() and torch.isfinite(confidence_V).all()):
        raise ValueError("a view whose probabilities are no numbers can't be weighed")
    if len(probabilities_VL) == 1:
        return probabilities_VL[0].to(torch.float32)
    p_VL, sure_V = probabilities_VL.to(torch.float64), confidence_V.to(torch.float64).clamp_min(FLOOR)
    label_V = p_VL.argmax(dim=1)
    behind_VV = label_V[:, None] == label_V[None, :]
    agreement_V = (behind_VV * sure_V).sum(dim=1) / sure_V.sum()
    weight_V = sure_V**SURENESS * agreement_V
    weight_V[0] *= FIRST
    log_L = (weight_V[:, None] * p_VL.clamp_min(FLOOR).log()).sum(dim=0) / weight_V.sum()
    return torch.softmax(log_L, dim=0).to(torch.float32)
