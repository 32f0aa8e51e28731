"""Observers: what passes a place of the graph, as copies, with the samples' ids; and nothing changes."""

from __future__ import annotations

import pytest
import torch
from support import shop

from mmpipe import InputError, Pipeline
from mmpipe import media as media_module


@pytest.fixture(scope="module")
def samples(pipeline, tmp_path_factory):
    return list(pipeline.find(shop.media(tmp_path_factory.mktemp("media"), 40)).samples)


def test_observing_every_segment_changes_no_row_and_sees_every_row(pipeline, samples):
    want = pipeline.predict(samples)
    seen = []
    with pipeline.observe("image@0", seen.append), pipeline.observe("head@1", seen.append):
        assert pipeline.predict(samples) == want
    image = [name for one in seen if one.where == "image@0" for name in one.ids]
    assert image == [sample.id for sample in samples if "image" in sample.media]
    assert all(len(value) == len(one.ids) for one in seen for value in one.values.values())
    count = len(seen)
    assert pipeline.predict(samples) == want
    assert len(seen) == count  # nobody looks any more


def test_a_layer_and_an_embedding_are_what_the_encoder_computes(pipeline, samples):
    """Against the encoder's own module, up to where it is watched."""
    from mmpipe.encoders import tiny

    chosen = [sample for sample in samples if "image" in sample.media][:5]
    seen = {}
    with (
        pipeline.observe("image", lambda one: seen.__setitem__("embedding", one.tensor)),
        pipeline.observe("image.layer2", lambda one: seen.__setitem__("layer", one.tensor)),
    ):
        predictions = pipeline.predict(chosen)
    encoder = tiny.load("photo", "image", weights=pipeline.config.resolve(pipeline.config.encoders["image"].weights))
    rows = [encoder.prepare(media_module.load("image", sample.media["image"])) for sample in chosen]
    layers = []
    encoder.module.layers[1].register_forward_hook(lambda module, given, result: layers.append(result))
    with torch.inference_mode():
        want = encoder.module(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    assert (seen["embedding"] - want).abs().max() <= 1e-5 * want.abs().max()
    assert (seen["layer"] - layers[0]).abs().max() <= 1e-5 * layers[0].abs().max()
    assert len(predictions) == len(chosen)


def test_what_an_observer_gets_is_a_copy(pipeline, samples):
    want = pipeline.predict(samples)
    with pipeline.observe("text", lambda one: one.tensor.fill_(1e9)):
        assert pipeline.predict(samples) == want


def test_what_an_observer_raises_ends_that_run_and_no_other(pipeline, samples):
    want = pipeline.predict(samples)

    def fails(seen):
        raise LookupError("enough")

    with pipeline.observe("image@0", fails), pytest.raises(LookupError, match="enough"):
        pipeline.predict(samples)
    assert pipeline.predict(samples) == want


@pytest.mark.parametrize("where", ["nowhere", "image@7", "image.layer9", "image.layer", "video"])
def test_a_place_that_is_not_there_names_those_that_are(pipeline, where):
    with pytest.raises(InputError, match=r"image@0|3 layers"), pipeline.observe(where, print):
        pass


def test_in_a_single_call_and_in_parallel_too(weights):
    for schedule in ("cascade", "parallel"):
        with Pipeline.load({**shop.config(weights, shop.EXITS), "runtime": {"schedule": schedule}}) as made:
            seen = []
            with made.observe("text", seen.append):
                made(text="a red mug", id="mug")
            assert [one.ids for one in seen] == [["mug"]]
