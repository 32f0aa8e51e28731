"""Encoders and heads → captured graphs, kept between runs where all that shapes them is known.

torch.export takes most of the time until a pipeline's first result. What it finds depends on the architecture, on the
code and on the libraries, all of which a name is made of; what has a part of the user's own may depend on anything, and
is captured every time.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmpipe import cache
from mmpipe.encoders import BuiltEncoder, Encoder, EncoderError
from mmpipe.fusion.heads import DepthHead
from mmpipe.graphs import plain, recapture
from mmpipe.graphs.artefacts import kept
from mmpipe.graphs.capture import Captured, capture
from mmpipe.graphs.lengths import lengths_of
from mmpipe.graphs.plan import HEAD, PRESENCE
from mmpipe.machine import versions

_LIMIT_BYTES = 100 << 20  # of all graphs; one takes some tens of kB
_CODE = ("mmpipe.encoders", "mmpipe.fusion", "mmpipe.graphs")
# whose code or version is part of the name; a module with a part of another's is captured every time
_KNOWN = (*_CODE, "mmpipe.capturing", "torch", "torchvision", "torchaudio", "transformers", "open_clip", "timm")


def captured_encoder(encoder: Encoder, modality: str, settings: Mapping[str, Any]) -> Captured:
    """`settings`: what the encoder was made of, besides its module. Raises EncoderError, GraphError."""
    built = encoder if isinstance(encoder, BuiltEncoder) else None
    example = built.example if built else example_medium(modality)
    rows = encoder.prepare(example)
    if not isinstance(rows, Mapping) or not all(isinstance(row, Tensor) for row in rows.values()):
        raise EncoderError(f"prepare() returns {type(rows).__name__}; it must return a dict of tensors")
    module, layers = encoder.module.eval(), built.layers if built else None

    def make() -> Captured:
        return capture(module, rows, name=modality, layers=layers)

    return make() if built is None else _kept(module, rows, [modality, layers, settings], make)


@dataclasses.dataclass(frozen=True)
class Shorter:
    """An encoder of texts whose padding it masks: what its shorter texts are captured of."""

    modality: str
    module: nn.Module
    rows: Mapping[str, Tensor]  # one sample's inputs, at the longest
    mask: str  # which of them is 0 at padding
    settings: Mapping[str, Any]

    @property
    def longest(self) -> int:
        return int(self.rows[self.mask].shape[0])

    @property
    def inputs(self) -> set[str]:
        return {f"{self.modality}.{name}" for name in self.rows}

    @property
    def long(self) -> list[str]:
        """Inputs that have tokens in their first dimension."""
        return [f"{self.modality}.{n}" for n, row in self.rows.items() if row.ndim and row.shape[0] == self.longest]

    def captured(self, length: int) -> Captured:
        """Of texts of `length` tokens. Raises GraphError."""
        rows = {name: self._cut(row, length) for name, row in self.rows.items()}

        def make() -> Captured:
            return capture(self.module, rows, name=self.modality)

        return _kept(self.module, rows, [self.modality, None, self.settings], make)

    def _cut(self, row: Tensor, length: int) -> Tensor:
        return row[:length] if row.ndim and row.shape[0] == self.longest else row


def shorter(encoder: Encoder, modality: str, settings: Mapping[str, Any]) -> Shorter | None:
    """None where it knows no padding, or there is no shorter length."""
    if not isinstance(encoder, BuiltEncoder) or encoder.mask is None:
        return None
    rows = encoder.prepare(encoder.example)
    found = Shorter(modality, encoder.module.eval(), rows, encoder.mask, settings)
    return found if len(lengths_of(found.longest)) > 1 else None


def captured_head(head: nn.Module, dims: Mapping[str, int]) -> Captured:
    """Raises GraphError."""
    rows: dict[str, Tensor] = {PRESENCE: torch.ones(len(dims), dtype=torch.bool)}
    rows |= {modality: torch.zeros(dim) for modality, dim in dims.items()}
    module = _HeadCall(head).eval()

    def make() -> Captured:
        return capture(module, rows, name=HEAD)

    return _kept(module, rows, [HEAD], make)


def example_medium(modality: str) -> Any:
    """A medium to try an encoder on: a grey picture, a few words, a second of silence at 16 kHz."""
    from PIL import Image

    if modality == "image":
        return Image.new("RGB", (64, 48), (128, 128, 128))
    return "an example" if modality == "text" else (np.zeros(16_000, dtype=np.float32), 16_000)


class _HeadCall(nn.Module):
    """A head as capture wants it: keyword tensors in, one tensor per depth out."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, presence: Tensor, **embeddings: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.head, DepthHead):
            return tuple(self.head.all_depths(embeddings, presence))
        return (self.head(embeddings, presence),)


def _kept(module: nn.Module, rows: Mapping[str, Tensor], about: Any, make: Callable[[], Captured]) -> Captured:
    """What `make` captures of `module`, or captured before in this user's cache of the same module."""
    folder = _folder()
    about_module = None if folder is None else _architecture(module)
    if about_module is None:
        return make()
    made: list[Captured] = []

    def make_plain() -> bytes:
        made.append(make())
        return recapture.forget_weights(made[0], module)

    inputs = {name: [list(row.shape), str(row.dtype)] for name, row in rows.items()}
    known = json.dumps([about, inputs, about_module, versions(), _code()], sort_keys=True, default=str)
    try:
        # in silence where the folder can't be used: the cache of embeddings is beside it, and tells
        content = kept(
            folder,
            f"{hashlib.sha256(known.encode()).hexdigest()}.graph",
            make_plain,
            tell=lambda text: None,
            limit_bytes=_LIMIT_BYTES,
        )
    except plain.Unwritable:
        content = b""
    return made[0] if made else recapture.with_weights(content, module)


def _folder() -> Path | None:
    where = cache.folder()
    return None if where is None else where / "captured"


def _architecture(module: nn.Module) -> Any:
    """All that a module tells of itself but the numbers in its weights; None where a part of it is not known."""
    parts = []
    for path, part in module.named_modules():
        kind = type(part)
        if not any(kind.__module__ == known or kind.__module__.startswith(f"{known}.") for known in _KNOWN):
            return None
        try:
            settings = _plain({name: value for name, value in vars(part).items() if name not in _BASE})
        except _Unknown:
            return None
        parts.append([path, _name(kind), part.extra_repr(), settings])
    alike = recapture.aliases(module)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [parts, [[name, alike[name], list(t.shape), t.stride(), str(t.dtype)] for name, t in tensors]]


_BASE = frozenset(vars(nn.Module()))


class _Unknown(Exception):
    """An attribute that can't be told from another."""


def _plain(value: Any) -> Any:
    """An attribute as JSON: settings as they are, functions and objects by their names. Raises _Unknown."""
    if isinstance(value, enum.Enum):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, set | frozenset):  # in no order of its own
        return sorted(map(str, map(_plain, value)))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, torch.dtype | torch.device | np.generic):
        return str(value)
    if isinstance(value, Tensor | np.ndarray):
        return [str(value.dtype), torch.as_tensor(value).tolist()]
    if isinstance(value, functools.partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [
            _name(type(value)),
            _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}),
        ]
    if callable(getattr(value, "to_dict", None)):  # a configuration of transformers'
        return _plain(value.to_dict())
    name = _name(value if callable(value) and hasattr(value, "__qualname__") else type(value))
    if "<" in name:  # a lambda, or a function inside another
        raise _Unknown(name)
    return name


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


@functools.cache
def _code() -> str:
    """A hash of the code that encoders, heads and capture are made of."""
    total = hashlib.sha256(Path(__file__).read_bytes())
    for package in _CODE:
        for folder in importlib.import_module(package).__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()
