"""examples/benchmark.py: what it tells of what it measured. What it measures needs full-size models and minutes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("benchmark")
    for name in ("benchmark", "benchmark_peers"):
        sys.modules.pop(name, None)


@pytest.fixture
def found(benchmark):
    base = benchmark.Contender("script, bfloat16", 1.0, [10.0, 12.0, 11.0], {"image": 0.9999})
    other = benchmark.Contender("mmpipe", 2.0, [5.0, 4.0, 5.5], {"image": 0.9999, "text": 0.98})
    return [base, other]


def test_ratios_are_of_the_same_round_and_lost_parity_is_said(benchmark, found):
    first, second = list(benchmark.table(found, 100))[2:]
    assert "| 9.1 | 1.00 (1.00–1.00) |" in first
    assert "| 20.0 | 2.00 (2.00–3.00) |" in second
    assert "not at parity" in second
    assert "not at parity" not in first


def test_the_plot_is_a_picture_with_a_bar_for_each(benchmark, found):
    picture = ElementTree.fromstring(benchmark.plot(found, 100, "a machine"))
    name = "{http://www.w3.org/2000/svg}"
    bars = [float(bar.get("width")) for bar in picture.findall(f"{name}rect")[1:]]
    assert bars[1] / bars[0] == pytest.approx(2.2, rel=1e-3)
    assert {"mmpipe", "script, bfloat16", "20.0"} <= {text.text for text in picture.findall(f"{name}text")}
