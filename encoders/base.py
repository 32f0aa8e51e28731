"""What an encoder is: host preparation of one decoded medium, and a module from tensors to an embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class EncoderError(ValueError):
    """An encoder can't be found, loaded or given what it was given. The message says what to do.

    `key`: the argument that is wrong.
    """

    def __init__(self, message: str, key: str = "model") -> None:
        super().__init__(message)
        self.key = key


class MissingPackage(EncoderError):
    """A package that this kind of model needs is not installed; `extra` names the optional dependency."""

    def __init__(self, package: str, extra: str, model: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f"{model} needs the package '{package}': pip install 'mmpipe[{extra}]'")


@runtime_checkable
class Encoder(Protocol):
    """The least that a user's own encoder has. Built-in ones have more: see `BuiltEncoder`."""

    modality: str
    dim: int
    module: nn.Module

    def prepare(self, media: Any) -> dict[str, Tensor]:
        """One decoded medium → tensors without a batch dimension, of the same shapes for every sample.

        `media` is a PIL image in RGB; a str; or (float32 mono samples [n], sample rate in Hz).
        """
        ...


class BuiltEncoder:
    """An encoder as this package builds them.

    module(**inputs), each input [batch, …], returns the embedding [batch, dim], not normalised unless the model
    normalises it itself.
    """

    def __init__(
        self,
        *,
        modality: str,
        dim: int,
        module: nn.Module,
        prepare: Callable[[Any], dict[str, Tensor]],
        example: Any,
        preprocessing: dict[str, Any],
        layers: str | None = None,
        mask: str | None = None,
        prompts: Callable[[Sequence[str]], Tensor] | None = None,
        logit_scale: float | None = None,
        max_seconds: float | None = None,
        margin_seconds: float = 0.0,
        smallest_side: int | None = None,
        grey: bool = False,
        prepare_fast: Callable[[Any], dict[str, Tensor]] | None = None,
        notes: Sequence[str] = (),
        files: Sequence[str] = (),
    ) -> None:
        self.modality, self.dim, self.module = modality, dim, module.eval().requires_grad_(False)
        self.host = prepare
        self.example = example  # a decoded medium that prepare() accepts: what capture is run on
        self.preprocessing = preprocessing  # JSON-able: everything that shapes prepare(); part of the fingerprint
        self.layers = layers  # path of the ModuleList inside module whose items are the layers; None: no depth exits
        self.mask = mask  # the input [batch, tokens] that is 0 at padding; None: none
        self.prompts = prompts  # texts → [n, dim] in this encoder's space (the paired text tower); None: no zero-shot
        self.logit_scale = logit_scale  # the model's own, already exponentiated; None: it has none
        self.max_seconds = max_seconds  # sound beyond this is not heard; None: all is
        self.margin_seconds = margin_seconds  # of sound beyond that which its resampler's filter still sees
        # pixels: a picture that need not be exact may come scaled down, its shorter side no less than this; None: never
        self.smallest_side = smallest_side
        self.grey = grey  # prepare() makes pictures grey, so that it takes them in mode L where they are
        self.prepare_fast = prepare_fast or prepare  # as prepare, for pictures that need not be exact: faster, close by
        self.notes = tuple(notes)  # what a user should know ("sound beyond 10 s: the first window is used")
        self.record = ""  # what tells its weights and files from others', where they are known; for who keeps results
        self.files = tuple(files)  # what was read from disk: weights first, then configuration and tokeniser

    def prepare(self, media: Any) -> dict[str, Tensor]:
        return self.host(media)

    def release(self) -> None:
        """Drop the module and the text tower; `prepare` still works. For callers that have captured the module."""
        self.module, self.prompts = nn.Module(), None


def output_dim(module: nn.Module, inputs: dict[str, Tensor]) -> int:
    """The embedding's width, found by running one sample's prepared `inputs` through `module`."""
    with torch.inference_mode():
        out = module.eval()(**{name: value.unsqueeze(0) for name, value in inputs.items()})
    if out.ndim != 2 or out.shape[0] != 1:
        raise EncoderError(f"the module returned shape {tuple(out.shape)} for one sample; expected [1, dim]")
    return int(out.shape[1])


def layers_path(module: nn.Module, count: int) -> str | None:
    """The path of the outermost ModuleList with `count` items: the transformer's layers; None if there is none."""
    found = [name for name, child in module.named_modules() if isinstance(child, nn.ModuleList) and len(child) == count]
    return min(found, key=lambda name: name.count("."), default=None)
