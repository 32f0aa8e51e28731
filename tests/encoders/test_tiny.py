from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mmpipe.encoders import tiny
from mmpipe.encoders.base import BuiltEncoder, EncoderError

NETS: dict[str, tuple[str, type[nn.Module]]] = {
    "photo": ("image", tiny.PhotoNet),
    "title": ("text", tiny.TitleNet),
    "note": ("audio", tiny.NoteNet),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights of the three, batch statistics off their defaults."""
    folder = tmp_path_factory.mktemp("weights")
    for name, (_, net) in NETS.items():
        torch.manual_seed(0)
        module = net()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
        tiny.save(folder / f"{name}.safetensors", name, module)
    return folder


def encoder(name: str, weights: Path) -> BuiltEncoder:
    return tiny.load(name, NETS[name][0], weights=weights / f"{name}.safetensors")


def media(name: str, n: int) -> list[object]:
    random = np.random.default_rng(0)
    if name == "photo":
        return [Image.fromarray(random.integers(0, 256, (40 + i, 50, 3), np.uint8)) for i in range(n)]
    if name == "title":
        return ["Navy coat", "", "a", "Lace-up, size 42!", "très chic " * 30][:n]
    return [
        (random.standard_normal(size).astype(np.float32) * 0.1, 16_000) for size in (30_000, 0, 1, 80_000, 16_000)[:n]
    ]


@pytest.mark.parametrize("name", NETS)
def test_layers_inputs_and_shapes_are_as_promised(name: str, weights: Path) -> None:
    built = encoder(name, weights)
    shapes = {key: value.shape for key, value in built.prepare(built.example).items()}
    rows = [built.prepare(one) for one in media(name, 5)]
    assert all({key: value.shape for key, value in row.items()} == shapes for row in rows)
    batch = {key: torch.stack([row[key] for row in rows]) for key in shapes}
    together = built.module(**batch)
    assert together.shape == (5, built.dim)
    assert torch.isfinite(together).all()
    assert isinstance(built.module.get_submodule(built.layers or ""), nn.ModuleList)
    for i, row in enumerate(rows):  # nobody's embedding depends on the neighbours
        alone = built.module(**{key: value[None] for key, value in row.items()})
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_export_with_a_free_batch_agrees(name: str, weights: Path) -> None:
    built = encoder(name, weights)
    rows = [built.prepare(one) for one in media(name, 5)]
    keys = list(rows[0])
    two = tuple(torch.stack([row[key] for row in rows[:2]]) for key in keys)
    five = tuple(torch.stack([row[key] for row in rows]) for key in keys)
    free = tuple({0: torch.export.Dim("batch", min=1, max=512)} for _ in keys)
    graph = torch.export.export(built.module, two, dynamic_shapes=free, strict=False).module()
    torch.testing.assert_close(graph(*five), built.module(*five), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_small_enough_to_ship(name: str, weights: Path) -> None:
    assert (weights / f"{name}.safetensors").stat().st_size < 2_000_000


def test_photo_reads_any_size_and_mode_as_grey() -> None:
    for mode, colour, grey in (("RGB", (255, 255, 255), 255), ("L", 128, 128), ("RGB", (0, 0, 0), 0)):
        prepared = tiny.prepare_photo(Image.new(mode, (300, 17), colour))["photo"]  # type: ignore[arg-type]
        assert prepared.shape == (1, 28, 28)
        assert prepared.dtype == torch.uint8
        assert (prepared == grey).all()


def test_title_words_are_hashed_the_same_everywhere() -> None:
    """crc32, not Python's hash: the weights mean nothing under other ids."""
    assert tiny.word_ids("coat") == (1625, 102, 2883, 4015, 7)
    assert tiny.word_ids("coat")[1] == tiny.word_ids("coats")[1]  # <co
    endless = tiny.word_ids("coat" * 100)
    assert len(endless) == 12
    assert endless[1:5] == (102, 2883, 4015, tiny.word_ids("atc")[2])


def test_title_case_and_punctuation_do_not_matter_and_hyphens_do() -> None:
    one, two = tiny.prepare_title("T-SHIRT, (navy)!"), tiny.prepare_title("t-shirt navy")
    assert torch.equal(one["pieces"], two["pieces"])
    assert one["mask"].sum() == 2
    assert tiny.prepare_title("- --")["mask"].sum() == 0


def test_padding_of_a_title_changes_nothing(weights: Path) -> None:
    module = encoder("title", weights).module
    long, short = (tiny.prepare_title("lace-up boots", words) for words in (24, 2))
    outputs = [module(one["pieces"][None], one["mask"][None]) for one in (long, short)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


def test_note_is_resampled_padded_and_cut() -> None:
    seconds = 1.0
    rates = {}
    for rate_hz in (8_000, 16_000, 44_100):
        tone = np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate_hz)) / rate_hz).astype(np.float32)
        rates[rate_hz] = tiny.prepare_note((tone, rate_hz))["samples"]
        assert rates[rate_hz].shape == (tiny.NOTE_SAMPLES,)
        assert not rates[rate_hz][16_100:].any()
    for other in (8_000, 44_100):  # away from the ends, where the resampler's filter rings
        torch.testing.assert_close(rates[other][1000:15_000], rates[16_000][1000:15_000], rtol=0, atol=2e-3)
    assert tiny.prepare_note((np.ones(200_000, np.float32), 16_000))["samples"].all()


def test_what_is_beyond_the_window_is_not_heard_at_any_rate() -> None:
    random = np.random.default_rng(0)
    long = random.standard_normal(48_000 * 6).astype(np.float32)
    changed = long.copy()
    changed[48_000 * 4 :] = 0
    one, two = (tiny.prepare_note((sound, 48_000))["samples"] for sound in (long, changed))
    assert torch.equal(one, two)
    assert one[-500:].all()  # and all of the window is


def test_log_mel_is_the_textbooks() -> None:
    """Against numpy's FFT, and a pure tone must be loudest in the band around its frequency."""
    net = tiny.NoteNet()
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(tiny.NOTE_SAMPLES) / tiny.SAMPLE_RATE_HZ)
    frame = tone[: tiny.WINDOW].numpy().astype(np.float64)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(tiny.WINDOW) / tiny.WINDOW)
    power = np.abs(np.fft.rfft(frame * hann)) ** 2
    spectrum = (tone[: tiny.WINDOW] @ net.basis).numpy()
    np.testing.assert_allclose(spectrum[: tiny.BINS] ** 2 + spectrum[tiny.BINS :] ** 2, power, rtol=1e-3, atol=1e-2)
    log_mel_MF = net.log_mel(tone[None])[0]
    assert log_mel_MF.shape == (tiny.MEL_BANDS, tiny.NOTE_HOPS - 1)
    centres_hz = (net.filters * torch.arange(tiny.BINS)[:, None] * 31.25).sum(0) / net.filters.sum(0).clamp_min(1e-9)
    assert abs(float(centres_hz[log_mel_MF[:, 5].argmax()]) - 1000) < 40


def test_loudness_does_not_matter(weights: Path) -> None:
    module = encoder("note", weights).module
    sound = torch.randn(1, tiny.NOTE_SAMPLES, generator=torch.Generator().manual_seed(0)) * 0.3
    torch.testing.assert_close(module(sound), module(sound * 0.1), rtol=1e-3, atol=1e-3)


def test_limits_shorten_what_is_read(weights: Path) -> None:
    title = tiny.load("title", "text", weights=weights / "title.safetensors", max_tokens=4)
    assert title.prepare("one two three four five six")["mask"].tolist() == [1, 1, 1, 1]
    note = tiny.load("note", "audio", weights=weights / "note.safetensors", max_seconds=2.0)
    assert note.prepare((np.ones(99_000, np.float32), 16_000))["samples"].shape == (32_000,)
    assert note.max_seconds == 2.0
    assert note.module(torch.zeros(2, 32_000)).shape == (2, 64)
    long = tiny.load("note", "audio", weights=weights / "note.safetensors", max_seconds=9.0)
    assert long.max_seconds == tiny.NOTE_SECONDS
    with pytest.raises(EncoderError, match="is not between") as caught:
        tiny.load("title", "text", weights=weights / "title.safetensors", max_tokens=99)
    assert caught.value.key == "max_tokens"
    with pytest.raises(EncoderError, match=r"max_seconds 0\.2 is below 0\.256") as caught:
        tiny.load("note", "audio", weights=weights / "note.safetensors", max_seconds=0.2)
    assert caught.value.key == "max_seconds"


def test_errors_say_what_to_do(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="there are tiny:photo, tiny:title, tiny:note"):
        tiny.load("picture", "image", weights=None)
    with pytest.raises(EncoderError, match="reads image, not text"):
        tiny.load("photo", "text", weights=weights / "photo.safetensors")
    with pytest.raises(EncoderError, match="tiny models are not random"):
        tiny.load("photo", "image", weights=None)
    with pytest.raises(EncoderError, match=r"holds tiny:title"):
        tiny.load("photo", "image", weights=weights / "title.safetensors")
    with pytest.raises(EncoderError, match=r"none.safetensors can't be read"):
        tiny.load("photo", "image", weights=tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((weights / "note.safetensors").read_bytes()[:-100])
    with pytest.raises(EncoderError, match=r"cut.safetensors can't be read"):
        tiny.load("note", "audio", weights=tmp_path / "cut.safetensors")
    other = tiny.PhotoNet()
    other.out = nn.Linear(96, 32)
    tiny.save(tmp_path / "other.safetensors", "photo", other)
    with pytest.raises(EncoderError, match="does not fit: out"):
        tiny.load("photo", "image", weights=tmp_path / "other.safetensors")


def test_a_grey_picture_need_not_become_rgb_first(weights: Path) -> None:
    built = encoder("photo", weights)
    assert built.grey
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8))
    assert torch.equal(built.prepare(grey)["photo"], built.prepare(grey.convert("RGB"))["photo"])
