"""What a medium takes while it is decoded is no more than what was asked for before: Linux tells how much that was."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from support.made import encoded, picture

from mmpipe.errors import MediaError
from mmpipe.media import estimate_bytes, load

told = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells")

MEASURED = """
import sys
from pathlib import Path
from mmpipe.media import load
from mmpipe.errors import MediaError

def told(name):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

small, large = map(Path, sys.argv[1:])
load("image", small)
reserved = []
open("/proc/self/clear_refs", "w").write("5")
before = told("VmRSS")
try:
    load("image", large, reserve=reserved.append)
except MediaError as error:
    print(error.code, file=sys.stderr)
print(sum(reserved), told("VmHWM") - before)
"""
SIZE = (3000, 2000)
SPARE = 10_000_000  # libraries that are loaded late, and what Python takes


def noise(mode: str = "RGB") -> Image.Image:
    made = picture(300, 200).resize(SIZE)
    return made if mode == "RGB" else made.convert(mode)


def deep(kind: type[np.generic]) -> Image.Image:
    return Image.fromarray(np.asarray(noise("L")).astype(kind))


PICTURES = {
    "JPEG": lambda: encoded(noise(), "JPEG"),
    "JPEG, progressive": lambda: encoded(noise(), "JPEG", progressive=True),
    "JPEG, CMYK": lambda: encoded(noise("CMYK"), "JPEG"),
    "PNG": lambda: encoded(noise(), "PNG", compress_level=1),
    "PNG, alpha": lambda: encoded(noise("RGBA"), "PNG", compress_level=1),
    "PNG, palette": lambda: encoded(noise("P"), "PNG", compress_level=1),
    "PNG, 16 bits": lambda: encoded(deep(np.uint16), "PNG", compress_level=1),
    "WEBP": lambda: encoded(noise(), "WEBP", method=0),
    "WEBP, lossless": lambda: encoded(noise(), "WEBP", lossless=True, quality=0, method=0),
    "AVIF": lambda: encoded(noise(), "AVIF", speed=10),
    "TIFF": lambda: encoded(noise(), "TIFF"),
    "TIFF, LZW": lambda: encoded(noise(), "TIFF", compression="tiff_lzw"),
    "TIFF, float": lambda: encoded(deep(np.float32), "TIFF"),
    "TIFF, 32 bits": lambda: encoded(deep(np.int32), "TIFF"),
    "GIF": lambda: encoded(noise("P"), "GIF"),
    "BMP": lambda: encoded(noise(), "BMP"),
}


def measured(folder: Path, kind: str, data: bytes) -> tuple[int, int]:
    """(bytes reserved, bytes taken)"""
    small, large = folder / "small", folder / "large"
    small.write_bytes(encoded(picture(), kind))
    large.write_bytes(data)
    command = [sys.executable, "-c", MEASURED, small, large]
    reserved, taken = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    return reserved, taken


@told
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture(tmp_path: Path, name: str) -> None:
    kind = name.partition(",")[0]
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow knows no AVIF")
    reserved, taken = measured(tmp_path, kind, PICTURES[name]())
    assert taken <= reserved + SPARE
    assert reserved <= 48 * SIZE[0] * SIZE[1]


@told
def test_a_large_file_of_few_pixels(tmp_path: Path) -> None:
    """What is in it beside its pixels is read to open it."""
    head, rest = encoded(picture(), "JPEG")[:2], encoded(picture(), "JPEG")[2:]
    segment = b"\xff\xe5" + struct.pack(">H", 65535) + bytes(65533)
    for kind, data in (("JPEG", head + segment * 600 + rest), ("WEBP", encoded(picture(), "WEBP") + bytes(40_000_000))):
        reserved, taken = measured(tmp_path, kind, data)
        assert 3 * SPARE < taken <= reserved + SPARE
        before: list[int] = []  # of what other processes decode: as much, and before it is opened to be looked at
        about = estimate_bytes("image", data, reserve=before.append)
        assert sum(before) + about == reserved + (1 << 16)


def test_a_rate_that_no_sound_has(tmp_path: Path) -> None:
    """Seconds of it would be as many bytes as the file has, eight times over."""
    path = tmp_path / "x.wav"
    data = b"\x80\x90" * 50_000
    form = struct.pack("<IHHIIHH", 16, 1, 1, 2_000_000_000, 2_000_000_000, 1, 8)
    path.write_bytes(
        b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + form + b"data" + struct.pack("<I", len(data)) + data
    )
    for source in (path, path.read_bytes()):
        with pytest.raises(MediaError, match=r"audio:corrupt: .*a rate of 2,000,000,000 Hz, over 1,000,000"):
            load("audio", source, max_seconds=10)
