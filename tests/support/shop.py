"""A small shop: real media written on the fly, and a pipeline of the small encoders with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from mmpipe.encoders import tiny
from mmpipe.fusion.checkpoint import save_checkpoint
from mmpipe.fusion.heads import TransformerHead

LABELS = ["mug", "lamp", "chair", "book"]
EXITS = [{"after": "image", "threshold": 0.55}, {"after": ["image", "text"], "threshold": 0.55}]
KINDS = {"image": "photo", "text": "title", "audio": "note"}


def weights(folder: Path, probes: tuple[str, ...] = ("image.layer1", "text.layer1")) -> Path:
    """Random weights of the three encoders and of a head with probes, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(11)
    nets = {"photo": tiny.PhotoNet(), "title": tiny.TitleNet(), "note": tiny.NoteNet()}
    for name, net in nets.items():
        tiny.save(folder / f"{name}.safetensors", name, net)
    dims = dict.fromkeys(KINDS, tiny.DIM)
    options = {"width": 32, "depth": 2, "heads": 2}
    head = TransformerHead(dims, LABELS, **options)
    with torch.no_grad():
        for answer in head.answers:
            answer[1].weight.mul_(6.0)  # so that random confidence spreads from unsure to sure
    found = {}
    for place in probes:
        found[f"{place}.weight"] = torch.randn(len(LABELS), probe_width(nets, place)) * 2
        found[f"{place}.bias"] = torch.zeros(len(LABELS))
    save_checkpoint(
        folder / "head.safetensors", head, kind="transformer", labels=LABELS, dims=dims, options=options, probes=found
    )
    return folder


def probe_width(nets: dict[str, torch.nn.Module], place: str) -> int:
    """Features of the state after a layer: found by running the encoder's layers."""
    modality = place.split(".")[0]
    net = nets[KINDS[modality]]
    seen: list[int] = []
    hook = net.layers[0].register_forward_hook(lambda module, given, out: seen.append(_features(out)))
    encoder_inputs = {
        "image": lambda: tiny.prepare_photo(Image.new("RGB", (40, 30))),
        "text": lambda: tiny.prepare_title("a red mug"),
        "audio": lambda: tiny.prepare_note((np.zeros(8000, np.float32), 16000)),
    }[modality]()
    with torch.no_grad():
        net.eval()(**{name: row[None] for name, row in encoder_inputs.items()})
    hook.remove()
    return seen[0]


def _features(state: torch.Tensor) -> int:
    return state.shape[1] if state.ndim == 4 else state.shape[-1]  # convolutions have theirs first


def media(folder: Path, count: int = 10, seed: int = 0) -> Path:
    """`count` items with every mix of modalities, names that sort by number."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    words = ["red", "old", "oak", "tall", "tea", "desk", "paper", "steel", "soft", "light", "blue", "signed"]
    for number in range(count):
        has = [number % 7 != 3, number % 5 != 2, number % 3 != 1]
        if not any(has):
            has[0] = True
        stem = folder / f"item-{number:03d}"
        if has[0]:
            pixels = random.integers(0, 256, (random.integers(20, 90), random.integers(20, 90), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(stem.with_suffix(".png"))
        if has[1]:
            stem.with_suffix(".txt").write_text(" ".join(random.choice(words, 4)), encoding="utf-8")
        if has[2]:
            sound = random.normal(0, 0.1, 16000).astype(np.float32)
            soundfile.write(stem.with_suffix(".wav"), sound, 16000)
    return folder


def config(weights_folder: Path, exits: list[dict[str, Any]] | None = None, **sections: Any) -> dict[str, Any]:
    """A configuration of the small encoders; `sections` replace or add top-level keys."""
    made: dict[str, Any] = {
        "task": "classify",
        "labels": LABELS,
        "encoders": {
            modality: {"model": f"tiny:{kind}", "weights": str(weights_folder / f"{kind}.safetensors")}
            for modality, kind in KINDS.items()
        },
        "fusion": {
            "head": "transformer",
            "checkpoint": str(weights_folder / "head.safetensors"),
            "exits": exits or [],
        },
        "runtime": {"batch_size": 8},
    }
    return {**made, **sections}


def write(path: Path, made: dict[str, Any]) -> Path:
    """JSON is YAML."""
    path.write_text(json.dumps(made, indent=1), encoding="utf-8")
    return path
