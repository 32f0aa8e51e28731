"""Good media come out as encoders expect them; broken ones as a MediaError with a code, and as nothing else."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmpipe.errors import MediaError
from mmpipe.media import Limits, estimate_bytes, load

RATE_HZ = 16_000
NOISE = np.random.default_rng(0)


def picture(width: int = 48, height: int = 32, mode: str = "RGB") -> Image.Image:
    pixels = NOISE.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tone(seconds: float = 1.0, channels: int = 1) -> np.ndarray[Any, Any]:
    times = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    wave = 0.3 * np.sin(2 * np.pi * 440 * times) + 0.02 * NOISE.standard_normal(len(times))
    return np.repeat(wave.astype(np.float32)[:, None], channels, axis=1)


def sound(kind: str = "WAV", seconds: float = 1.0, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(seconds), RATE_HZ, format=kind, subtype=subtype)
    return file.getvalue()


def m4a(seconds: float = 1.0, **options: str) -> bytes:
    av = pytest.importorskip("av")
    with tempfile.TemporaryDirectory() as folder, av.open(f"{folder}/x.m4a", "w", options=options) as container:
        stream = container.add_stream("aac", rate=RATE_HZ)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(tone(seconds).T.copy(), format="fltp", layout="mono")
        frame.sample_rate = RATE_HZ
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
        container.close()
        return Path(folder, "x.m4a").read_bytes()


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


def nan_wav() -> bytes:
    file = io.BytesIO()
    samples = tone()
    samples[100] = np.nan
    soundfile.write(file, samples, RATE_HZ, format="WAV", subtype="FLOAT")
    return file.getvalue()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def holed(data: bytes) -> bytes:
    third = len(data) // 3
    return data[:third] + bytes(NOISE.integers(0, 256, third // 2, dtype=np.uint8)) + data[third + third // 2 :]


BROKEN: list[tuple[str, Callable[[], bytes], str, str]] = [
    ("a.jpg", lambda: b"", "image", "empty"),
    ("a.txt", lambda: b"", "text", "empty"),
    ("a.wav", lambda: b"", "audio", "empty"),
    ("a.jpg", lambda: half(encoded(picture(200, 200), "JPEG")), "image", "truncated"),
    ("a.png", lambda: half(encoded(picture(200, 200), "PNG")), "image", "truncated"),
    ("a.webp", lambda: half(encoded(picture(200, 200), "WEBP", lossless=True)), "image", "corrupt"),
    ("a.tif", lambda: half(encoded(picture(200, 200), "TIFF")), "image", "truncated|corrupt"),
    ("a.gif", lambda: half(encoded(picture(200, 200), "GIF")), "image", "truncated"),
    ("a.png", lambda: encoded(picture(), "PNG")[:12], "image", "corrupt|truncated"),
    ("a.jpg", lambda: b"\xff\xd8\xff\xe0 and no more", "image", "corrupt|truncated"),
    ("a.jpg", lambda: b"just words, named .jpg", "image", "unsupported"),
    ("a.png", lambda: sound(), "image", "unsupported"),
    ("a.png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image", "unsupported"),
    ("bomb.png", lambda: png_header(50_000, 50_000), "image", "too_large"),
    ("large.png", lambda: png_header(10_001, 10_000), "image", "too_large"),
    ("short.png", lambda: png_header(300, 300), "image", "truncated|corrupt"),
    ("a.txt", lambda: b"caf\xe9", "text", "not_text"),
    ("a.txt", lambda: encoded(picture(), "JPEG"), "text", "not_text"),
    ("a.txt", lambda: b"nul \0 inside", "text", "not_text"),
    ("a.txt", lambda: "no mark".encode("utf-16-le"), "text", "not_text"),
    ("a.txt", lambda: b"\xff\xfea\x00b", "text", "not_text"),
    ("a.txt", lambda: b" \n\t\r\n", "text", "empty"),
    ("a.txt", lambda: b"\xef\xbb\xbf", "text", "empty"),
    ("a.txt", lambda: b"x" * 1_100_000, "text", "too_large"),
    ("a.wav", lambda: encoded(picture(), "JPEG"), "audio", "unsupported"),
    ("a.mp3", lambda: b"words, named .mp3\n" * 50, "audio", "unsupported"),
    ("a.flac", lambda: half(sound("FLAC", 4)), "audio", "truncated"),
    ("a.flac", lambda: holed(sound("FLAC", 9)), "audio", "corrupt|truncated"),
    ("a.wav", lambda: half(sound("WAV", 4)), "audio", "truncated"),
    ("a.aiff", lambda: half(sound("AIFF", 4)), "audio", "truncated"),
    ("a.mp3", lambda: half(sound("MP3", 4)), "audio", "truncated"),
    ("a.m4a", lambda: half(m4a()), "audio", "truncated"),
    ("a.m4a", lambda: half(m4a(5, movflags="faststart")), "audio", "truncated"),
    ("a.wav", lambda: sound("WAV")[:30], "audio", "corrupt|truncated|empty"),
    ("a.flac", lambda: b"fLaC" + bytes(60), "audio", "corrupt"),
    ("a.wav", lambda: sound("WAV", 0), "audio", "empty"),
    ("a.wav", nan_wav, "audio", "not_finite"),
]


@pytest.mark.parametrize("given_as", ["file", "bytes"])
@pytest.mark.parametrize(("name", "data", "modality", "code"), BROKEN)
def test_broken(tmp_path: Path, name: str, data: Callable[[], bytes], modality: str, code: str, given_as: str) -> None:
    path = tmp_path / name
    path.write_bytes(data())
    source = path if given_as == "file" else path.read_bytes()
    assert estimate_bytes(modality, source) >= 0
    with pytest.raises(MediaError) as info:
        load(modality, source)
    assert info.value.code in code.split("|"), str(info.value)
    assert info.value.modality == modality
    assert str(tmp_path) not in str(info.value)
    assert info.value.text.startswith(f"{name}: ") == (given_as == "file")


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "file.txt").write_text("x")
    expected = {
        "x.jpg": "is_folder",
        "link.jpg": "not_found",
        "self.jpg": "unreadable",
        "missing.jpg": "not_found",
        "file.txt/x.jpg": "not_found",
        "nul\0.jpg": "not_found",
        "long" * 100 + ".jpg": "unreadable",
        "pipe.jpg": "unsupported",
    }
    for modality in ("image", "text", "audio"):
        for name, code in expected.items():
            with pytest.raises(MediaError) as info:
                load(modality, tmp_path / name)
            assert info.value.code == code, name
            assert str(tmp_path) not in str(info.value)
            assert estimate_bytes(modality, tmp_path / name) > 0
    with pytest.raises(MediaError) as info:
        load("image", "/dev/zero")
    assert info.value.code == "unsupported"


def test_permission_denied(tmp_path: Path) -> None:
    path = tmp_path / "secret.jpg"
    path.write_bytes(encoded(picture(), "JPEG"))
    load("image", path)
    path.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(MediaError, match=r"secret\.jpg: permission denied") as info:
            load("image", path)
    finally:
        if is_root:
            os.seteuid(0)
    assert info.value.code == "unreadable"


@settings(max_examples=150, deadline=None)
@given(
    which=st.integers(0, 5),
    cuts=st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=6)), min_size=1, max_size=4),
)
@pytest.mark.filterwarnings("ignore")
def test_damage_never_leaks_another_error(which: int, cuts: list[tuple[int, bytes]]) -> None:
    modality, data = GOOD[which]
    for at, new in cuts:
        data = data[:at] + new + data[at + 2 * len(new) :]
    with contextlib.suppress(MediaError):
        load(modality, data, limits=Limits(image_megapixels=1, audio_minutes=1))
    estimate_bytes(modality, data)


GOOD = [
    ("image", encoded(picture(), "JPEG")),
    ("image", encoded(picture(), "PNG")),
    ("image", encoded(picture(), "WEBP")),
    ("image", encoded(picture(), "TIFF")),
    ("audio", sound("WAV", 0.1)),
    ("audio", sound("FLAC", 0.2)),
]


# Pictures


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *((kind, mode) for kind in ("PNG", "BMP", "TIFF", "GIF", "WEBP") for mode in ("1", "L", "P", "RGB")),
        ("JPEG", "L"),
        ("JPEG", "RGB"),
    ],
)
def test_every_kind_becomes_rgb(tmp_path: Path, kind: str, mode: str) -> None:
    original = picture(mode=mode)
    path = tmp_path / f"x.{kind.lower()}"
    path.write_bytes(encoded(original, kind, **({"lossless": True} if kind == "WEBP" else {})))
    for source in (path, str(path), path.read_bytes()):
        result = load("image", source)
        assert (result.mode, result.size) == ("RGB", original.size)
    if kind not in ("GIF", "JPEG"):
        assert np.array_equal(np.asarray(result), np.asarray(original.convert("RGB")))


def test_upright() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255  # a white corner, top left as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the corner goes to the top right
    data = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    result = load("image", data)
    assert result.size == (4, 6)
    assert result.getpixel((3, 0)) == (255, 255, 255)
    assert result.getexif().get(0x0112) is None  # nobody turns it twice
    opened = Image.open(io.BytesIO(data))
    assert load("image", opened).size == (4, 6)
    assert opened.size == (6, 4)  # the caller's own is as it was


def test_alpha_on_white() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    pixels[0, 1] = (255, 0, 0, 0)
    pixels[1, 0] = (0, 0, 0, 128)
    clear = Image.fromarray(pixels)
    for source in (encoded(clear, "PNG"), clear, pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        result = load("image", source)
        assert [result.getpixel(at) for at in ((0, 0), (1, 0), (0, 1))] == [(255, 0, 0), (255,) * 3, (127,) * 3]
    palette = picture(mode="P")
    for other in (encoded(palette, "PNG", transparency=palette.getpixel((0, 0))), encoded(clear.convert("LA"), "PNG")):
        load("image", other)
    keyed = Image.new("RGB", (2, 2), (9, 8, 7))
    assert load("image", encoded(keyed, "PNG", transparency=(9, 8, 7))).getpixel((0, 0)) == (255, 255, 255)


def test_deep_pixels() -> None:
    ramp = np.array([[0, 256, 32768, 65535]], np.uint16)
    expected = [[0, 1, 128, 255]]
    for kind in ("PNG", "TIFF"):
        assert np.asarray(load("image", encoded(Image.fromarray(ramp), kind)))[:, :, 0].tolist() == expected
    as_float = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert np.asarray(load("image", encoded(as_float, "TIFF")))[0, :, 1].tolist() == [0, 128, 255]
    with pytest.raises(MediaError, match="not_finite"):
        load("image", encoded(Image.fromarray(np.array([[np.nan, 1.0]], np.float32)), "TIFF"))


def test_cmyk_and_first_frames() -> None:
    assert load("image", encoded(Image.new("CMYK", (3, 3), (0, 255, 255, 0)), "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    red, blue = Image.new("RGB", (5, 5), "red"), Image.new("RGB", (5, 5), "blue")
    for kind in ("GIF", "PNG", "TIFF"):
        data = encoded(red, kind, save_all=True, append_images=[blue])
        assert load("image", data).getpixel((2, 2)) == (255, 0, 0)


def test_arrays_and_tensors() -> None:
    pixels = NOISE.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for source in (
        pixels,
        pixels.transpose(2, 0, 1),
        torch.from_numpy(pixels),
        torch.from_numpy(pixels).permute(2, 0, 1),
        torch.from_numpy(pixels.astype(np.int64)),
        pixels.astype(np.float64) / 255,
        torch.from_numpy(pixels).permute(2, 0, 1).float().requires_grad_() / 255,
        (torch.from_numpy(pixels).float() / 255).bfloat16(),
    ):
        result = np.asarray(load("image", source)).astype(int)
        assert np.abs(result - pixels).max() <= (1 if getattr(source, "dtype", None) == torch.bfloat16 else 0)
    for grey in (pixels[:, :, 0], pixels[:, :, :1], torch.from_numpy(pixels[:, :, :1]).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(load("image", grey)), np.repeat(pixels[:, :, :1], 3, axis=2))


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (np.zeros((2, 3, 4, 3), np.uint8), "unsupported"),
        (np.zeros((9, 9, 7), np.uint8), "unsupported"),
        (np.zeros((0, 9, 3), np.uint8), "empty"),
        (np.full((4, 4, 3), 200.0), "unsupported"),
        (np.full((4, 4, 3), -1), "unsupported"),
        (np.full((4, 4, 3), np.nan), "not_finite"),
        (np.full((4, 4), "x"), "unsupported"),
        (torch.zeros(3, 4, 4, device="meta"), "unsupported"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), "too_large"),
        ([[1, 2], [3, 4]], "unsupported"),
        (None, "unsupported"),
    ],
)
def test_no_picture(source: Any, code: str) -> None:
    with pytest.raises(MediaError) as info:
        load("image", source)
    assert info.value.code == code


def test_a_higher_limit_is_a_higher_limit() -> None:
    with pytest.raises(MediaError) as info:
        load("image", png_header(15_000, 14_000), limits=Limits(image_megapixels=250))
    assert info.value.code in ("truncated", "corrupt")  # it was let through to the decoder


# Texts


def test_texts(tmp_path: Path) -> None:
    words = "naïve 日本 🎈\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = tmp_path / f"{encoding}.txt"
        path.write_bytes(words.encode(encoding))
        assert load("text", path) == words
        assert load("text", path.read_bytes()) == words
    assert load("text", "missing.txt") == "missing.txt"  # a str is the text itself
    for source, code in (
        ("  ", "empty"),
        ("\ud800", "not_text"),
        ("x" * 1_000_001 * 2, "too_large"),
        (5, "unsupported"),
    ):
        with pytest.raises(MediaError) as info:
            load("text", source, limits=Limits(text_kilobytes=1000))
        assert info.value.code == code


# Sounds


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "AIFF", "OGG", "MP3"])
def test_sounds_and_their_beginning(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind.lower()}"
    path.write_bytes(sound(kind, 3.0))
    for source in (path, str(path), path.read_bytes()):
        samples, rate_hz = load("audio", source)
        assert (samples.dtype, samples.shape, rate_hz) == (np.float32, (3 * RATE_HZ,), RATE_HZ)
    start, _ = load("audio", path, max_seconds=0.5)
    assert start.shape == (RATE_HZ // 2,)
    assert np.array_equal(start, samples[: len(start)])


def test_a_beginning_needs_no_more_than_the_beginning() -> None:
    """What is broken beyond max_seconds was not asked for."""
    samples, _ = load("audio", half(sound("FLAC", 30)), max_seconds=2)
    assert len(samples) == 2 * RATE_HZ
    assert len(load("audio", half(sound("WAV", 4)), max_seconds=1.5)[0]) == 1.5 * RATE_HZ


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFF000, 0x80000000])
def test_a_wav_written_to_a_pipe_is_whole(length: int) -> None:
    data = bytearray(sound("WAV", 1))
    at = data.index(b"data") + 4
    data[4:8] = data[at : at + 4] = struct.pack("<I", length)  # what ffmpeg, sox, arecord write when they can't go back
    assert len(load("audio", bytes(data))[0]) == RATE_HZ


@pytest.mark.parametrize("loud_first", [False, True])
def test_an_mp3_without_a_count_is_whole(loud_first: bool) -> None:
    """The length in a bit-rate guess is far from the real one: neither cut at it, nor called truncated for it."""
    file = io.BytesIO()
    halves = [np.zeros(RATE_HZ * 8), NOISE.standard_normal(RATE_HZ * 8) * 0.3]
    samples = np.concatenate(halves[::-1] if loud_first else halves)
    soundfile.write(file, samples, RATE_HZ, format="MP3")
    data = file.getvalue()
    second = data.find(data[:2], 100)
    assert b"Xing" in data[:second] or b"Info" in data[:second]
    assert abs(len(load("audio", data[second:])[0]) - len(samples)) < 0.2 * RATE_HZ


def test_channels_are_averaged(tmp_path: Path) -> None:
    stereo = np.stack([np.full(100, 0.5), np.full(100, -0.25)], axis=1).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", stereo, RATE_HZ, subtype="FLOAT")
    expected = np.full(100, 0.125, np.float32)
    for source in (tmp_path / "x.wav", (stereo.T, RATE_HZ), (torch.from_numpy(stereo).T, RATE_HZ)):
        assert np.array_equal(load("audio", source)[0], expected)
    nine = NOISE.uniform(-1, 1, (500, 9)).astype(np.float32)
    soundfile.write(tmp_path / "nine.wav", nine, RATE_HZ, subtype="FLOAT")
    for source in (tmp_path / "nine.wav", (nine.T, RATE_HZ)):
        assert np.allclose(load("audio", source)[0], nine.mean(axis=1), atol=1e-6)


def test_m4a(tmp_path: Path) -> None:
    data = m4a(3.0)
    path = tmp_path / "x.m4a"
    path.write_bytes(data)
    assert len(data) > 20_000  # more than a read-ahead buffer
    samples, rate_hz = load("audio", data)
    assert np.array_equal(load("audio", path)[0], samples)
    assert (samples.dtype, rate_hz) == (np.float32, RATE_HZ)
    assert 3.0 <= len(samples) / RATE_HZ < 3.2
    loudness = np.sqrt(np.mean(samples**2)) / np.sqrt(np.mean(tone(3.0) ** 2))
    assert 0.9 < loudness < 1.1
    assert len(load("audio", data, max_seconds=1)[0]) == RATE_HZ
    with pytest.raises(MediaError, match="too_large"):
        load("audio", data, limits=Limits(audio_minutes=0.04))
    # A list of addresses is no sound: following it would be reading files of the sender's choice.
    for listing in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{path}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{path}'\n",
    ):
        with pytest.raises(MediaError, match="unsupported"):
            load("audio", listing.encode())


def test_without_pyav_the_extra_is_named(tmp_path: Path) -> None:
    path = tmp_path / "note.m4a"
    path.write_bytes(m4a())
    code = (
        "import sys; sys.modules['av'] = None\n"
        "from mmpipe.media import load\n"
        "from mmpipe.errors import MediaError\n"
        "try: load('audio', sys.argv[1])\n"
        "except MediaError as error:\n"
        "    assert error.code == 'unsupported' and 'mmpipe[av]' in error.text, error\n"
        "else: raise SystemExit('loaded')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)


def test_arrays_of_sound() -> None:
    wave = tone()[:, 0]
    for scaled, close in (
        (wave, 0),
        (wave.astype(np.float64), 0),
        (torch.from_numpy(wave), 0),
        (np.rint(wave * 32767).astype(np.int16), 1e-4),
        (np.rint(wave * 127 + 128).astype(np.uint8), 1e-2),
    ):
        samples, rate_hz = load("audio", (scaled, float(RATE_HZ)))
        assert (samples.dtype, rate_hz) == (np.float32, RATE_HZ)
        assert np.abs(samples - wave).max() <= close
    assert len(load("audio", (wave, RATE_HZ), max_seconds=0.25)[0]) == RATE_HZ // 4


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (np.zeros(9, np.float32), "no_rate"),
        (torch.zeros(9), "no_rate"),
        ((np.zeros(9, np.float32), None), "no_rate"),
        ((np.zeros(9, np.float32), 0), "no_rate"),
        ((RATE_HZ, np.zeros(9, np.float32)), "unsupported"),
        ((np.zeros((4800, 2), np.float32), RATE_HZ), "unsupported"),
        ((np.zeros(0, np.float32), RATE_HZ), "empty"),
        ((np.array([1.0, np.inf]), RATE_HZ), "not_finite"),
        ((np.zeros(9, complex), RATE_HZ), "unsupported"),
        ((np.broadcast_to(np.float32(0), 8000 * 60 * 241), 8000), "too_large"),
        (None, "unsupported"),
        ([0.0, 0.1], "unsupported"),
    ],
)
def test_no_sound(source: Any, code: str) -> None:
    with pytest.raises(MediaError) as info:
        load("audio", source)
    assert info.value.code == code


def test_limits_before_memory(tmp_path: Path) -> None:
    sparse = tmp_path / "huge.jpg"
    with sparse.open("wb") as file:
        file.truncate(600_000_000)
    for modality in ("image", "text", "audio"):
        with pytest.raises(MediaError, match="over the limit") as info:
            load(modality, sparse)
        assert info.value.code == "too_large"
    with pytest.raises(MediaError, match=r"0\.1 minutes, over the limit of 0\.05"):
        load("audio", sound("FLAC", 4), limits=Limits(audio_minutes=0.05), max_seconds=1)


def test_estimates_hold(tmp_path: Path) -> None:
    """No less than what is handed out, and not absurdly more."""
    path = tmp_path / "x.png"
    path.write_bytes(encoded(picture(600, 400), "PNG"))
    assert 600 * 400 * 4 <= estimate_bytes("image", path) <= 600 * 400 * 8
    assert estimate_bytes("image", encoded(picture(600, 400), "JPEG", progressive=True)) >= 600 * 400 * 8
    long = sound("FLAC", 60)
    assert 60 * RATE_HZ * 4 <= estimate_bytes("audio", long) <= 60 * RATE_HZ * 16
    assert RATE_HZ * 4 <= estimate_bytes("audio", long, max_seconds=1) <= RATE_HZ * 4 + 300_000
    assert estimate_bytes("audio", m4a(3)) >= 3 * RATE_HZ * 4
    assert estimate_bytes("text", "word " * 1000) >= 5000
    assert estimate_bytes("image", np.zeros((10, 10, 3), np.uint8)) >= 300
    assert estimate_bytes("audio", (np.zeros(1000, np.float32), RATE_HZ)) >= 4000
