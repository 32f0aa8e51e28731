"""The examples that measure audit and deliberation: their arithmetic, and that they run."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_power_table_rises_with_the_drift(capsys):
    main = runpy.run_path(str(EXAMPLES / "audit_power.py"))["main"]
    assert main(["--runs", "20"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    alarms = {name: (float(seen.rstrip("%")), median) for name, seen, median, _ in lines}
    assert alarms["0.5%"][0] <= alarms["1.0%"][0] <= 15
    assert alarms["5.0%"][0] == 100
    assert float(alarms["10.0%"][1]) < float(alarms["5.0%"][1])


@pytest.fixture
def counts(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "products"))
    own = ("make", "photos", "titles", "voices")
    try:
        yield runpy.run_path(str(EXAMPLES / "products" / "deliberate.py"))["Counts"]
    finally:
        for name in own:
            sys.modules.pop(name, None)


def test_mcnemars_test_is_exact(counts):
    assert counts(won=0, lost=0).p_value == 1.0
    assert counts(won=5, lost=0).p_value == pytest.approx(2 / 32)
    assert counts(won=2, lost=8).p_value == counts(won=8, lost=2).p_value == pytest.approx(2 * 56 / 1024)
    assert counts(won=3, lost=3).p_value == 1.0


def test_seeds_add_up(counts):
    total = counts(rows=10, touched=4, before=1, after=3, won=2) + counts(rows=10, touched=2, before=1, after=1)
    assert (total.rows, total.touched, total.before, total.after, total.won, total.lost) == (20, 6, 2, 4, 2, 0)
