"""Where a head over several modalities starts: one regression per modality, weighed against one another.

Each modality's embedding alone is asked for all it knows; added up, log-probabilities that are independent given the
label are the best answer there is. How much each counts is found on samples that the regressions have not seen, as they
are surer of those that they have.

Shapes: N sample, V validation, M modality, L label, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpipe.fusion.heads import TransformerHead
from mmpipe.fusion.items import Items
from mmpipe.fusion.regression import Regression, regression


@dataclass(frozen=True)
class Expert:
    """A modality's linear answer on its L2-normalised embedding, and the factor on its logits."""

    answer: Regression
    weight: float


def unit(items: Items, name: str) -> Tensor:
    """[N, D], L2-normalised; what stands in absent rows means nothing."""
    return nn.functional.normalize(items.embeddings[name].float(), dim=-1)


def single(
    training: Items, validation: Items, classes: int, class_weights_L: Tensor | None = None
) -> dict[str, Regression]:
    """One regression for each modality that any training sample has, its penalty chosen on `validation`."""
    found = {}
    for column, name in enumerate(training.embeddings):
        has_N, held_V = training.presence_NM[:, column], validation.presence_NM[:, column]
        if has_N.any():
            held = (unit(validation, name)[held_V], validation.labels_N[held_V])
            found[name] = regression(
                unit(training, name)[has_N], training.labels_N[has_N], held, classes, class_weights_L=class_weights_L
            )
    return found


def weighed(answers: dict[str, Regression], validation: Items, class_weights_L: Tensor) -> dict[str, Expert]:
    """The factors on the modalities' logits with which their sum loses least on `validation`, all modalities that a
    sample has together and each alone; a little drawn towards 1, so that few samples can't mislead."""
    names = list(answers)
    logits_MVL = torch.stack([answers[name].logits(unit(validation, name)) for name in names])
    columns = [list(validation.embeddings).index(name) for name in names]
    present_MV1 = validation.presence_NM[:, columns].T.unsqueeze(-1)
    labels_V, weights_V = validation.labels_N, class_weights_L[validation.labels_N]
    views = [torch.ones(len(names), dtype=torch.bool), *torch.eye(len(names), dtype=torch.bool)]
    log_factor_M = torch.zeros(len(names), requires_grad=True)
    optimiser = torch.optim.LBFGS([log_factor_M], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        each_MVL = torch.where(present_MV1, logits_MVL, 0.0) * log_factor_M.exp()[:, None, None]
        loss = 0.01 * log_factor_M.square().sum()
        for view_M in views:
            seen_V = (present_MV1.squeeze(-1) & view_M[:, None]).any(dim=0)
            logits_VL = (each_MVL * view_M[:, None, None]).sum(dim=0)
            losses_V = nn.functional.cross_entropy(logits_VL, labels_V, reduction="none") * weights_V
            loss = loss + (losses_V * seen_V).sum() / seen_V.sum().clamp_min(1) * (1.0 if view_M.all() else 0.2)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    factors = log_factor_M.detach().exp().tolist()
    return {name: Expert(answers[name], factor) for name, factor in zip(names, factors, strict=True)}


@torch.no_grad()
def start_from(head: TransformerHead, experts: dict[str, Expert]) -> None:
    """Let a head with `direct` paths answer what the experts say together; its layers add nothing yet."""
    if head.direct is None:
        raise ValueError("the head has no direct paths")
    for name, expert in experts.items():
        path = head.direct[name]
        assert isinstance(path, nn.Linear)
        path.weight.copy_(expert.answer.weight_LF * expert.weight)
        path.bias.copy_(expert.answer.bias_L * expert.weight)
    for answer in head.answers:
        assert isinstance(answer, nn.Sequential)
        last = answer[1]
        assert isinstance(last, nn.Linear)
        last.weight.zero_()
        last.bias.zero_()
