"""Gates: logits → probabilities → confidence → who leaves. Pure functions of the row alone, in float32.

Shapes: B batch, L label.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CONFIDENCES = ("max_probability", "margin", "entropy")


def probabilities(logits_BL: Tensor, temperature: float = 1.0) -> Tensor:
    """Softmax in float32, whatever the logits' dtype."""
    return torch.softmax(logits_BL.to(torch.float32) / temperature, dim=-1)


def confidence(probabilities_BL: Tensor, kind: str = "max_probability") -> Tensor:
    """How sure each row is, in [0, 1]; NaN where a probability is NaN.

    max_probability: the largest. margin: the largest less the second. entropy: 1 - entropy / log(labels).
    """
    if kind == "max_probability":
        return probabilities_BL.amax(dim=-1)
    if kind == "margin":
        top_B2: Tensor = probabilities_BL.topk(2, dim=-1).values
        return top_B2[:, 0] - top_B2[:, 1]
    if kind == "entropy":
        entropy_B = -torch.special.xlogy(probabilities_BL, probabilities_BL).sum(dim=-1)
        sure_B: Tensor = 1.0 - entropy_B / math.log(probabilities_BL.shape[-1])
        return sure_B.clamp(0.0, 1.0)
    raise ValueError(f"unknown confidence {kind!r}; one of {', '.join(CONFIDENCES)}")


def leaves(confidence_B: Tensor, threshold: float) -> Tensor:
    """True where a sample is sure enough to leave. What is not finite never leaves."""
    return torch.isfinite(confidence_B) & (confidence_B >= threshold)
