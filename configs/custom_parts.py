"""An encoder and a head of one's own, for custom.yaml: pictures sorted by their colour.

Both modules are captured by torch.export with a free batch size. So: tensor operations only, no Python `if` on values,
and nothing that mixes the rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor, nn


class SoftHistogram(nn.Module):
    """uint8 pixels [batch, 3, side, side] → share of each brightness in red, green and blue [batch, 3 · bins]."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.register_buffer("centres_K", torch.linspace(0.0, 255.0, bins))
        self.step = 255.0 / (bins - 1)

    def forward(self, pixels: Tensor) -> Tensor:
        value_BCP1 = pixels.to(torch.float32).flatten(2).unsqueeze(-1)
        # A pixel counts for the two centres around it, by how near they are; the counts of a pixel sum to 1.
        near_BCPK = torch.relu(1.0 - (value_BCP1 - self.get_buffer("centres_K")).abs() / self.step)
        return near_BCPK.mean(dim=2).sqrt().flatten(1)  # of two histograms' roots, the dot product is their overlap


class ColourHistogram:
    """The encoder. `options` in the YAML are the arguments here."""

    modality = "image"  # what prepare() gets: a PIL picture in RGB. For text a str; for audio (samples [n], rate_hz)

    def __init__(self, bins: int = 8, side_pixels: int = 32) -> None:
        self.side_pixels = side_pixels
        self.module = SoftHistogram(bins)  # called as module(**inputs), each input with a batch dimension in front
        self.dim = 3 * bins  # of the embedding [batch, dim]

    def prepare(self, media: Image.Image) -> dict[str, Tensor]:
        """One picture → the module's inputs by name, without a batch dimension and always of the same shape."""
        small = media.resize((self.side_pixels, self.side_pixels), Image.Resampling.BOX)
        channels_last = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        return {"pixels": channels_last.view(self.side_pixels, self.side_pixels, 3).permute(2, 0, 1).contiguous()}


class Prototypes(nn.Module):
    """The head: how much a picture's histogram overlaps that of each label's colour."""

    def __init__(
        self,
        dims: dict[str, int],
        labels: Sequence[str],
        *,
        colours: Mapping[str, str],
        bins: int = 8,
        scale: float = 10.0,
    ) -> None:
        """`dims`: modality → size of its embedding, in encoder order. `colours`: label → "#rrggbb"."""
        super().__init__()
        missing = [label for label in labels if label not in colours]
        if missing or dims.get("image") != 3 * bins:
            raise ValueError(f"colours are missing for {missing}, or the encoder has other bins than {bins}")
        rgb_LC = [[int(colours[label].lstrip("#")[at : at + 2], 16) for at in (0, 2, 4)] for label in labels]
        plain_LC11 = torch.tensor(rgb_LC, dtype=torch.uint8)[:, :, None, None]
        self.register_buffer("prototype_LD", SoftHistogram(bins)(plain_LC11))
        self.column = list(dims).index("image")
        self.scale = scale

    def forward(self, embeddings: dict[str, Tensor], presence_BM: Tensor) -> Tensor:
        """Embeddings [batch, dim] by modality, presence [batch, modality] → logits [batch, label]."""
        overlap_BL = embeddings["image"] @ self.get_buffer("prototype_LD").T / 3.0  # 1: the same colours
        # Without a picture all labels are equally likely; what stands in the embedding then means nothing.
        return torch.where(presence_BM[:, self.column, None], self.scale * overlap_BL, torch.zeros_like(overlap_BL))
