"""Multinomial logistic regression to convergence: the exits' probes inside encoders, and what heads are compared with.

Shapes: N sample, L label, D or F feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpipe.fusion.items import TrainingError

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Regression:
    """A linear answer and the penalty it was found with."""

    weight_LF: Tensor
    bias_L: Tensor
    penalty: float

    def logits(self, features_NF: Tensor) -> Tensor:
        """[N, L]."""
        return nn.functional.linear(features_NF.float(), self.weight_LF, self.bias_L)

    def __call__(self, features_NF: Tensor) -> Tensor:
        """Probabilities [N, L]."""
        return self.logits(features_NF).softmax(dim=-1)


def regression(
    features_NF: Tensor,
    labels_N: Tensor,
    validation: tuple[Tensor, Tensor],
    classes: int,
    *,
    class_weights_L: Tensor | None = None,
    penalties: Sequence[float] = PENALTIES,
    refit: bool = False,
) -> Regression:
    """The regression whose penalty loses least on `validation` (features and labels), weighted by label alike; `refit`:
    then found once more, on those samples and these."""
    held_NF, held_N = validation
    best: tuple[float, Regression] | None = None
    for penalty in penalties:
        found = Regression(
            *train_probe(features_NF, labels_N, classes, penalty=penalty, class_weights_L=class_weights_L), penalty
        )
        loss = held_loss(found, held_NF, held_N, class_weights_L) if len(held_N) else penalty
        if best is None or loss < best[0]:
            best = loss, found
    assert best is not None
    if not refit:
        return best[1]
    both = torch.cat([features_NF, held_NF]), torch.cat([labels_N, held_N])
    penalty = best[1].penalty
    return Regression(*train_probe(*both, classes, penalty=penalty, class_weights_L=class_weights_L), penalty)


def held_loss(found: Regression, held_NF: Tensor, held_N: Tensor, class_weights_L: Tensor | None = None) -> float:
    """Mean cross entropy on samples that were held out, weighted by label."""
    losses_N = nn.functional.cross_entropy(found.logits(held_NF), held_N, reduction="none")
    return float((losses_N if class_weights_L is None else losses_N * class_weights_L[held_N]).mean())


def train_probe(
    states_ND: Tensor, labels_N: Tensor, classes: int, *, penalty: float, class_weights_L: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weight [label, D] and bias [label] of a linear answer: multinomial logistic regression.

    Features are standardised (that is folded into the weights), `penalty` times the squared weights is added to the
    mean cross entropy, and L-BFGS runs to convergence: there is one best answer, and no seed. TrainingError where a
    state is not finite.
    """
    if not torch.isfinite(states_ND).all():
        raise TrainingError("states hold values that are not finite")
    states_ND = states_ND.float()
    mean_D, deviation_D = states_ND.mean(0), states_ND.std(0, correction=0).clamp_min(1e-6)
    scaled_ND = (states_ND - mean_D) / deviation_D
    weight_LD = torch.zeros(classes, states_ND.shape[1], requires_grad=True)
    bias_L = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight_LD, bias_L], max_iter=100, line_search_fn="strong_wolfe")
    weights_N = torch.ones(len(labels_N)) if class_weights_L is None else class_weights_L[labels_N]

    def closure() -> Tensor:
        optimiser.zero_grad()
        logits_NL = nn.functional.linear(scaled_ND, weight_LD, bias_L)
        loss = (nn.functional.cross_entropy(logits_NL, labels_N, reduction="none") * weights_N).mean()
        loss = loss + penalty * weight_LD.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    weight_LD, bias_L = weight_LD.detach() / deviation_D, bias_L.detach()
    return weight_LD, bias_L - weight_LD @ mean_D
