"""Exits inside encoders: their layers are found, a probe reads what it was trained on, and who doesn't leave pays with
nothing but the probe: the answer is the whole encoder's."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from support import hub

from mmpipe import Pipeline
from mmpipe.config import load
from mmpipe.fusion.checkpoint import save_checkpoint
from mmpipe.fusion.heads import LinearHead

LABELS = ["one", "two", "three"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return hub.Models(tmp_path_factory.mktemp("models"))


def encoder(name, models):
    """modality, what the configuration says of it, some media, layers that it has."""
    if name == "minilm":  # the real one
        return "text", {"model": f"hf:{hub.minilm()}", "max_tokens": 24}, [text for text in hub.texts(8) if text], 6
    if name == "bert":
        return "text", {"model": f"hf:{models('bert')}", "max_tokens": 16}, [text for text in hub.texts(8) if text], 3
    if name == "open_clip":
        return "image", {"model": f"open_clip:{models(name)}"}, hub.pictures(7), 3
    return "image", {"model": f"hf:{models(name)}"}, hub.pictures(7), 3


@pytest.mark.parametrize("name", ["minilm", "bert", "vit", "clip", "open_clip"])
def test_depth_exits(name, models, tmp_path):
    modality, settings, media, layers = encoder(name, models)
    base = {"labels": LABELS, "encoders": {modality: settings}, "runtime": {"batch_size": 4, "dtype": "float32"}}
    places = [f"{modality}.layer1", f"{modality}.layer{layers - 1}"][: layers - 1]
    exits = [{"after": place, "threshold": 0.5} for place in places]
    samples = [{"id": str(n), modality: medium} for n, medium in enumerate(media)]

    bare = {**base, "fusion": {"head": "linear", "exits": exits}}
    with Pipeline(load(bare, training=True), encoders_only=True) as pipeline:
        found = [pipeline._sample(sample, n) for n, sample in enumerate(samples)]
        _, outcome = pipeline.run(found, exits=False)
        dim = pipeline.built.preparations[modality].dim
    states, whole = {place: outcome.embeddings[place] for place in places}, outcome.embeddings[modality]
    assert all(state.ndim == 2 and state.std(0).max() > 0 for state in states.values())

    torch.manual_seed(0)
    head = LinearHead({modality: dim}, LABELS)
    probes = {f"{place}.weight": torch.randn(3, state.shape[1]) for place, state in states.items()}
    probes |= {f"{place}.bias": torch.randn(3) for place in places}
    path = tmp_path / "head.safetensors"
    save_checkpoint(path, head, kind="linear", labels=LABELS, dims={modality: dim}, probes=probes)
    made = {**base, "fusion": {"head": "linear", "checkpoint": str(path), "exits": exits}}
    with Pipeline.load(made) as pipeline:
        segments, logits = len(pipeline.plan.segments), {}
        with ExitStack() as stack:
            for number, place in enumerate(places):
                value, logits[place] = pipeline.plan.exits[number].value, []
                keep = partial(lambda kept, value, o: kept.append(o.values[value]), logits[place], value)
                stack.enter_context(pipeline.observe(f"head@{number}", keep))
            _, outcome = pipeline.run(found, exits=False, embeddings=True)
        embedded = outcome.embeddings[modality]
    assert segments == 2 * (len(places) + 1)  # a part of the encoder and a probe or head for each stage
    # Nobody left: the encoder in pieces says what the encoder in one says.
    assert (embedded - whole).abs().max() <= 1e-5 * whole.abs().max()
    for place, state in states.items():  # the probe reads what it would have been trained on
        want = state @ probes[f"{place}.weight"].T + probes[f"{place}.bias"]
        assert (torch.cat(logits[place]) - want).abs().max() <= 1e-4 * want.abs().max()
