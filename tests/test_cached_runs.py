"""Runs with a cache: the same bytes, and nothing computed twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import shop

from mmpipe import Pipeline
from mmpipe.encoders import tiny
from mmpipe.fusion.checkpoint import save_checkpoint
from mmpipe.fusion.heads import TransformerHead
from mmpipe.types import Sample

RUNTIMES = {
    "lanes": {"batch_size": 8},
    "one row": {"batch_size": 4, "memory_limit": "1GB"},
    "parallel": {"batch_size": 8, "schedule": "parallel"},
}


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shop.media(tmp_path_factory.mktemp("media") / "shop", 30)


def opened(weights, exits=None, cache="auto", **sections):
    runtime = {"batch_size": 8, "cache": cache, **sections.pop("runtime", {})}
    return Pipeline.load(shop.config(weights, exits, runtime=runtime, **sections))


def plain(predictions):
    """Everything of a prediction, comparable to the bit."""
    return [
        {**vars(one), "embeddings": {name: table.tobytes() for name, table in (one.embeddings or {}).items()}}
        | {"embedding": None if one.embedding is None else one.embedding.tobytes()}
        for one in predictions
    ]


def ran(outcome):
    """Segment → rows that it computed."""
    rows: Counter[str] = Counter()
    for span in outcome.spans:
        if ":" not in span.step and not span.step.startswith("head"):
            rows[span.step] += span.rows
    return rows


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
@pytest.mark.parametrize("exits", [None, shop.EXITS], ids=["full", "exits"])
def test_rows_have_the_same_bytes_with_and_without(weights, folder, exits, runtime):
    def rows(cache, keep=slice(None)):
        with opened(weights, exits, cache, runtime=runtime) as pipeline:
            samples = pipeline.find(folder).samples[keep]
            predictions, outcome = pipeline.run(samples, embeddings=True)
            return plain(predictions), outcome

    want, without = rows("off")
    assert not without.recalled
    assert not without.missed
    some, _ = rows("auto", slice(0, None, 3))
    assert some == want[::3]
    mixed, outcome = rows("auto")  # a third is known
    assert mixed == want
    assert outcome.recalled["image"]
    assert outcome.missed["image"]
    known, outcome = rows("auto")
    assert known == want
    if "schedule" not in runtime or exits is None:  # else what was speculation may have been dropped the first time
        assert (ran(outcome), outcome.missed) == ({}, {})
        assert outcome.recalled == outcome.files_opened


@pytest.mark.parametrize("layout", ["one", "caller", "lanes", "staged", "branches"])
def test_every_layout(weights, folder, layout, monkeypatch):
    """Whatever streams the steps are on: rows that are known and rows that are not, in one bucket."""
    import dataclasses

    from mmpipe import runners

    resolve = runners.resolve
    monkeypatch.setattr(
        runners, "resolve", lambda *a, **k: dataclasses.replace(resolve(*a, **k), streams=layout, lanes=2)
    )
    with opened(weights, shop.EXITS) as pipeline:
        samples = pipeline.find(folder).samples
        want, _ = pipeline.run(samples, cached=False, embeddings=True)
        pipeline.run(samples[::2], embeddings=True)
        found, outcome = pipeline.run(samples, embeddings=True)
        assert plain(found) == plain(want)
        assert outcome.recalled["image"]
        assert ran(outcome)["image@0"] == outcome.missed["image"]
        assert plain(pipeline.run(samples, embeddings=True)[0]) == plain(want)


def test_a_single_call_where_it_is_asked_for(weights, folder):
    with opened(weights, cache="on") as pipeline, opened(weights, cache="auto") as other:
        sample = next(one for one in pipeline.find(folder).samples if len(one.media) == 3)
        want = plain([other(**sample.media)])
        for hits in (0, 3):
            predictions, outcome = pipeline.run([Sample("sample", sample.media)], kind="call")
            assert plain(predictions) == want
            assert sum(outcome.recalled.values()) == hits
        predictions, outcome = other.run([Sample("sample", sample.media)], kind="call")
        assert not outcome.missed


def test_another_head_and_other_labels_run_no_encoder(weights, folder, tmp_path):
    torch.manual_seed(3)
    labels = ["cup", "light", "seat", "paper", "other"]
    dims = dict.fromkeys(shop.KINDS, tiny.DIM)
    options = {"width": 16, "depth": 1, "heads": 2}
    head = TransformerHead(dims, labels, **options)
    save_checkpoint(tmp_path / "other.safetensors", head, kind="transformer", labels=labels, dims=dims, options=options)
    other = {"head": "transformer", "checkpoint": str(tmp_path / "other.safetensors")}
    with opened(weights) as pipeline:
        first = pipeline.run_folder(folder, tmp_path / "first")
    with opened(weights, labels=labels, fusion=other) as pipeline:
        second = pipeline.run_folder(folder, tmp_path / "second")
    with opened(weights, labels=labels, fusion=other, cache="off") as pipeline:
        pipeline.run_folder(folder, tmp_path / "third")
    assert first.run["cache"] == {"hits": {"image": 0, "text": 0, "audio": 0}, "misses": first.run["files_opened"]}
    assert second.run["cache"] == {"hits": first.run["files_opened"], "misses": {"image": 0, "text": 0, "audio": 0}}
    assert [*second.run["seconds"]["segments"]] == ["head@0"]
    assert second.run["files_opened"] == first.run["files_opened"]
    tables = [pq.read_table(tmp_path / name / "predictions") for name in ("second", "third")]
    assert tables[0].equals(tables[1])
    assert set(tables[0]["label"].to_pylist()) <= set(labels)


def test_a_job_s_rows_are_the_same_and_used_tells_of_what_was_known(weights, folder, tmp_path):
    for name in ("first", "second"):
        with opened(weights, shop.EXITS) as pipeline:
            pipeline.run_folder(folder, tmp_path / name)
    tables = [pq.read_table(tmp_path / name / "predictions") for name in ("first", "second")]
    assert tables[0].equals(tables[1])
    assert any(tables[1]["used"].to_pylist())


def test_equal_media_are_encoded_once(weights, folder, tmp_path):
    """In one run, whatever they are called, before anything is known."""
    with opened(weights) as pipeline:
        samples = [one for one in pipeline.find(folder).samples if len(one.media) == 3][:5]
        copies = []
        for number in range(40):
            media = dict(samples[number % 5].media)
            copy = tmp_path / f"{number}.png"
            copy.write_bytes(media["image"].read_bytes())
            copies.append(Sample(f"{number}", {**media, "image": copy}))
        want, _ = pipeline.run(copies, cached=False)
        found, outcome = pipeline.run(copies)
        assert plain(found) == plain(want)
        assert ran(outcome) == {"image@0": 5, "text@0": 5, "audio@0": 5}
        assert outcome.missed == {"image": 5, "text": 5, "audio": 5}
        assert outcome.recalled == {"image": 35, "text": 35, "audio": 35}


def test_a_broken_file_is_never_kept_and_says_its_own_name(weights, folder, tmp_path):
    media = shop.media(tmp_path / "media", 3)
    for name in ("a", "b", "c"):
        (media / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    with opened(weights) as pipeline:
        for _ in range(2):
            summary = pipeline.run_folder(media, tmp_path / "out", mode="overwrite")
            assert summary.run["status"]["failed"] == 3
            errors = [text for text in pq.read_table(tmp_path / "out" / "predictions")["error"].to_pylist() if text]
            assert [error.split(": ")[1] for error in errors] == ["a.png", "b.png", "c.png"]
        assert summary.run["cache"]["misses"]["image"] == 3


def test_what_changes_the_bytes_is_looked_up_apart(weights, folder, tmp_path):
    """Other weights, buckets, limits, preparation: nothing of it may be answered with what was kept."""
    other = shop.weights(tmp_path / "other")
    torch.manual_seed(99)
    tiny.save(other / "photo.safetensors", "photo", tiny.PhotoNet())
    with opened(weights) as pipeline:
        samples = pipeline.find(folder).samples
        pipeline.run(samples)
    for hits, pipeline in (
        ({"text", "audio"}, opened(other)),
        (set(), opened(weights, runtime={"batch_size": 4})),
        (set(), opened(weights, input={"limits": {"audio_minutes": 1}})),
    ):
        with pipeline:
            assert set(pipeline.run(samples)[1].recalled) == hits
    config = shop.config(weights, runtime={"batch_size": 8})
    config["encoders"]["audio"]["max_seconds"] = 1
    with Pipeline.load(config) as pipeline:
        assert set(pipeline.run(samples)[1].recalled) == {"image", "text"}


def test_limits_hold_for_what_is_known(weights, folder):
    with opened(weights) as pipeline:
        samples = pipeline.find(folder).samples
        pipeline.run(samples)
    with opened(weights, input={"limits": {"image_megapixels": 0.0001}}) as pipeline:
        predictions, _ = pipeline.run(samples)
        assert any("image:too_large" in (one.error or "") for one in predictions)


def test_an_encoder_that_an_exit_looks_inside_is_computed_and_explain_says_so(weights, folder):
    exits = [{"after": "image.layer1", "threshold": 0.5}]
    with opened(weights, exits) as pipeline:
        samples = pipeline.find(folder).samples
        want, _ = pipeline.run(samples, cached=False)
        pipeline.run(samples)
        found, outcome = pipeline.run(samples)
        assert plain(found) == plain(want)
        assert "image" not in outcome.recalled
        assert outcome.recalled["audio"]
        assert "not image: an exit" in pipeline.resolved.reasons["cache"]


def test_who_observes_an_encoder_sees_every_row(weights, folder):
    with opened(weights) as pipeline:
        samples = pipeline.find(folder).samples
        pipeline.run(samples)
        seen = []
        with pipeline.observe("image", lambda observed: seen.extend(observed.ids)):
            _, outcome = pipeline.run(samples)
        assert len(seen) == sum("image" in one.media for one in samples)
        assert set(outcome.recalled) == {"text", "audio"}
        assert "image" in pipeline.run(samples)[1].recalled


def test_what_python_gives(weights, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    sound = np.random.default_rng(1).normal(0, 0.1, 16000).astype(np.float32)
    with opened(weights) as pipeline:
        for image in (pixels, torch.from_numpy(pixels)):
            samples = [{"image": image, "text": "a red mug", "audio": (sound, 16000)}]
            first, second = pipeline.predict(samples), pipeline.predict(samples)
            assert plain(first) == plain(second)
        _, outcome = pipeline.run([Sample("a", samples[0])])
        assert outcome.recalled == {"image": 1, "text": 1, "audio": 1}
        _, outcome = pipeline.run([Sample("a", {"audio": (sound, 8000), "image": pixels.reshape(40, 30, 3)})])
        assert not outcome.recalled


def test_a_file_that_is_written_to_while_it_is_read_is_not_kept(weights, folder, monkeypatch, tmp_path):
    from PIL import Image

    from mmpipe import media

    path, load = tmp_path / "a.png", media.load
    Image.new("RGB", (30, 30), "red").save(path)

    def changing(modality, source, **settings):
        Image.new("RGB", (30, 30), "blue").save(path)
        return load(modality, source, **settings)

    with opened(weights) as pipeline:
        monkeypatch.setattr(media, "load", changing)
        pipeline.run([Sample("a", {"image": path})])
        monkeypatch.setattr(media, "load", load)
        Image.new("RGB", (30, 30), "red").save(path)
        _, outcome = pipeline.run([Sample("a", {"image": path})])
        assert not outcome.recalled


def test_a_folder_that_cant_be_written_is_said_in_run_json(weights, folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMPIPE_CACHE", str(tmp_path / "file"))
    with opened(weights) as pipeline:
        for hits in (False, True):  # memory still serves this process
            run = pipeline.run_folder(folder, tmp_path / "out", mode="overwrite").run
            assert bool(run["cache"]["hits"]["image"]) == hits
            assert sum("memory only" in note for note in run["notes"]) == 1


def test_a_view_of_a_medium_is_another_content(weights, folder):
    from mmpipe.media import View, content_of, is_unchanged

    path = next(folder.glob("*.png"))
    views = [path, View(path, box=(0.0, 0.0, 0.5, 0.5)), View(path, mirrored=True), View(path, start=1.0)]
    contents = [content_of("image", view) for view in views]
    assert len({content.digest for content in contents}) == len(views)
    assert all(is_unchanged("image", view, content) for view, content in zip(views, contents, strict=True))
