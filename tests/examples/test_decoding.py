"""The example runs and prints every figure that it promises; the figures are nobody's test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def test_decoding_prints_each_figure(tmp_path):
    media = CHECKOUT / "configs" / "quickstart" / "media"
    done = subprocess.run(
        [sys.executable, CHECKOUT / "examples" / "decoding.py", "quickstart", media, "--limit", "24", "--repeats", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for part in ("24 samples", ".jpg", ".flac", "image: 1 − cosine", "confidence moves by", "labels that are not"):
        assert part in done.stdout, part
