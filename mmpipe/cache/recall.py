"""What one run asks of the cache: the embedding of a content, under the part of the numerics that made it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpipe.cache.store import Store


@dataclass(frozen=True)
class Form:
    """What an encoder's embeddings depend on besides the medium, as a hash; and what they look like."""

    digest: bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Recall:
    """Embeddings by content: of the encoders in `forms`, and no others."""

    def __init__(self, store: Store, forms: Mapping[str, Form]) -> None:
        self.store, self.forms = store, forms

    def find(self, branch: str, content: bytes) -> Tensor | None:
        """The embedding [dim] that computing would give, to the bit; None: it is not known."""
        form = self.forms[branch]
        key = _key(form, content)
        value = self.store.get_many([key]).get(key)
        if value is None or len(value) != form.bytes:
            return None
        return torch.frombuffer(bytearray(value), dtype=form.dtype).reshape(form.shape)

    def keep(self, branch: str, contents: Sequence[bytes], embeddings_KD: Tensor) -> None:
        """One content for each row."""
        form = self.forms[branch]
        rows = embeddings_KD.contiguous().reshape(len(contents), -1).view(torch.uint8).numpy()
        self.store.put_many({_key(form, content): row.tobytes() for content, row in zip(contents, rows, strict=True)})


def _key(form: Form, content: bytes) -> bytes:
    return hashlib.sha256(form.digest + content).digest()
