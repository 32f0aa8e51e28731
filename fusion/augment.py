"""What keeps a head from learning its samples by heart: noise, other media of the same label, the mean of past weights.

Shapes: N sample, B batch, M modality, D embedding.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mmpipe.fusion.items import Items


class Augment:
    """Rows of the training samples as a batch sees them."""

    def __init__(self, items: Items, noise: float, recombined: float, generator: torch.Generator) -> None:
        self.items, self.noise, self.recombined, self.generator = items, noise, recombined, generator
        self.deviations = {
            name: value[items.presence_NM[:, m]].std(0, correction=0) if items.presence_NM[:, m].any() else value[0] * 0
            for m, (name, value) in enumerate(items.embeddings.items())
        }
        self.shuffle()

    def shuffle(self) -> None:
        """For each modality, another sample of the same label to take it from."""
        if self.recombined:
            self.others_MN = torch.stack([self._within_labels() for _ in self.items.embeddings])

    def _within_labels(self) -> Tensor:
        labels_N = self.items.labels_N
        one_N, other_N = (
            (labels_N + torch.rand(len(labels_N), generator=self.generator, dtype=torch.float64) * 0.999).argsort()
            for _ in range(2)
        )  # both in the labels' order, each label's own samples shuffled
        found_N = torch.empty_like(one_N)
        found_N[one_N] = other_N
        return found_N

    def __call__(self, rows_B: Tensor) -> Items:
        items, draw = self.items, self.generator
        mixed_B = torch.rand(len(rows_B), generator=draw) < self.recombined
        embeddings, presence = {}, []
        for column, (name, value_ND) in enumerate(items.embeddings.items()):
            from_B = torch.where(mixed_B, self.others_MN[column, rows_B], rows_B) if self.recombined else rows_B
            taken_BD = value_ND[from_B]
            if self.noise:
                drawn_BD = torch.randn(taken_BD.shape, generator=draw)
                taken_BD = taken_BD + self.noise * self.deviations[name] * drawn_BD
            embeddings[name] = taken_BD
            presence.append(items.presence_NM[from_B, column])
        return Items(embeddings, torch.stack(presence, dim=1), items.labels_N[rows_B])


class Mean:
    """`head`: the running mean of the trained head's weights; without averaging, that head itself."""

    def __init__(self, trained: nn.Module, keep: float) -> None:
        self.trained, self.keep, self.steps = trained, keep, 0
        self.head = copy.deepcopy(trained) if keep else trained

    def update(self) -> None:
        if not self.keep:
            return
        self.steps += 1
        keep = min(self.keep, self.steps / (self.steps + 10))  # the first weights are soon forgotten
        with torch.no_grad():
            for ours, theirs in zip(self.head.parameters(), self.trained.parameters(), strict=True):
                ours.lerp_(theirs, 1 - keep)
            for kept, new in zip(self.head.buffers(), self.trained.buffers(), strict=True):
                kept.copy_(new)
