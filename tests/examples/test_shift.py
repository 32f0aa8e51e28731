"""The example runs and prints every figure that it promises; the figures are nobody's test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
SHIFTS = ("24 samples", "image: 1 − cosine", "confidence moves by", "labels that are not")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ([], (*SHIFTS, "input.decode=fast", ".jpg", ".flac", "exact ÷ fast")),
        (["--change", "runtime.dtype=bfloat16"], (*SHIFTS, "runtime.dtype=bfloat16")),
    ],
)
def test_it_prints_each_figure(tmp_path, change, parts):
    media = CHECKOUT / "configs" / "quickstart" / "media"
    command = [sys.executable, CHECKOUT / "examples" / "shift.py", "quickstart", media, "--limit", "24", *change]
    done = subprocess.run([*command, "--repeats", "1"], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    for part in parts:
        assert part in done.stdout, part
    assert (".jpg" in done.stdout) == (not change)
