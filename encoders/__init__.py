"""Model id → Encoder: host preparation of one decoded medium, and an `nn.Module` from tensors to an embedding.

    encoder = load("hf:sentence-transformers/all-MiniLM-L6-v2", "text")
    inputs = encoder.prepare("a red shoe")                                  # one sample, no batch dimension
    encoder.module(**{name: x[None] for name, x in inputs.items()})         # [1, 384]

Read base.py first (what an encoder is), then hub.py (how an id is looked up).
"""

from __future__ import annotations

from mmpipe.encoders.base import BuiltEncoder, Encoder, EncoderError, MissingPackage
from mmpipe.encoders.hub import load, pull, register

__all__ = ["BuiltEncoder", "Encoder", "EncoderError", "MissingPackage", "load", "pull", "register"]
