"""Sounds of every kind come out as encoders expect them."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from support.made import NOISE, RATE_HZ, half, m4a, sound, tone

from mmpipe.errors import MediaError
from mmpipe.media import Limits, load


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


@pytest.mark.parametrize("rate", [0.0, 2e8])
def test_a_rate_that_no_sound_has_in_a_container(rate: float, tmp_path: Path) -> None:
    """Of which ten seconds would be all that a file holds, and many times as much in memory."""
    av = pytest.importorskip("av")
    with av.open(f"{tmp_path}/x.mkv", "w") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE_HZ)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray((tone().T * 30_000).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate = RATE_HZ
        container.mux([*stream.encode(frame), *stream.encode(None)])
    data = (tmp_path / "x.mkv").read_bytes()
    assert len(load("audio", data)[0]) == RATE_HZ
    written = struct.pack(">d", RATE_HZ)
    assert data.count(written) == 1
    with pytest.raises(MediaError, match=r"audio:corrupt: its header gives (no sample rate|a rate of 200,000,000 Hz)"):
        load("audio", data.replace(written, struct.pack(">d", rate)), max_seconds=1)
