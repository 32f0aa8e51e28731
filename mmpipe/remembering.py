"""What one start makes and the next can do without: captured graphs, encoders, what they say of labels.

Kept in the user's own folder, each under a name that is made of all that shapes it, code and versions included. With
it, the next start imports no model library and builds no model; weights are read where they are.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from mmpipe import cache
from mmpipe.architectures import architecture
from mmpipe.config import EncoderConfig
from mmpipe.encoders import BuiltEncoder, Encoder, recorded
from mmpipe.encoders import load as load_encoder
from mmpipe.encoders.hub import asked
from mmpipe.graphs.artefacts import fault, kept
from mmpipe.machine import processor, versions

_LIMIT_BYTES = 200 << 20  # of all: a graph takes some 100 kB, a tokeniser up to 20 MB, CLAP's filter banks 9 MB
_CODE = ("mmpipe.encoders", "mmpipe.fusion", "mmpipe.graphs")
_LIBRARIES = ("open_clip", "hf")  # kinds of models whose libraries take seconds


def folder() -> Path | None:
    where = cache.folder()
    return None if where is None else where / "captured"


def kept_as(
    suffix: str, about: Any, make: Callable[[], bytes], usable: Callable[[bytes], bool] = lambda content: True
) -> bytes:
    """What `make` made of all that `about` tells (JSON), now or before."""
    known = json.dumps([about, versions(), _code()], sort_keys=True, default=str)
    # in silence where the folder can't be used: the cache of embeddings is beside it, and tells
    return kept(
        folder(),
        f"{hashlib.sha256(known.encode()).hexdigest()}.{suffix}",
        make,
        tell=lambda text: None,
        limit_bytes=_LIMIT_BYTES,
        usable=usable,
    )


def known_encoder(settings: EncoderConfig, modality: str, base: Path) -> Encoder:
    """As loaded; where it was loaded before and its files are the same, without its library. Raises EncoderError."""

    def load_it() -> Encoder:
        return load_encoder(
            settings.model,
            modality,
            weights=settings.weights,
            max_tokens=settings.max_tokens,
            max_seconds=settings.max_seconds,
            options=settings.options,
            base=base,
        )

    def load_built() -> BuiltEncoder:
        encoder = load_it()
        assert isinstance(encoder, BuiltEncoder)
        return encoder

    where = folder()
    if where is None or settings.options:
        return load_it()
    what = asked(
        settings.model,
        modality,
        weights=settings.weights,
        max_tokens=settings.max_tokens,
        max_seconds=settings.max_seconds,
        base=base,
    )
    if what.kind not in _LIBRARIES or fault(where) is not None:
        return load_it()
    found: list[BuiltEncoder] = []

    def make() -> bytes:
        began_ns = time.time_ns()
        found.append(load_built())
        about = architecture(found[0].module)
        try:
            return b"" if about is None else recorded.written(found[0], what, about, began_ns)
        except recorded.Unrecordable:
            return b""  # so that it is not tried at every start

    def usable(content: bytes) -> bool:
        if content and (encoder := recorded.read(content, what, load_built)) is not None:
            found.append(encoder)
        return bool(found) or not content

    try:
        content = kept_as("encoder", asdict(what), make, usable)
    except recorded.Changing:  # or has just been downloaded: the next start will know
        content = b""
    encoder = found[0] if found else load_built()
    encoder.record = hashlib.sha256(content).hexdigest() if content else ""
    return encoder


def known_prompts(encoder: BuiltEncoder, texts: Sequence[str]) -> Tensor:
    """What the encoder's text side says of `texts`, [n, dim], to the same bits. Raises EncoderError."""
    assert encoder.prompts is not None
    if not encoder.record:
        return encoder.prompts(texts)
    ask, made = encoder.prompts, list[Tensor]()

    def make() -> bytes:
        made.append(ask(texts))
        return save({"texts": made[0].contiguous()})

    rounding = [torch.get_num_threads(), torch.get_float32_matmul_precision(), processor()]
    content = kept_as("prompts", [encoder.record, list(texts), rounding], make)
    return made[0] if made else load(content)["texts"]


@functools.cache
def _code() -> str:
    """A hash of the code that encoders, heads and capture are made of."""
    total = hashlib.sha256()
    for name in ("mmpipe.capturing", "mmpipe.architectures", "mmpipe.remembering"):
        total.update(Path(str(importlib.import_module(name).__file__)).read_bytes())
    for package in _CODE:
        for place in importlib.import_module(package).__path__:
            for path in sorted(Path(place).rglob("*.py")):
                total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()
