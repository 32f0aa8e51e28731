"""What a pipeline decodes: no more than is needed, close where `input.decode: fast` asks for it, and never mixed up."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from support import shop

from mmpipe import Pipeline
from mmpipe.engine import decoders_beside
from mmpipe.explain import collect
from mmpipe.fingerprints import model_fingerprint
from mmpipe.media import Room, View, estimate_bytes, image

OWN = """
import torch
from torch import nn

class Mean(nn.Module):
    def forward(self, pixels):
        return pixels.float().mean(dim=(2, 3))

class Whole:
    modality, dim, module = "image", 3, Mean()
    def prepare(self, picture):
        return {"pixels": torch.tensor([[[float(picture.width)]], [[float(picture.height)]], [[1.0]]])}

class Small(Whole):
    smallest_side = 50

class Faster(Small):
    def prepare_fast(self, picture):
        return {"pixels": -self.prepare(picture)["pixels"]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos of 300 to 900 pixels; some have a title."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(5)
    for number in range(12):
        rough = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        size = tuple(int(side) for side in random.integers(300, 900, 2))
        rough.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:02d}.jpg", quality=88)
        if number % 2:
            (folder / f"{number:02d}.txt").write_text(f"old oak chair {number}", encoding="utf-8")
    return folder


def opened(weights, decode, **sections):
    return Pipeline.load(shop.config(weights, input={"decode": decode}, **sections))


def test_answers_are_close_and_told_apart(weights, folder):
    found, prints, pixels = {}, {}, {}
    for decode in ("exact", "fast"):
        with opened(weights, decode) as pipeline:
            samples = pipeline.find(folder).samples
            pixels[decode] = []
            with pipeline.observe("image", lambda seen, into=pixels[decode]: into.append(seen.tensor)):
                found[decode] = pipeline.predict(samples)
            prints[decode] = pipeline.fingerprints(samples)
            assert pipeline.resolved.decode == decode
            assert pipeline.job_settings([]).resolved["decode"] == decode
            missed = [line["what"] for line in collect.not_taken(pipeline, pipeline.run(samples)[1], [])]
            assert ("fast decoding" in missed) == (decode == "exact")
    exact, fast = torch.cat(pixels["exact"]), torch.cat(pixels["fast"])
    assert not torch.equal(exact, fast)
    assert torch.cosine_similarity(exact, fast).min() > 0.999
    assert [one.label for one in found["exact"]] == [one.label for one in found["fast"]]
    for kind in ("model", "numerics", "job"):
        assert prints["exact"][kind] != prints["fast"][kind]


def test_a_kept_embedding_is_of_its_own_mode(weights, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MMPIPE_CACHE", str(tmp_path))
    both = {"image", "text"}
    for decode, known in (("exact", set()), ("fast", {"text"}), ("fast", both), ("exact", both)):
        with opened(weights, decode) as pipeline:
            _, outcome = pipeline.run(pipeline.find(folder).samples)
            assert set(outcome.recalled) == known


def test_the_parts_of_a_second_look_have_enough_pixels(weights, folder, monkeypatch):
    from mmpipe import media

    seen, load = [], media.load

    def noting(modality, source, **settings):
        medium = load(modality, source, **settings)
        if modality == "image":
            seen.append((isinstance(source, View), medium.size))
        return medium

    monkeypatch.setattr(media, "load", noting)
    head = {"head": "transformer", "checkpoint": str(weights / "head.safetensors")}
    again = {**head, "deliberate": {"below": 1.0, "views": 8}}
    with opened(weights, "fast", fusion=again) as pipeline:
        predictions = pipeline.predict(pipeline.find(folder).samples)
    assert all(one.deliberated for one in predictions)
    assert {part for part, _ in seen} == {True, False}
    assert all(56 <= min(size) < 4 * 56 for _, size in seen)  # of the photos' 300 and more


@pytest.mark.parametrize(("name", "parts", "sign"), [("Whole", 1, 1), ("Small", 8, 1), ("Faster", 8, -1)])
def test_your_own_encoder_says_what_it_allows(tmp_path, monkeypatch, name, parts, sign):
    monkeypatch.chdir(tmp_path)
    Path("own_pictures.py").write_text(OWN, encoding="utf-8")
    made = {"task": "embed", "encoders": {"image": {"model": f"own_pictures:{name}"}}, "runtime": {"batch_size": 4}}
    Image.new("RGB", (800, 400), "white").save(tmp_path / "one.jpg")
    prints = []
    for decode, shrunk, turned in (("exact", 1, 1), ("fast", parts, sign)):
        with Pipeline.load({**made, "input": {"decode": decode}}) as pipeline:
            rows = []
            with pipeline.observe("image", lambda seen, into=rows: into.append(seen.tensor)):
                pipeline.embed([{"image": tmp_path / "one.jpg"}])
            assert rows[0].tolist() == [[turned * 800 / shrunk, turned * 400 / shrunk, turned]]
            prints.append(model_fingerprint(pipeline._built, pipeline.plan))
            assert any("changes nothing" in note for note in pipeline.notes) == (decode == "fast" and name == "Whole")
    assert (prints[0] == prints[1]) == (name == "Whole")


def test_a_long_sound_is_heard_as_if_it_were_decoded_whole(weights, tmp_path, monkeypatch):
    """What follows the window sounds into its end while resampling, and nothing beyond that is decoded."""
    from mmpipe import media

    path, load, decoded = tmp_path / "long.wav", media.load, []
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 30 * 22_050), 22_050)

    def whole(modality, source, **settings):
        decoded.append(len(load(modality, source, **settings)[0]) / 22_050)
        return load(modality, source)

    with opened(weights, "exact", task="embed", fusion={}, labels=None) as pipeline:
        heard = pipeline.embed([{"audio": path}])
        monkeypatch.setattr(media, "load", whole)
        assert np.array_equal(heard, pipeline.embed([{"audio": path}]))
        assert pipeline._built.preparations["audio"].max_seconds < decoded[0] < 4


@pytest.mark.parametrize("narrow", [False, True])
def test_each_header_is_read_once_and_the_bound_is_kept(weights, tmp_path, monkeypatch, narrow):
    """`narrow`: room for one large picture at a time."""
    for number in range(24):
        flat = number % 2 == 0
        Image.new("RGB", (2000, 1500) if flat else (60, 40), (number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    headers, most, now, lock = [], [0], [0], threading.Lock()
    header, loaded = image._header, image._loaded

    def counted(picture):
        large = picture.width == 2000
        with lock:
            now[0] += large
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        try:
            return loaded(picture)
        finally:
            with lock:
                now[0] -= large

    monkeypatch.setattr(image, "_header", lambda *given: headers.append(1) or header(*given))
    monkeypatch.setattr(image, "_loaded", counted)
    monkeypatch.setattr("mmpipe.engine.decoding_bytes", lambda limit: 20_000_000 if narrow else 1 << 30)
    with Pipeline.load(shop.config(weights, runtime={"cache": "off"})) as pipeline:
        headers.clear()
        answers = pipeline.predict([{"image": tmp_path / f"{number:02d}.png"} for number in range(24)])
    assert [answer.status for answer in answers] == ["ok"] * 24
    assert len(headers) <= 24 + 4  # and four rows for the parity gate
    assert most[0] == 1 or (not narrow and most[0] > 1)


def test_a_file_that_processes_hand_back_is_counted_once(weights, tmp_path, monkeypatch):
    path, most, take = tmp_path / "x.png", [0], Room._take
    Image.new("RGB", (2000, 1500)).save(path)

    def counted(room, count, more):
        take(room, count, more)
        most[0] = max(most[0], room.used_bytes)

    monkeypatch.setattr(Room, "_take", counted)
    handing_back = SimpleNamespace(decode=lambda *given: False, note="")
    monkeypatch.setattr("mmpipe.engine.Engine.decoders", lambda engine, wish: handing_back)
    with Pipeline.load(shop.config(weights, runtime={"cache": "off"})) as pipeline:
        assert pipeline.predict([{"image": path}])[0].status == "ok"
    assert 0 < most[0] <= estimate_bytes("image", path)


@pytest.mark.parametrize(
    ("processes", "streams", "threads", "workers", "beside"),
    [
        *((2, "caller", 1, 1, 0), (1, "caller", 1, 1, 0), (1, "caller", 2, 2, 0)),
        *((1, "lanes", 1, 2, 1), (1, "caller", 8, 8, 4)),
    ],
)
def test_decoding_and_computing_take_turns_where_computing_takes_every_core(
    processes, streams, threads, workers, beside
):
    resolved = SimpleNamespace(device="cpu", processes=processes, streams=streams, threads=threads)
    assert decoders_beside(resolved, workers) == beside
    resolved.device = "cuda"
    assert decoders_beside(resolved, workers) == workers
