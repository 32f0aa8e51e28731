"""Training of heads on embeddings, and the choice of thresholds by hand-set risk.

Nothing here reads media or runs encoders: embeddings come in, a trained head stays behind. Thresholds chosen here
carry no guarantee.

Shapes: N sample, M modality, L label, D embedding, E exit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpipe.fusion.heads import DepthHead


class TrainingError(ValueError):
    """What was given can't be trained on. The message says why."""


@dataclass(frozen=True)
class Epoch:
    """Mean losses in nats; the validation loss is over the whole prefixes only."""

    training_loss: float
    validation_loss: float
    validation_accuracy: float  # of the full pipeline, at the last depth


@dataclass(frozen=True)
class TrainingResult:
    """`best_epoch` indexes `history`; the head has that epoch's weights."""

    history: tuple[Epoch, ...]
    best_epoch: int
    validation_rows: tuple[int, ...]  # never trained on

    @property
    def best(self) -> Epoch:
        return self.history[self.best_epoch]


def train_head(
    head: nn.Module,
    embeddings: Mapping[str, Tensor],
    presence_NM: Tensor,
    labels_N: Tensor,
    *,
    prefixes: Sequence[Sequence[str]] = (),
    epochs: int = 40,
    batch_size: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    modality_dropout: float = 0.3,
    validation_share: float = 0.1,
    patience: int = 8,
    seed: int = 0,
) -> TrainingResult:
    """Train `head` in place on embeddings {modality: [N, D]}, presence bool [N, M] and labels int64 [N].

    Presence has its columns in the order of `embeddings`. Each batch is seen through every prefix (the modalities
    that an exit has, each list by name), whole, and once with modalities dropped at random, so that any subset can
    answer; the loss is the mean cross entropy over these and over all depths that the head has. The epoch with the
    least loss on a held-out part wins. Same seed, same threads: same weights (initial ones are the caller's).

    Raises TrainingError on shapes that don't fit, unknown modalities, or fewer than ten samples with a modality.
    """
    masks = _subsets(list(embeddings), prefixes)
    _check(embeddings, presence_NM, labels_N)
    generator = torch.Generator().manual_seed(seed)
    usable_N = torch.nonzero(presence_NM.any(dim=1)).squeeze(1)
    if len(usable_N) < 10:
        raise TrainingError(f"{len(usable_N)} samples with at least one modality: too few to train a head on")
    shuffled_N = usable_N[torch.randperm(len(usable_N), generator=generator)]
    held = max(1, round(validation_share * len(shuffled_N)))
    validation_N, training_N = shuffled_N[:held], shuffled_N[held:]

    optimiser = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    steps = math.ceil(len(training_N) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * steps, pct_start=0.1)
    history: list[Epoch] = []
    best_epoch, best_weights = 0, copy.deepcopy(head.state_dict())
    was_training = head.training
    for epoch in range(epochs):
        head.train()
        order_N = training_N[torch.randperm(len(training_N), generator=generator)]
        total = 0.0
        for rows_B in torch.split(order_N, batch_size):
            kept_BM = torch.rand(len(rows_B), presence_NM.shape[1], generator=generator) >= modality_dropout
            losses = [
                loss
                for seen_BM in (*masks, kept_BM)
                for loss in _losses(head, embeddings, presence_NM, labels_N, rows_B, seen_BM)
            ]
            loss = torch.stack(losses).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(rows_B)
        history.append(
            Epoch(total / len(training_N), *_validate(head, embeddings, presence_NM, labels_N, validation_N, masks))
        )
        if history[-1].validation_loss < history[best_epoch].validation_loss or epoch == 0:
            best_epoch, best_weights = epoch, copy.deepcopy(head.state_dict())
        elif epoch - best_epoch >= patience:
            break
    head.load_state_dict(best_weights)
    head.train(was_training)
    return TrainingResult(tuple(history), best_epoch, tuple(validation_N.tolist()))


def _subsets(modalities: list[str], prefixes: Sequence[Sequence[str]]) -> list[Tensor]:
    """One bool [M] per prefix, the whole last."""
    masks = []
    for prefix in prefixes:
        if unknown := set(prefix) - set(modalities):
            raise TrainingError(f"prefix {list(prefix)}: no embeddings for {', '.join(sorted(unknown))}")
        masks.append(torch.tensor([name in prefix for name in modalities]))
    whole = torch.ones(len(modalities), dtype=torch.bool)
    return [mask for mask in masks if not mask.all()] + [whole]


def _check(embeddings: Mapping[str, Tensor], presence_NM: Tensor, labels_N: Tensor) -> None:
    n = len(labels_N)
    if presence_NM.shape != (n, len(embeddings)) or presence_NM.dtype != torch.bool:
        raise TrainingError(
            f"presence is {presence_NM.dtype} {tuple(presence_NM.shape)}, not bool [{n}, {len(embeddings)}]"
        )
    for name, embedding_ND in embeddings.items():
        if embedding_ND.ndim != 2 or len(embedding_ND) != n:
            raise TrainingError(f"{name} embeddings are {tuple(embedding_ND.shape)}, not [{n}, dim]")
        if not torch.isfinite(embedding_ND[presence_NM[:, list(embeddings).index(name)]]).all():
            raise TrainingError(f"{name} embeddings hold values that are not finite")


def _losses(
    head: nn.Module,
    embeddings: Mapping[str, Tensor],
    presence_NM: Tensor,
    labels_N: Tensor,
    rows_B: Tensor,
    seen_BM: Tensor,
) -> Iterator[Tensor]:
    """Cross entropy of each depth, over the rows that have something left to see."""
    left_BM = presence_NM[rows_B] & seen_BM
    some_B = left_BM.any(dim=1)
    if not some_B.any():
        return
    rows_B, left_BM = rows_B[some_B], left_BM[some_B]
    for logits_BL in _depths(head, {name: value[rows_B] for name, value in embeddings.items()}, left_BM):
        yield nn.functional.cross_entropy(logits_BL, labels_N[rows_B])


def _depths(head: nn.Module, embeddings: Mapping[str, Tensor], presence_BM: Tensor) -> list[Tensor]:
    return head.all_depths(embeddings, presence_BM) if isinstance(head, DepthHead) else [head(embeddings, presence_BM)]


@torch.no_grad()
def _validate(
    head: nn.Module,
    embeddings: Mapping[str, Tensor],
    presence_NM: Tensor,
    labels_N: Tensor,
    rows_V: Tensor,
    masks: Sequence[Tensor],
) -> tuple[float, float]:
    head.eval()
    losses = [
        loss for mask in masks for loss in _losses(head, embeddings, presence_NM, labels_N, rows_V, mask.unsqueeze(0))
    ]
    logits_VL = head({name: value[rows_V] for name, value in embeddings.items()}, presence_NM[rows_V])
    accuracy = (logits_VL.argmax(dim=1) == labels_N[rows_V]).float().mean()
    return float(torch.stack(losses).mean()), float(accuracy)


def choose_thresholds(
    confidence_EN: Tensor,
    differs_EN: Tensor,
    gated_EN: Tensor,
    *,
    max_disagreement: float,
) -> list[float | None]:
    """Per exit the smallest threshold that keeps the disagreement so far within its part of `max_disagreement`.

    `confidence_EN`: how sure each exit is of each sample; `differs_EN`: True where its label is not the full
    pipeline's; `gated_EN`: True where the sample is looked at there (the exit brought it something new). Exit e of E
    may spend e / E of the whole budget (a share of all N samples) less what exits before it have spent: what one
    leaves, the next may use. A sample leaves where confidence >= threshold, and later exits don't see it. None: no
    threshold lets anybody leave within the budget.
    """
    exits, n = confidence_EN.shape
    left_N = torch.zeros(n, dtype=torch.bool)
    spent = 0
    thresholds: list[float | None] = []
    for e in range(exits):
        budget = math.floor(max_disagreement * n * (e + 1) / exits + 1e-9) - spent
        rows = torch.nonzero(gated_EN[e] & ~left_N & torch.isfinite(confidence_EN[e])).squeeze(1)
        order = rows[confidence_EN[e, rows].argsort(descending=True, stable=True)]
        confidence, errors = confidence_EN[e, order], differs_EN[e, order].long().cumsum(0)
        # equal confidences leave together, so a cut is allowed only where the next one is smaller
        ends = torch.ones(len(order), dtype=torch.bool)
        ends[:-1] = confidence[:-1] > confidence[1:]
        allowed = torch.nonzero(ends & (errors <= budget)).squeeze(1)
        if len(allowed) == 0:
            thresholds.append(None)
            continue
        last = int(allowed[-1])
        thresholds.append(float(confidence[last]))
        left_N[order[: last + 1]] = True
        spent += int(errors[last])
    return thresholds
