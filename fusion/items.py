"""Samples after their encoders: what heads and probes are trained on, and measured with.

Shapes: N sample, M modality, L label, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class TrainingError(ValueError):
    """What was given can't be trained on. The message says why."""


@dataclass(frozen=True)
class Items:
    """Samples after their encoders. Rows of absent media may hold anything."""

    embeddings: Mapping[str, Tensor]  # modality → float32 [N, D]
    presence_NM: Tensor  # bool, columns in the order of `embeddings`
    labels_N: Tensor  # int64

    def __len__(self) -> int:
        return len(self.labels_N)

    def rows(self, rows_R: Tensor) -> Items:
        embeddings = {name: value[rows_R] for name, value in self.embeddings.items()}
        return Items(embeddings, self.presence_NM[rows_R], self.labels_N[rows_R])

    def seeing(self, names: Sequence[str]) -> Items:
        """The same samples with no other modality than `names`."""
        seen_M = torch.tensor([name in names for name in self.embeddings])
        return Items(self.embeddings, self.presence_NM & seen_M, self.labels_N)


def balanced_weights(labels_N: Tensor, classes: int) -> Tensor:
    """[label]: what gives every label the same weight in all, however rare; 1 in the mean over the samples."""
    counts_L = torch.bincount(labels_N, minlength=classes).clamp_min(1).float()
    return len(labels_N) / (classes * counts_L)
