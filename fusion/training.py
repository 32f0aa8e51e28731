"""Training of heads on embeddings, and the choice of thresholds by hand-set risk.

Nothing here reads media or runs encoders: embeddings come in, a trained head stays behind. Thresholds chosen here
carry no guarantee.

Shapes: N sample, M modality, L label, D embedding, E exit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpipe.fusion.augment import Augment, Mean
from mmpipe.fusion.heads import DepthHead
from mmpipe.fusion.items import Items, TrainingError


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
    noise: float = 0.0,
    recombined: float = 0.0,
    averaging: float = 0.0,
    from_start: bool = False,
    class_weights_L: Tensor | None = None,
    validation_share: float = 0.1,
    validation_rows: Tensor | None = None,
    patience: int = 8,
    seed: int = 0,
) -> TrainingResult:
    """Train `head` in place on embeddings {modality: [N, D]}, presence bool [N, M] and labels int64 [N].

    Presence has its columns in the order of `embeddings`. Each batch is seen through every prefix (the modalities
    that an exit has, each list by name), whole, and once with modalities dropped at random, so that any subset can
    answer; the loss is the mean cross entropy over these and over all depths that the head has. The epoch with the
    least loss on a held-out part (`validation_rows`, else a random share) wins. Same seed, same threads: same weights
    (initial ones are the caller's).

    Against learning samples by heart: `noise` is added to each feature, in its standard deviations; `recombined` is
    the share of samples whose media are drawn, each by itself, from all of their label; `averaging` is how much of the
    mean of past weights each step keeps, that mean being what is validated and stays. `from_start`: the weights that
    the head comes with may win too; they are the history's first entry. `class_weights_L` weighs the loss by label
    (`balanced_weights`).

    Raises TrainingError on shapes that don't fit, unknown modalities, or fewer than ten samples with a modality.
    """
    masks = _subsets(list(embeddings), prefixes)
    _check(embeddings, presence_NM, labels_N)
    items = Items(embeddings, presence_NM, labels_N)
    generator = torch.Generator().manual_seed(seed)
    training_N, validation_N = _parts(presence_NM, validation_rows, validation_share, generator)
    held_out = items.rows(validation_N)
    augment = Augment(items.rows(training_N), noise, recombined, generator)
    weights_L = torch.ones(int(labels_N.max()) + 1) if class_weights_L is None else class_weights_L

    optimiser = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    steps = math.ceil(len(training_N) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * steps, pct_start=0.1)
    mean = Mean(head, averaging)
    history: list[Epoch] = []
    best_epoch, best_weights = 0, copy.deepcopy(head.state_dict())
    was_training = head.training
    if from_start:
        before = _validate(head, items.rows(training_N), masks, weights_L)[0]
        history.append(Epoch(before, *_validate(head, held_out, masks, weights_L)))
    for _ in range(epochs):
        head.train()
        total = 0.0
        for rows_B in torch.split(torch.randperm(len(training_N), generator=generator), batch_size):
            kept_BM = torch.rand(len(rows_B), presence_NM.shape[1], generator=generator) >= modality_dropout
            loss = _loss(head, augment(rows_B), [*masks, kept_BM], weights_L)
            if loss is None:
                continue
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            mean.update()
            total += float(loss.detach()) * len(rows_B)
        history.append(Epoch(total / len(training_N), *_validate(mean.head, held_out, masks, weights_L)))
        here = len(history) - 1
        if here == 0 or history[here].validation_loss < history[best_epoch].validation_loss:
            best_epoch, best_weights = here, copy.deepcopy(mean.head.state_dict())
        elif here - best_epoch >= patience:
            break
        augment.shuffle()
    head.load_state_dict(best_weights)
    head.train(was_training)
    return TrainingResult(tuple(history), best_epoch, tuple(validation_N.tolist()))


def _parts(
    presence_NM: Tensor, validation_rows: Tensor | None, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, of those that have anything."""
    usable_N = torch.nonzero(presence_NM.any(dim=1)).squeeze(1)
    if len(usable_N) < 10:
        raise TrainingError(f"{len(usable_N)} samples with at least one modality: too few to train a head on")
    if validation_rows is not None:
        held_N = torch.isin(usable_N, validation_rows)
        if held_N.all() or not held_N.any():
            raise TrainingError("nothing is left to train on, or nothing is held out")
        return usable_N[~held_N], usable_N[held_N]
    shuffled_N = usable_N[torch.randperm(len(usable_N), generator=generator)]
    held = max(1, round(share * len(shuffled_N)))
    return shuffled_N[held:], shuffled_N[:held]


def _subsets(modalities: list[str], prefixes: Sequence[Sequence[str]]) -> list[Tensor]:
    """One bool [1, M] per prefix, the whole last."""
    masks = []
    for prefix in prefixes:
        if unknown := set(prefix) - set(modalities):
            raise TrainingError(f"prefix {list(prefix)}: no embeddings for {', '.join(sorted(unknown))}")
        masks.append(torch.tensor([[name in prefix for name in modalities]]))
    whole = torch.ones(1, len(modalities), dtype=torch.bool)
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


def _loss(head: nn.Module, items: Items, views: Sequence[Tensor], weights_L: Tensor) -> Tensor | None:
    """The mean over views (bool [1 or B, M]) and depths of the cross entropy over the rows that have something to see.

    All views are one call of the head: the calls are what takes the time, not their rows. None: nothing to see.
    """
    left_VBM = torch.stack([items.presence_NM & view for view in views])
    some_VB = left_VBM.any(dim=2)
    views_R, rows_R = torch.nonzero(some_VB, as_tuple=True)
    if len(rows_R) == 0:
        return None
    counts_V = some_VB.sum(dim=1)
    share_R = 1.0 / (counts_V[views_R] * int((counts_V > 0).sum()))
    labels_R = items.labels_N[rows_R]
    taken = {name: value[rows_R] for name, value in items.embeddings.items()}
    depths = _depths(head, taken, left_VBM[views_R, rows_R])
    losses = [
        (nn.functional.cross_entropy(logits_RL, labels_R, reduction="none") * weights_L[labels_R] * share_R).sum()
        for logits_RL in depths
    ]
    return torch.stack(losses).mean()


def _depths(head: nn.Module, embeddings: Mapping[str, Tensor], presence_BM: Tensor) -> list[Tensor]:
    return head.all_depths(embeddings, presence_BM) if isinstance(head, DepthHead) else [head(embeddings, presence_BM)]


@torch.no_grad()
def _validate(head: nn.Module, items: Items, masks: Sequence[Tensor], weights_L: Tensor) -> tuple[float, float]:
    head.eval()
    loss = _loss(head, items, masks, weights_L)
    assert loss is not None
    logits_VL = head(items.embeddings, items.presence_NM)
    accuracy = (logits_VL.argmax(dim=1) == items.labels_N).float().mean()
    return float(loss), float(accuracy)


__all__ = ["Epoch", "Items", "TrainingError", "TrainingResult", "choose_thresholds", "train_head"]


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
