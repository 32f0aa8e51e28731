"""Where a head over several modalities starts: what each modality answers alone, and how these answers are joined.

Each modality's embedding alone is asked for all it knows, by a regression on it or on it and random Fourier features,
whichever loses less on samples that it has not seen. How much each counts beside the others is found on these as well,
as the regressions are surer of those that they have seen. At the end the regressions are found once more on all.

Shapes: N sample, V validation, M modality, L label, D embedding, K feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpipe.fusion.direct import FourierFeatures, Pool
from mmpipe.fusion.heads import TransformerHead
from mmpipe.fusion.items import Items
from mmpipe.fusion.regression import Regression, held_loss, regression

FEATURES = 1024
FLOORS = (1e-5, 1e-4, 1e-3, 1e-2)  # of the variance of whitened directions
FOURIER_PENALTIES = (3e-2, 1e-1)
LEAST_VARIANCE = 1e-8  # of a direction of unit length: below it embeddings differ by rounding alone


@dataclass(frozen=True)
class Expert:
    """A modality's linear answer on its L2-normalised embedding, with Fourier features beside it or without."""

    answer: Regression
    fourier: FourierFeatures | None = None

    def logits(self, unit_ND: Tensor) -> Tensor:
        """[N, L]."""
        return self.answer.logits(_features(unit_ND, self.fourier))


@dataclass(frozen=True)
class Joined:
    """Experts, and what they are joined by."""

    experts: Mapping[str, Expert]
    scale: Mapping[str, float]  # on an expert's logits
    log_floor: Mapping[str, float]
    log_weight: Mapping[str, float]


def unit(items: Items, name: str) -> Tensor:
    """[N, D], L2-normalised; what stands in absent rows means nothing."""
    return nn.functional.normalize(items.embeddings[name].float(), dim=-1)


def single(
    training: Items, validation: Items, classes: int, class_weights_L: Tensor | None = None, *, refit: bool = False
) -> dict[str, Regression]:
    """One regression for each modality that any training sample has, its penalty chosen on `validation`; `refit`: then
    found once more on both."""
    found = {}
    for name in training.embeddings:
        (unit_ND, labels_N), held = _seen(training, name), _seen(validation, name)
        if len(labels_N):
            found[name] = regression(unit_ND, labels_N, held, classes, class_weights_L=class_weights_L, refit=refit)
    return found


def experts(
    training: Items, validation: Items, classes: int, class_weights_L: Tensor, *, seed: int
) -> dict[str, Expert]:
    """For each modality that any training sample has, the answer that loses least on `validation`."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, linear in single(training, validation, classes, class_weights_L).items():
        (unit_ND, labels_N), (unit_VD, labels_V) = _seen(training, name), _seen(validation, name)
        best = Expert(linear)
        least = held_loss(linear, unit_VD, labels_V, class_weights_L)
        varied = len(unit_ND) > 1 and float(unit_ND.var(0).max()) > LEAST_VARIANCE
        for floor in FLOORS if len(labels_V) and varied else ():
            fourier = FourierFeatures.drawn(unit_ND, FEATURES, floor, generator)
            held = (_features(unit_VD, fourier), labels_V)
            answer = regression(
                _features(unit_ND, fourier), labels_N, held, classes,
                class_weights_L=class_weights_L, penalties=FOURIER_PENALTIES,
            )  # fmt: skip
            loss = held_loss(answer, *held, class_weights_L)
            if loss < least:
                best, least = Expert(answer, fourier), loss
        found[name] = best
    return found


def joined(found: Mapping[str, Expert], validation: Items, class_weights_L: Tensor) -> Joined:
    """What the experts' sum loses least by on `validation`, all modalities that a sample has together and each alone; a
    little drawn towards plain probabilities, so that few samples can't mislead."""
    names = list(found)
    columns = [list(validation.embeddings).index(name) for name in names]
    present_MV = validation.presence_NM[:, columns].T
    logits_MVL = torch.stack([found[name].logits(unit(validation, name)) for name in names])
    logits_MVL = torch.where(present_MV[:, :, None], logits_MVL, 0.0)  # first: a gradient of NaN would stay one
    labels_V, weights_V = validation.labels_N, class_weights_L[validation.labels_N]
    views = [torch.ones(len(names), dtype=torch.bool), *torch.eye(len(names), dtype=torch.bool)]
    pool, log_scale_M = Pool(len(names)), torch.zeros(len(names), requires_grad=True)
    start_M = pool.log_floor_M.detach().clone()
    optimiser = torch.optim.LBFGS([log_scale_M, *pool.parameters()], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = 0.01 * (log_scale_M.square().sum() + pool.log_weight_M.square().sum())
        loss = loss + 0.003 * (pool.log_floor_M - start_M).square().sum()
        each_MVL = torch.stack([pool(logits_MVL[m] * log_scale_M[m].exp(), m) for m in range(len(names))])
        for view_M in views:
            seen_MV = present_MV & view_M[:, None]
            some_V = seen_MV.any(dim=0)
            logits_VL = torch.where(seen_MV[:, :, None], each_MVL, 0.0).sum(dim=0)
            losses_V = nn.functional.cross_entropy(logits_VL, labels_V, reduction="none") * weights_V
            loss = loss + (losses_V * some_V).sum() / some_V.sum().clamp_min(1) * (1.0 if view_M.all() else 0.2)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    parts = (log_scale_M.exp(), pool.log_floor_M, pool.log_weight_M)
    return Joined(found, *(dict(zip(names, part.detach().tolist(), strict=True)) for part in parts))


def again(found: Joined, items: Items, classes: int, class_weights_L: Tensor) -> Joined:
    """The same experts, with the penalties and features that were chosen, found on these samples."""
    anew = {}
    for name, expert in found.experts.items():
        unit_ND, labels_N = _seen(items, name)
        features_NK = _features(unit_ND, expert.fourier)
        answer = regression(
            features_NK, labels_N, (features_NK[:0], labels_N[:0]), classes,
            class_weights_L=class_weights_L, penalties=(expert.answer.penalty,),
        )  # fmt: skip
        anew[name] = Expert(answer, expert.fourier)
    return Joined(anew, found.scale, found.log_floor, found.log_weight)


@torch.no_grad()
def start_from(head: TransformerHead, start: Joined) -> None:
    """Let a head with `direct` paths and `floors` answer what the experts say together; its layers add nothing yet."""
    take_answers(head, start)
    assert head.pool is not None
    assert head.direct is not None
    for name in set(head.modalities) - set(start.experts):  # that no sample has: it says nothing
        for parameter in head.direct[name].parameters():
            parameter.zero_()
    for name in start.experts:
        column = head.modalities.index(name)
        head.pool.log_floor_M[column] = start.log_floor[name]
        head.pool.log_weight_M[column] = start.log_weight[name]
    for answer in head.answers:
        assert isinstance(answer, nn.Sequential)
        last = answer[1]
        assert isinstance(last, nn.Linear)
        last.weight.zero_()
        last.bias.zero_()


@torch.no_grad()
def take_answers(head: TransformerHead, found: Joined) -> None:
    """Let the direct paths answer what these experts do; all else in the head stays."""
    if head.direct is None:
        raise ValueError("the head has no direct paths")
    for name, expert in found.experts.items():
        path = head.direct[name]
        assert isinstance(path, nn.Linear)
        path.weight.copy_(expert.answer.weight_LF * found.scale[name])
        path.bias.copy_(expert.answer.bias_L * found.scale[name])
        if expert.fourier is not None:
            head.fourier[name].load_state_dict(expert.fourier.state_dict())


def _seen(items: Items, name: str) -> tuple[Tensor, Tensor]:
    """Normalised embeddings and labels of the samples that have this modality."""
    has_N = items.presence_NM[:, list(items.embeddings).index(name)]
    return unit(items, name)[has_N], items.labels_N[has_N]


def _features(unit_ND: Tensor, fourier: FourierFeatures | None) -> Tensor:
    return unit_ND if fourier is None else torch.cat([unit_ND, fourier(unit_ND)], dim=-1)
