"""The example on digits: what it draws is what it says, and its table says what it was given."""

from __future__ import annotations

import random
import sys

import pytest
from support import examples


@pytest.fixture(scope="module")
def digits():
    before = list(sys.path)
    yield examples.load("digits")
    sys.path[:] = before
    sys.modules.pop("voices", None)


def test_phrases_tell_the_number_as_often_as_said(digits):
    draw = random.Random(0)
    told = [digits.phrase(7, draw) for _ in range(2000)]
    assert abs(sum("seven" in one for one in told) / 2000 - (1 - digits.VAGUE) * (1 - digits.TYPO)) < 0.04
    assert all(digits.misspelt(word, random.Random(n)) for n, word in enumerate(digits.WORDS))


def test_the_table_pairs_by_seed(digits):
    runs = [{"fused": (90, 100), "averaged": (88, 100)}, {"fused": (86, 100), "averaged": (86, 100)}]
    shown = digits.table(runs, [3, 4]).splitlines()
    assert shown[0].split()[:4] == ["seed", "3", "seed", "4"]
    assert shown[1].split() == ["fused", "90.0", "86.0", "88.0"]
    assert "+1.0 points (± 12.7)" in shown[2]
