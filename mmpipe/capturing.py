"""Encoders and heads → captured graphs, kept between runs where all that shapes them is known.

torch.export takes most of the time until a pipeline's first result. What it finds depends on the architecture, on the
code and on the libraries, all of which a name is made of; what has a part of the user's own may depend on anything, and
is captured every time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmpipe import remembering
from mmpipe.architectures import architecture
from mmpipe.encoders import BuiltEncoder, Encoder, EncoderError
from mmpipe.encoders.recorded import RecordedModule
from mmpipe.fusion.heads import DepthHead
from mmpipe.graphs import plain, recapture
from mmpipe.graphs.capture import Captured, capture
from mmpipe.graphs.lengths import lengths_of
from mmpipe.graphs.plan import HEAD, PRESENCE, GraphError
from mmpipe.vetting import vet_encoder, vet_encoder_rows, vet_head, vet_head_rows


def captured_encoder(encoder: Encoder, modality: str, settings: Mapping[str, Any]) -> Captured:
    """`settings`: what the encoder was made of, besides its module. Raises EncoderError, GraphError."""
    built = encoder if isinstance(encoder, BuiltEncoder) else None
    example = built.example if built else example_medium(modality)
    rows = encoder.prepare(example)
    if not isinstance(rows, Mapping) or not all(isinstance(row, Tensor) for row in rows.values()):
        raise EncoderError(f"prepare() returns {type(rows).__name__}; it must return a dict of tensors")
    module, layers = encoder.module.eval(), built.layers if built else None

    def make(whole: nn.Module) -> Captured:
        return capture(whole, rows, name=modality, layers=layers)

    if built is not None:
        return _kept(module, rows, [modality, layers, settings], make)
    captured = make(module)
    vet_encoder(captured, encoder.dim)
    vet_encoder_rows(module, rows)
    return captured


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

        def make(whole: nn.Module) -> Captured:
            return capture(whole, rows, name=self.modality)

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


def captured_head(head: nn.Module, dims: Mapping[str, int], labels: int, *, own: bool) -> Captured:
    """`own`: written by the user. Raises GraphError, HeadError."""
    rows: dict[str, Tensor] = {PRESENCE: torch.ones(len(dims), dtype=torch.bool)}
    rows |= {modality: torch.zeros(dim) for modality, dim in dims.items()}
    module = _HeadCall(head).eval()

    def make(whole: nn.Module) -> Captured:
        return capture(whole, rows, name=HEAD)

    captured = _kept(module, rows, [HEAD], make)
    vet_head(captured, labels)
    if own:
        vet_head_rows(module, rows)
    return captured


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


def _kept(module: nn.Module, rows: Mapping[str, Tensor], about: Any, make: Callable[[nn.Module], Captured]) -> Captured:
    """What `make` captures of `module`, or captured before in this user's cache of the same module. Of one that was
    recorded it is captured whole, and gets the recorded one's weights. Raises GraphError."""
    about_module = None if remembering.folder() is None else _architecture(module)
    if about_module is None:
        return make(_whole(module))
    made: list[Captured] = []

    def make_plain() -> bytes:
        whole = _whole(module)
        made.append(make(whole))
        content = recapture.forget_weights(made[0], whole)
        if whole is not module:
            made[0] = recapture.with_weights(content, module)
        return content

    inputs = {name: [list(row.shape), str(row.dtype)] for name, row in rows.items()}
    try:
        content = remembering.kept_as("graph", [about, inputs, about_module], make_plain)
    except plain.Unwritable:
        content = b""
    return made[0] if made else recapture.with_weights(content, module)


def _architecture(module: nn.Module) -> str | None:
    return module.about if isinstance(module, RecordedModule) else architecture(module)


def _whole(module: nn.Module) -> nn.Module:
    """With its computation. Raises GraphError where it can't be had any more, or is another by now."""
    if not isinstance(module, RecordedModule):
        return module
    try:
        whole = module.whole()
    except EncoderError as error:
        raise GraphError(f"the model can't be loaded again: {error}") from error
    if architecture(whole) != module.about:
        raise GraphError("the model's files were changed while it was in use")
    return whole
