"""Pictures resized by native code: Pillow's bits, or Pillow."""

import contextlib
import importlib
import os
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import hub

from mmpipe import Pipeline, Sample, decoders, media, resizing
from mmpipe.build import Preparation, _preparation
from mmpipe.decoders import Decoders
from mmpipe.encoders import BuiltEncoder
from mmpipe.encoders.image import ResizeCrop, lent
from mmpipe.explain import collect
from mmpipe.graphs.backends import Unlowerable, compiler
from mmpipe.resizing import Resized, _Resizing

compiles = pytest.mark.skipif(
    resizing.platform.system() != "Linux" or shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="needs Linux and GCC",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where it is kept, compiled once for all tests here."""
    return tmp_path_factory.mktemp("resizing") / "compiled"


@pytest.fixture
def state(monkeypatch):
    """A process that has not looked for it yet."""
    fresh = _Resizing()
    monkeypatch.setattr(resizing, "_state", fresh)
    return fresh


@pytest.fixture
def native(folder, state):
    resizing.load(folder)
    assert resizing.why_not() == ""
    return state


def noise(width, height, seed=0, hard=False):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray((levels // 128 * 255 if hard else levels).astype(np.uint8))


def same(crop, picture):
    return torch.equal(Resized(crop)(picture)["pixels"], crop(picture)["pixels"])


SIDES = st.integers(1, 700)
CROPS = st.builds(
    ResizeCrop,
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
    short_side=st.sampled_from([None, 17, 90]),
    resample=st.sampled_from(["bilinear", "bicubic", "lanczos", "box"]),
    fill=st.integers(0, 255),
    crop_down=st.booleans(),
)


@compiles
@settings(max_examples=300, deadline=None)
@given(width=SIDES, height=SIDES, crop=CROPS, hard=st.booleans())
def test_its_bits_are_pillow_s(folder, width, height, crop, hard):
    resizing.load(folder)  # the process' own: a fixture would be one for all examples
    assert resizing.why_not() == ""
    size, picture = crop._resized(width, height), noise(width, height, width + height, hard)
    assume(size[0] * size[1] < 500_000)
    if min(size) == 0:
        with pytest.raises(ValueError, match="height and width must be > 0"):
            Resized(crop)(picture)
    else:
        assert same(crop, picture)


@compiles
@pytest.mark.parametrize(
    "size",
    [
        (2600, 1700),  # more pixels than Pillow has in one block, resized across first
        (1500, 3500),  # the same, resized down first by Pillow 13
        (224, 224),
        (224, 600),
        (225, 224),
        (2000, 30),  # elongated
    ],
)
def test_pictures_of_every_kind(native, size):
    picture = noise(*size)
    assert (lent(picture) is None) == (size[0] * size[1] > 4 << 20)
    assert same(ResizeCrop(224, 224), picture)
    assert same(ResizeCrop(224, 224, "longest", resample="bilinear"), picture)
    assert np.array_equal(np.asarray(picture), np.asarray(noise(*size)))  # Pillow's own bytes are not written to


@compiles
@pytest.mark.parametrize("flags", [(), ("-DWITHOUT_AVX2",)])
def test_processors_without_these_vectors_give_the_same_bits(state, flags):
    content = compiler.compiled([resizing._SOURCE], [*resizing._FLAGS, *flags])
    resizing.adopt(lambda: content)
    assert resizing.why_not() == ""
    for size in ((301, 203), (97, 411), (40, 40), (7, 90)):
        assert same(ResizeCrop(33, 47, "squash"), noise(*size, hard=size[0] == 97))
        assert same(ResizeCrop(33, 33, "longest", resample="bilinear"), noise(*size))


@compiles
@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_other_modes_are_made_rgb_first(native, mode):
    assert same(ResizeCrop(32, 32), noise(90, 70).convert(mode))


@compiles
def test_it_is_native_code_that_resizes(native, monkeypatch):
    picture, crop = noise(300, 200), ResizeCrop(32, 32)
    expected = crop(picture)["pixels"]
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("Pillow was asked"))
    assert torch.equal(Resized(crop)(picture)["pixels"], expected)


@compiles
def test_a_picture_that_lends_nobody_its_pixels_is_pillow_s(native, monkeypatch):
    monkeypatch.setattr(resizing, "lent", lambda image: None)
    assert same(ResizeCrop(32, 32), noise(90, 70))


@compiles
@pytest.mark.parametrize("first", [True, False])
def test_the_order_of_a_pillow_s_passes_is_found_out(folder, state, first, monkeypatch):
    """Whatever the installed one does: another order is not taken for its own."""
    resizing.load(folder)
    known = state.down_first
    other = [order for order in resizing._ORDERS if order is not known]
    monkeypatch.setattr(resizing, "_ORDERS", (known, *other) if first else (*other, known))
    assert resizing._order(state.library) is known
    monkeypatch.setattr(resizing, "_ORDERS", tuple(other))
    with pytest.raises(Unlowerable, match="resizes to other bits than native code"):
        resizing._order(state.library)


@compiles
def test_where_pillow_s_bits_are_others_pillow_resizes(folder, state, monkeypatch):
    monkeypatch.setattr(resizing, "_ORDERS", (lambda across, down: across[0] > 100,))
    resizing.load(folder)
    assert "to other bits" in resizing.why_not()
    assert state.library is None
    assert same(ResizeCrop(32, 32), noise(300, 200))


@pytest.mark.skipif(resizing.platform.system() != "Linux", reason="native code is for Linux")
def test_nowhere_to_compile_is_no_error(state, monkeypatch, tmp_path):
    monkeypatch.setattr(compiler.tempfile, "tempdir", str(tmp_path / "missing"))
    resizing.load(None)
    assert "could not compile" in resizing.why_not()


def test_without_a_compiler_pillow_resizes_and_it_is_tried_once(state, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    resizing._name.cache_clear()
    resizing.load(tmp_path / "compiled")
    assert "install one, or set CXX" in resizing.why_not()
    monkeypatch.setattr(resizing, "compiled", lambda *_: pytest.fail("tried again"))
    resizing.load(tmp_path / "compiled")
    resizing._name.cache_clear()
    assert same(ResizeCrop(32, 32), noise(90, 70))


def job(medium, count):
    return [Sample(str(number), {"image": medium} if number % 2 else {"text": "none"}) for number in range(count)]


@compiles
def test_only_a_job_that_wins_it_back_waits_for_the_compiler(state, tmp_path):
    picture = noise(1200, 1000)
    place = tmp_path / "compiled"
    resizing.settle(place, job(picture, 200), media.Limits(), 2)
    assert re.fullmatch(r"these 200 samples would save 0\.[456] s, compiling takes 1\.5 s, once", resizing.why_not())
    assert not place.exists()
    resizing.settle(place, [], media.Limits(), 2)
    resizing.settle(place, job(tmp_path / "missing.jpg", 10_000), media.Limits(), 2)
    assert not place.exists()
    resizing.settle(place, job(picture, 2000), media.Limits(), 2)
    assert resizing.why_not() == ""
    assert len(list(place.iterdir())) == 1


@compiles
def test_what_is_kept_is_taken_by_any_job(native, folder, monkeypatch):
    fresh = _Resizing()
    monkeypatch.setattr(resizing, "_state", fresh)
    monkeypatch.setattr(resizing, "compiled", lambda *_: pytest.fail("compiled again"))
    resizing.take(None)
    assert fresh.library is None
    resizing.take(folder)
    assert fresh.library is not None
    assert fresh.content == native.content


@compiles
def test_what_was_touched_is_not_taken_nor_made_anew_by_a_short_job(native, state, folder, tmp_path, monkeypatch):
    place = tmp_path / "compiled"
    shutil.copytree(folder, place)
    place.chmod(0o700)
    (kept,) = place.iterdir()
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    fresh = _Resizing()
    monkeypatch.setattr(resizing, "_state", fresh)
    monkeypatch.setattr(resizing, "compiled", lambda *_: pytest.fail("compiled"))
    resizing.take(place)
    assert (fresh.library, fresh.failed) == (None, False)


@compiles
@pytest.mark.skipif(not decoders.available(), reason="needs Linux")
def test_processes_that_decode_have_it_from_this_one(native, tmp_path, monkeypatch):
    """Whatever folder there is: what is sent is the library itself."""
    noise(300, 200).save(tmp_path / "a.png")
    (tmp_path / "resized.py").write_text(
        "from mmpipe import resizing\n"
        "class Told(resizing.Resized):\n"
        "    def __call__(self, image):\n"
        "        assert resizing.why_not() == '', resizing.why_not()\n"
        "        return super().__call__(image)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    told = importlib.import_module("resized").Told(ResizeCrop(32, 32))
    preparation = Preparation("image", 1, told, None, {}, ())
    found = []
    with contextlib.closing(Decoders({"image": preparation}, media.Limits(), 1, patient=True)) as made:
        assert made.decode("image", tmp_path / "a.png", lambda rows: found.append(rows["pixels"].clone()))
    assert torch.equal(found[0], told.crop(noise(300, 200))["pixels"])


@compiles
def test_an_encoder_that_prepares_otherwise_is_left_alone():
    class Inverted(BuiltEncoder):
        def prepare(self, media):
            return {"pixels": 255 - super().prepare(media)["pixels"]}

    for kind, native in ((BuiltEncoder, True), (Inverted, False)):
        crop = ResizeCrop(8, 8)
        made = kind(
            modality="image", dim=3, module=torch.nn.Identity(), prepare=crop, example=noise(9, 9), preprocessing={}
        )
        preparation = _preparation(made, {}, fast=False)
        assert isinstance(preparation.prepare, Resized) == native
        assert torch.equal(preparation.prepare(noise(9, 9))["pixels"], made.prepare(noise(9, 9))["pixels"])


@compiles
def test_rows_are_the_same_before_and_after_and_explain_knows(state, cache, tmp_path, monkeypatch):
    (folder := tmp_path / "media").mkdir()
    (tmp_path / "models").mkdir()
    model = hub.section(hub.Models(tmp_path / "models"), "open_clip")
    config = {"task": "embed", "encoders": {"image": model}, "runtime": {"cache": "off", "batch_size": 4}}
    for number in range(6):
        noise(200 + 40 * number, 150).save(folder / f"{number}.png")
    with Pipeline.load(config) as pipeline:
        samples = list(pipeline.find(folder).samples)
        before = pipeline.embed(samples)
        whats = [one["what"] for one in collect.explain(pipeline, samples)["not_taken"]]
        assert "pictures resized by native code" in whats
    monkeypatch.setattr(resizing, "_SAVED_S", 1.0)  # a long job
    with Pipeline.load(config) as pipeline:
        pipeline.settle(samples)
        assert resizing.why_not() == ""
        assert np.array_equal(pipeline.embed(samples), before)
        whats = [one["what"] for one in collect.explain(pipeline, samples)["not_taken"]]
        assert "pictures resized by native code" not in whats
    monkeypatch.setattr(resizing, "_state", _Resizing())
    monkeypatch.setattr(resizing, "compiled", lambda *_: pytest.fail("compiled again"))
    with Pipeline.load(config):  # a short job, later
        assert resizing.why_not() == ""
