"""Good media come out as encoders expect them; broken ones as a MediaError with a code, and as nothing else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.made import RATE_HZ, encoded, half, holed, m4a, nan_wav, picture, png_header, sound

from mmpipe.errors import MediaError
from mmpipe.media import Limits, estimate_bytes, load

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
    ("a.ogg", lambda: half(sound("OGG", 9)), "audio", "truncated"),
    ("a.ogg", lambda: sound("OGG", 9)[:-1], "audio", "truncated"),
    ("a.opus", lambda: half(sound("OGG", 9, "OPUS")), "audio", "truncated"),
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
    with pytest.raises(MediaError, match=r"x\.jpg: no such file: addresses on the web are not fetched"):
        load("image", tmp_path / "https://example.com/x.jpg")
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


def test_before_it_is_decoded_it_says_what_it_takes(tmp_path: Path) -> None:
    """As estimated; and it waits for the answer."""
    taken: list[int] = []
    for modality, data in (
        ("image", encoded(picture(), "PNG")),
        ("image", encoded(picture(600, 400), "JPEG", progressive=True)),
        ("audio", sound("FLAC", 3)),
        ("audio", m4a(3)),
    ):
        path = tmp_path / "x"
        path.write_bytes(data)
        load(modality, path, reserve=taken.append)
        assert estimate_bytes(modality, path) == taken.pop() + (1 << 16)
        assert not taken
    load("image", picture(), reserve=taken.append)
    assert taken.pop() >= 3 * 48 * 32

    def refuse(count: int) -> None:
        raise MemoryError

    with pytest.raises(MediaError, match="not enough memory"):
        load("image", png_header(300, 300), reserve=refuse)
    with pytest.raises(MediaError):  # a header that can't be read takes nothing
        load("image", b"\xff\xd8\xff", reserve=taken.append)
    assert not taken


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_of_an_ogg_that_breaks_off_later_the_window_is_heard(subtype: str) -> None:
    whole = sound("OGG", 9, subtype)
    samples, rate_hz = load("audio", whole, max_seconds=2)
    again, _ = load("audio", half(whole), max_seconds=2)
    assert rate_hz == RATE_HZ
    assert len(samples) == 2 * RATE_HZ
    np.testing.assert_array_equal(again, samples)
    assert len(load("audio", whole)[0]) == 9 * RATE_HZ


def test_samples_in_a_list_are_told_of_as_such() -> None:
    with pytest.raises(MediaError, match="samples in a list: give an array or a tensor"):
        load("audio", ([0.0, 0.5], 16_000))
