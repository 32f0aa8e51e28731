"""Pictures and sounds made for a test, whole and damaged."""

from __future__ import annotations

import io
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

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
