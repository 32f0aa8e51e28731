"""What a modality's embedding answers by itself: features of it beside it, and how several such answers are joined.

Shapes: N sample, B batch, M modality, L label, D embedding, K feature.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BANDWIDTH = 0.1  # of the kernel, by the mean squared length of whitened embeddings: curved a little, not wiggling
START_FLOOR = math.exp(-4.0)


class FourierFeatures(nn.Module):
    """Random Fourier features: a linear answer on them is about that of a Gaussian kernel on whitened embeddings.

    Whitened, as encoders that were trained for something else tell what is asked of them in directions along which
    their embeddings hardly differ: there a kernel on the embedding as it is sees nothing.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.register_buffer("frequencies_KD", torch.zeros(count, dim))
        self.register_buffer("phases_K", torch.zeros(count))

    def forward(self, unit_BD: Tensor) -> Tensor:
        """[B, K]."""
        return torch.cos(nn.functional.linear(unit_BD, self.get_buffer("frequencies_KD"), self.get_buffer("phases_K")))

    @classmethod
    def drawn(cls, unit_ND: Tensor, count: int, floor: float, generator: torch.Generator) -> FourierFeatures:
        """For embeddings like these. `floor`, a share of the largest variance, is added to each direction's variance
        before it is scaled to 1: what is smaller is taken for noise."""
        features = cls(unit_ND.shape[1], count)
        centred_ND = (unit_ND - unit_ND.mean(0)).double()
        variance_D, basis_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / len(centred_ND))
        scale_D = (variance_D.clamp_min(0) + floor * variance_D.max().clamp_min(1e-12)).rsqrt()
        total = (variance_D.clamp_min(0) * scale_D.square()).sum().clamp_min(1e-12)  # squared length, whitened
        drawn_KD = torch.randn(count, unit_ND.shape[1], generator=generator, dtype=torch.float64)
        frequencies_KD = (drawn_KD * scale_D * (2 * BANDWIDTH / total).sqrt()) @ basis_DD.T
        phases_K = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
        features.get_buffer("frequencies_KD").copy_(frequencies_KD)
        features.get_buffer("phases_K").copy_(phases_K - frequencies_KD @ unit_ND.mean(0).double())
        return features


class Pool(nn.Module):
    """Joins the modalities' answers: each one's probabilities get a floor, their logarithms are weighed and added.

    Without a floor (a product) one modality that is surely wrong rules the right label out; with a floor without end
    (a mean of probabilities) two that agree count no more than one. What lies between is found on samples.
    """

    def __init__(self, modalities: int) -> None:
        super().__init__()
        self.log_floor_M = nn.Parameter(torch.full((modalities,), math.log(START_FLOOR)))
        self.log_weight_M = nn.Parameter(torch.zeros(modalities))

    def forward(self, logits_BL: Tensor, column: int) -> Tensor:
        """What the modality of this column adds to the sum: [B, L]."""
        floored_BL = logits_BL.softmax(dim=-1) + self.log_floor_M[column].exp()
        return floored_BL.log() * self.log_weight_M[column].exp()
