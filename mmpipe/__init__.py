"""mmpipe: multimodal inference pipelines in one fused torch.fx graph, with early exits.

from mmpipe import Pipeline

with Pipeline.load("quickstart") as pipeline:
    pipeline(image="shoe.jpg", text="trail runner").label
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmpipe.errors import (
    ConfigError,
    InputError,
    Interrupted,
    MediaError,
    MissingExtraError,
    MmpipeError,
    ModelError,
    OutputError,
)
from mmpipe.types import Prediction, Sample

if TYPE_CHECKING:
    from mmpipe.pipeline import Pipeline

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "InputError",
    "Interrupted",
    "MediaError",
    "MissingExtraError",
    "MmpipeError",
    "ModelError",
    "OutputError",
    "Pipeline",
    "Prediction",
    "Sample",
]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":  # brings torch: only when it is asked for
        from mmpipe.loading import collector_paused

        with collector_paused():
            from mmpipe.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'mmpipe' has no attribute {name!r}")
