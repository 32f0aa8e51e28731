"""The pipeline as users call it: real media, the small encoders with random weights, every way in."""

from __future__ import annotations

import gc
import io
import itertools
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from support import shop

import mmpipe
from mmpipe import Pipeline, Sample, engine
from mmpipe.graphs.fuse import outputs_of
from mmpipe.jobs.tally import Tally
from mmpipe.runtime import executor

ALL_KINDS = [
    {"after": "image.layer1", "threshold": 0.8},
    {"after": "image", "threshold": 0.6},
    {"after": ["image", "text"], "threshold": 0.6},
    {"after": "head.layer1", "threshold": 0.8},
]
NEVER = [{**exit_, "threshold": 1.0} for exit_ in ALL_KINDS]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return shop.media(tmp_path_factory.mktemp("media"), 30)


@pytest.fixture(scope="module")
def full(weights):
    with Pipeline.load(shop.config(weights)) as made:
        yield made


@pytest.fixture(scope="module")
def samples(pipeline, media):
    return list(pipeline.find(media).samples)


def without_id(prediction):
    return {name: value for name, value in vars(prediction).items() if name not in ("id", "embedding", "embeddings")}


def test_the_way_in_from_the_readme(pipeline):
    prediction = pipeline(text="a red mug")
    assert prediction.status == "ok"
    assert prediction.label in shop.LABELS
    assert prediction.present == prediction.used == ("text",)
    assert prediction.top_k[0] == (prediction.label, pytest.approx(prediction.top_k[0][1]))
    assert len(prediction.top_k) == 3


def test_every_subset_of_modalities_answers(pipeline, samples):
    sample = next(sample for sample in samples if len(sample.media) == 3)
    for size in (1, 2, 3):
        for names in itertools.combinations(sample.media, size):
            prediction = pipeline(**{name: sample.media[name] for name in names})
            assert prediction.status == "ok", names
            assert set(prediction.present) == set(names)
            assert set(prediction.used) | set(prediction.skipped) == set(names)


def test_what_a_picture_and_a_sound_may_be(pipeline, samples):
    sample = next(sample for sample in samples if {"image", "audio"} <= set(sample.media))
    path, wav = sample.media["image"], sample.media["audio"]
    pixels = np.asarray(Image.open(path))
    frames, rate = soundfile.read(wav, dtype="float32")
    ways = [
        {"image": path, "audio": wav},
        {"image": str(path), "audio": str(wav)},
        {"image": path.read_bytes(), "audio": wav.read_bytes()},
        {"image": Image.open(path), "audio": (frames, rate)},
        {"image": pixels, "audio": (torch.from_numpy(frames), rate)},
        {"image": torch.from_numpy(pixels.copy()).permute(2, 0, 1), "audio": (frames[None], rate)},
    ]
    first, *others = pipeline.predict(ways)
    assert first.status == "ok"
    for other in others:
        assert without_id(other) == without_id(first)


def test_a_string_is_a_text_and_a_path_is_a_file(pipeline, tmp_path):
    file = tmp_path / "title.txt"
    file.write_text("old oak desk", encoding="utf-8")
    assert without_id(pipeline(text="old oak desk")) == without_id(pipeline(text=file))


def test_order_is_kept_and_a_batch_is_each_sample_alone(pipeline, samples):
    together = pipeline.predict(samples)
    assert [prediction.id for prediction in together] == [sample.id for sample in samples]
    assert [pipeline.predict([sample])[0] for sample in samples] == together
    assert list(reversed(pipeline.predict(list(reversed(samples))))) == together
    assert list(pipeline.stream(iter(samples))) == together


def test_stream_takes_an_iterator_that_never_ends(pipeline):
    endless = ({"text": f"mug {number}"} for number in itertools.count())
    assert [prediction.id for prediction in itertools.islice(pipeline.stream(endless), 40)] == [
        str(n) for n in range(40)
    ]


@pytest.mark.parametrize("exits", [shop.EXITS, NEVER], ids=["modalities", "every kind"])
def test_exits_that_never_fire_change_nothing(weights, full, samples, exits):
    never = [{**exit_, "threshold": 1.0} for exit_ in exits]
    want = full.predict(samples)
    with Pipeline.load(shop.config(weights, never)) as made:
        got = made.predict(samples)
    assert {prediction.answered_by for prediction in got} == {"all"}
    for one, other in zip(want, got, strict=True):
        assert one.label == other.label
        assert one.confidence == pytest.approx(other.confidence, abs=1e-5)


def test_the_full_pipeline_is_its_graph(full, samples):
    """`exits: []` against the fused GraphModule called by hand, on prepared rows."""
    whole = [sample for sample in samples if len(sample.media) == 3][:5]
    built = full.built
    from mmpipe import media as media_module

    rows = {}
    for name, preparation in built.preparations.items():
        prepared = [preparation.prepare(media_module.load(name, sample.media[name])) for sample in whole]
        rows |= {f"{name}.{key}": torch.stack([row[key] for row in prepared]) for key in prepared[0]}
    given = [*rows.values(), torch.ones(len(whole), 3, dtype=torch.bool)]
    with torch.no_grad():
        want = full.graph(*given)["exits"]["all"].softmax(-1)
    for row, prediction in enumerate(full.predict(whole)):
        assert prediction.confidence == pytest.approx(float(want[row].max()), abs=1e-5)


def test_editing_a_node_of_the_graph_changes_what_runs(weights, samples):
    with Pipeline.load(shop.config(weights, shop.EXITS)) as made:
        before = made.predict(samples)
        graph = made.graph
        for answer in set(outputs_of(graph.graph)["exits"].values()):
            with graph.graph.inserting_after(answer):
                flipped = graph.graph.call_function(torch.ops.aten.mul.Tensor, (answer, -1.0))
            answer.replace_all_uses_with(flipped, delete_user_cb=lambda user, new=flipped: user is not new)
        graph.recompile()
        after = made.predict(samples)
    assert all(one.label != other.label for one, other in zip(before, after, strict=True))


def test_changing_a_constant_of_a_node_is_enough(weights, samples):
    """An existing node, edited in place."""
    with Pipeline.load(shop.config(weights)) as made:
        before = made.predict(samples)
        node = next(n for n in made.graph.graph.nodes if n.target is torch.ops.aten.softmax.int)
        node.target = torch.ops.aten.log_softmax.int
        made.graph.recompile()
        after = made.predict(samples)
    assert before != after


def test_no_encoder_module_is_called_after_the_build(weights, samples, monkeypatch):
    from mmpipe.encoders import tiny

    with Pipeline.load(shop.config(weights)) as made:
        for net in (tiny.PhotoNet, tiny.TitleNet, tiny.NoteNet):
            monkeypatch.setattr(net, "forward", None)
        assert made(image=samples[0].media["image"]).status == "ok"


def test_a_broken_file_that_nobody_needed_leaves_the_row_ok(pipeline, samples, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF not a sound")
    early = next(p for p in pipeline.predict(samples) if p.answered_by == "image")
    source = next(sample for sample in samples if sample.id == early.id)
    prediction = pipeline.predict([Sample("x", {"image": source.media["image"], "audio": broken})])[0]
    assert (prediction.status, prediction.answered_by, prediction.skipped) == ("ok", "image", ("audio",))


def test_a_needed_medium_that_fails_makes_the_row_partial_and_all_of_them_make_it_failed(full, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n...")
    partial = full(image=broken, text="tea")
    assert (partial.status, partial.failed, partial.used) == ("partial", ("image",), ("text",))
    assert partial.error.startswith("image:corrupt: broken.png")
    assert without_id(partial)["confidence"] == full(text="tea").confidence
    failed = full(image=broken)
    assert (failed.status, failed.label, failed.answered_by) == ("failed", None, None)
    nothing = full.predict([{}])[0]
    assert nothing.status == "failed"
    assert nothing.error == "sample:no_media: has none of image, text, audio"


def test_embeddings_are_copies_of_unit_length_with_zeros_where_absent(full, samples):
    rows = full.embed(samples)
    assert rows.shape == (len(samples), 192)
    assert rows.dtype == np.float32
    for row, sample in zip(rows, samples, strict=True):
        for start, name in zip((0, 64, 128), ("image", "text", "audio"), strict=True):
            length = np.linalg.norm(row[start : start + 64])
            assert length == pytest.approx(1.0 if name in sample.media else 0.0, abs=1e-5)
    again = full.embed(samples[:1])
    assert np.array_equal(again[0], rows[0])
    assert again.base is None or again.base is not rows


def test_task_embed(weights, samples):
    made = shop.config(weights)
    made = {"task": "embed", "encoders": made["encoders"]}
    with Pipeline.load(made) as pipeline:
        prediction = pipeline.predict(samples)[0]
        assert prediction.label is None
        assert prediction.status == "ok"
        assert prediction.embedding.shape == (192,)
        assert set(prediction.embeddings) == set(samples[0].media)
        assert pipeline.plan.exits == ()


def test_an_early_exit_leaves_null_what_it_did_not_compute(weights, samples):
    made = shop.config(weights, [{"after": "image", "threshold": 0.0}], output={"embeddings": True})
    with Pipeline.load(made) as pipeline:
        for prediction in pipeline.predict(samples):
            if prediction.answered_by == "image":
                assert set(prediction.embeddings) == {"image"}
                assert (prediction.embedding is None) == (len(prediction.present) > 1)


@pytest.mark.parametrize(
    ("sample", "says"),
    [({"picture": "x.png"}, "picture"), ("x.png", "give a Sample"), (3, "give a Sample")],
)
def test_a_sample_that_is_none_is_an_error(pipeline, sample, says):
    with pytest.raises(mmpipe.InputError, match=says):
        pipeline.predict([sample])


def test_run_folder_writes_what_predict_says(pipeline, samples, media, tmp_path):
    import pyarrow.parquet as pq

    summary = pipeline.run_folder(media, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "predictions")
    want = pipeline.predict(samples)
    assert table.column("id").to_pylist() == [prediction.id for prediction in want]
    for name in ("status", "label", "confidence", "answered_by", "error"):
        assert table.column(name).to_pylist() == [getattr(prediction, name) for prediction in want]
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run == summary.run
    opened = {name: sum(name in p.used for p in want) for name in ("image", "text", "audio")}
    assert run["files_opened"] == opened
    assert sum(run["answered_by"].values()) == run["rows"] == len(samples)
    assert isinstance(summary.tally, Tally)


def test_public_names():
    assert mmpipe.__all__ == sorted(mmpipe.__all__)
    for name in mmpipe.__all__:
        assert getattr(mmpipe, name) is not None
    with pytest.raises(AttributeError):
        mmpipe.nothing  # noqa: B018


def test_a_configuration_may_be_a_file(weights, tmp_path):
    path = shop.write(tmp_path / "shop.yaml", shop.config(weights))
    with Pipeline.load(path, overrides=["output.top_k=1"]) as made:
        assert len(made(text="tea").top_k) == 1
    assert Path(path).exists()


@pytest.mark.parametrize(("schedule", "kept"), [("cascade", "auto"), ("parallel", "off")])
def test_a_shard_is_gone_once_it_has_been_told_of(weights, media, schedule, kept, cache, monkeypatch):
    """Without the collector, which comes late to a job: until then its samples and their account would pile up."""
    made: list[list[weakref.ref[Any]]] = []

    def watched(module, name):
        found: list[weakref.ref[Any]] = []

        class Watched(getattr(module, name)):
            def __init__(self, *given, **named):
                super().__init__(*given, **named)
                found.append(weakref.ref(self))

        monkeypatch.setattr(module, name, Watched)
        made.append(found)

    def alive():
        return [sum(one() is not None for one in found) for found in made]

    def done(samples, predictions, outcome):
        most.append(max(alive()))
        (failure,) = outcome.failures[0].values()
        assert failure.code == "truncated"
        # else it has the calls that raised it, and what they had in hand: megabytes for a photo
        assert failure.__traceback__ is failure.__cause__ is failure.__context__ is None

    watched(executor, "Shard")
    watched(engine, "Feed")
    most: list[int] = []
    runtime = {"schedule": schedule, "processes": 1, "batch_size": 4, "cache": kept}
    photo = io.BytesIO()
    Image.new("RGB", (64, 64)).save(photo, "PNG")
    broken = Sample("broken", {"image": photo.getvalue()[:-40], "text": "but it has words"})
    with Pipeline.load(shop.config(weights, shop.EXITS, runtime=runtime)) as pipeline:
        samples = list(pipeline.find(media).samples)
        gc.collect()
        gc.disable()
        try:
            pipeline.run_shards([[broken, *samples[first : first + 5]] for first in range(0, 30, 5)], done)
            left = alive()
        finally:
            gc.enable()
    assert [len(found) for found in made] == [6, 6]
    assert max(most) <= 3  # told of, on its way, and the last one told of
    assert left == [0, 0]
