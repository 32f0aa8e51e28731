"""Small modules that have what real encoders have: layers, masks, windows, constants, padding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmpipe.graphs.capture import Captured, capture
from mmpipe.graphs.fuse import ExitSpec, FusedGraph, fuse
from mmpipe.graphs.plan import PRESENCE

LABELS = 5


class Image(nn.Module):
    """uint8 pixels → normalise → unpadded patch convolution → layers → mean."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([0.02, 0.017, 0.019])[:, None, None])
        self.register_buffer("shift", torch.tensor([-1.9, -2.0, -1.8])[:, None, None])
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 32, batch_first=True) for _ in range(depth))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels.to(torch.float32) * self.scale + self.shift).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


class Text(nn.Module):
    """ids and mask → embedding → masked layers → masked mean."""

    def __init__(self, width: int = 12, depth: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.places = nn.Embedding(32, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 24, batch_first=True, dropout=0.1) for _ in range(depth)
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids) + self.places(torch.arange(ids.shape[1])).unsqueeze(0).expand(ids.shape[0], -1, -1)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask == 0)
        weight = mask.unsqueeze(-1).to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1).clamp_min(1.0)


class WindowLayer(nn.Module):
    """Attention over windows of 4 frames: inside, dimension 0 is windows × batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.reshape(-1, 4, x.shape[-1])).chunk(3, dim=-1)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return x + mixed.reshape(x.shape[0], -1, x.shape[-1])


class Windowed(nn.Module):
    """frames → layers of windowed attention → mean."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.inlet = nn.Linear(3, width)
        self.layers = nn.ModuleList(WindowLayer(width) for _ in range(depth))

    def forward(self, frames: Tensor) -> Tensor:
        x = self.inlet(frames)
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


class Head(nn.Module):
    """Two depths over embeddings and presence; looks at absent rows only through presence."""

    def __init__(self, dims: Mapping[str, int]) -> None:
        super().__init__()
        self.names = list(dims)
        self.inlets = nn.ModuleDict({name: nn.Linear(dim, 10) for name, dim in dims.items()})
        self.layers = nn.ModuleList(nn.Linear(10, 10) for _ in range(2))
        self.answers = nn.ModuleList(nn.Linear(10, LABELS) for _ in range(2))

    def forward(self, presence: Tensor, **embeddings: Tensor) -> tuple[Tensor, ...]:
        x = torch.zeros(presence.shape[0], 10)
        for column, name in enumerate(self.names):
            token = self.inlets[name](embeddings[name])
            x = x + torch.where(presence[:, column : column + 1], token, torch.zeros_like(token))
        logits = []
        for layer, answer in zip(self.layers, self.answers, strict=True):
            x = torch.tanh(layer(x)) + x
            logits.append(answer(x))
        return tuple(logits)


ROWS = {
    "image": {"pixels": torch.zeros(3, 16, 16, dtype=torch.uint8)},
    "text": {"ids": torch.zeros(9, dtype=torch.long), "mask": torch.ones(9, dtype=torch.long)},
    "audio": {"frames": torch.zeros(16, 3)},
}
DIMS = {"image": 16, "text": 12, "audio": 8}
ORDER = tuple(DIMS)


def modules(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {"image": Image().eval(), "text": Text().eval(), "audio": Windowed().eval(), "head": Head(DIMS).eval()}


PARTS = modules()
_CAPTURED: dict[int, tuple[Mapping[str, nn.Module], tuple[list[Captured], Captured]]] = {}


def captured(parts: Mapping[str, nn.Module]) -> tuple[list[Captured], Captured]:
    """Captured once per set of modules: export is what takes the time."""
    if id(parts) not in _CAPTURED:
        _CAPTURED[id(parts)] = (parts, _capture(parts))  # holds the modules too, so that the id stays theirs
    return _CAPTURED[id(parts)][1]


def _capture(parts: Mapping[str, nn.Module]) -> tuple[list[Captured], Captured]:
    branches = [capture(parts[name], ROWS[name], name=name, layers="layers") for name in ORDER]
    head = capture(
        parts["head"],
        {PRESENCE: torch.ones(3, dtype=torch.bool), **{name: torch.zeros(dim) for name, dim in DIMS.items()}},
        name="head",
    )
    return branches, head


def fused(parts: Mapping[str, nn.Module], exits: list[ExitSpec]) -> FusedGraph:
    return fuse(*captured(parts), [*exits, ExitSpec("all", ORDER)])


def batch(rows: int, seed: int = 1) -> dict[str, Tensor]:
    """Random inputs by input name, presence included."""
    make = torch.Generator().manual_seed(seed)
    mask = (torch.arange(9)[None] < torch.randint(1, 10, (rows, 1), generator=make)).long()
    return {
        "image.pixels": torch.randint(0, 256, (rows, 3, 16, 16), generator=make, dtype=torch.uint8),
        "text.ids": torch.randint(0, 50, (rows, 9), generator=make),
        "text.mask": mask,
        "audio.frames": torch.randn(rows, 16, 3, generator=make),
        PRESENCE: torch.rand(rows, 3, generator=make) < 0.7,
    }
