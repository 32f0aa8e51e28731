"""The example runs, as a user would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_predict_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "predict.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "title alone: " in done.stdout
    assert "embeddings: (8, 192)" in done.stdout
    assert "stage 2  audio" in done.stdout
