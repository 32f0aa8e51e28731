"""The example that times encoders alone: every backend that can, why another can't, and shares that are shares."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "segments.py"


def test_on_the_demo():
    command = [sys.executable, str(EXAMPLE), "quickstart", "--rounds", "2", "--rows", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    refused, timed = done.stdout.splitlines()[::2], done.stdout.splitlines()[1::2]
    assert [re.split(r"@\d+ +", line)[0] for line in timed] == ["image", "text", "audio"]
    assert all(line.split()[1] == "eager" for line in timed)
    assert all("native" in line and "not: native is for bfloat16" in line for line in refused)
    shares = [float(re.search(r"products alone / it: ([0-9.]+)", line)[1]) for line in timed]
    assert all(0 < share < 1.5 for share in shares)
