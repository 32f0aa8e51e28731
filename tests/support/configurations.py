"""A configuration with every key, and what the tests of mmpipe.config share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmpipe.config import load
from mmpipe.errors import ConfigError

EXAMPLE = """\
task: classify
labels: [shirt, bag, sandal]
encoders:
  image: {model: "open_clip:ViT-B-32/laion2b_s34b_b79k"}
  text:  {model: "hf:sentence-transformers/all-MiniLM-L6-v2", max_tokens: 64}
  audio: {model: "hf:laion/clap-htsat-unfused", max_seconds: 10}
fusion:
  head: zero_shot
  checkpoint: null
  modalities:
    text: {prompts: ["{}", "a listing for a {}"], weight: 1.0}
  exits:
    - {after: image, threshold: 0.95}
    - {after: [image, text], threshold: 0.90}
  confidence: max_probability
  calibration: null
  on_mismatch: error
  audit: {share: 0%, on_drift: warn}
  deliberate: null
runtime: {device: auto, dtype: auto, backend: auto, schedule: auto, batch_size: auto, memory_limit: auto, cache: auto, \
cache_limit: 10GB}
input: {folder: media/, pair_by: stem}
output: {folder: out/, top_k: 3, probabilities: false, embeddings: false, thumbnails: true, shard_rows: 1024}
"""

IMAGE = "encoders:\n  image: {model: org/name}\n"
THREE = "encoders:\n  image: {model: org/a}\n  text: {model: org/b}\n  audio: {model: org/c}\n"
START = f"labels: [a, b]\n{IMAGE}"  # three lines
START3 = f"labels: [a, b]\n{THREE}"  # five lines
START2 = "labels: [a, b]\nencoders:\n  "  # an encoder follows, on line 3
EXITS = f"{START3}fusion:\n  exits:\n  - "  # an exit follows, on line 8


def written(folder: Path, text: str | bytes, name: str = "shop.yaml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refused(source: Any, **arguments: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(source, **arguments)
    assert "pydantic" not in str(caught.value).lower()
    assert "input should be" not in str(caught.value).lower()
    return caught.value
