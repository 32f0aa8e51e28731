"""The nouns that all of mmpipe shares. Read after graphs/plan.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODALITIES = ("image", "text", "audio")


@dataclass(frozen=True)
class Sample:
    """One item: up to three modalities, any may be missing.

    `media` maps a modality to what is known of it: for files a `pathlib.Path` (nothing has been opened yet); for
    text given in place a `str`; from Python also bytes, a PIL image, an array or tensor, or (samples, rate_hz).
    `keep` holds manifest columns that travel to the output unchanged.
    """

    id: str
    media: Mapping[str, Any]
    keep: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """The answer for one sample: one row of the output table."""

    id: str
    status: str  # ok | partial | failed
    error: str | None = None  # "modality:code: text"
    label: str | None = None
    confidence: float | None = None
    top_k: tuple[tuple[str, float], ...] = ()
    answered_by: str | None = None  # the exit that answered: "image", "image+text", "all"
    deliberated: bool = False
    present: tuple[str, ...] = ()
    used: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()  # not needed, never opened
    failed: tuple[str, ...] = ()
    keep: Mapping[str, Any] = field(default_factory=dict)
    probabilities: tuple[float, ...] | None = None  # label order
    embeddings: Mapping[str, Any] | None = None  # modality -> float32 array [dim], L2-normalised
    embedding: Any | None = None  # float32 array, all modalities side by side
