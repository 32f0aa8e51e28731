"""The audit's interval holds at every look at once, is never needlessly wide, and sees a broken promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmpipe.fusion.audit import PRIOR_NO, PRIOR_YES, Observed, share_of

LOOKS = 10_000
ALPHA = 0.05


def evidence_paths(p: float, runs: int, seed: int, rate: float | None = None) -> torch.Tensor:
    """log M_n(p) of `runs` jobs at each of 10,000 looks [runs, looks]; the truth is `rate`, else p."""
    draw = torch.rand(runs, LOOKS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    yes = (draw < (p if rate is None else rate)).cumsum(dim=1).double()
    count = torch.arange(1, LOOKS + 1, dtype=torch.float64)
    a, b = PRIOR_YES, PRIOR_NO
    mixture = torch.lgamma(a + yes) + torch.lgamma(b + count - yes) - torch.lgamma(a + b + count)
    mixture -= math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return mixture - yes * math.log(p) - (count - yes) * math.log1p(-p)


def test_the_simulations_evidence_is_the_modules():
    paths = evidence_paths(0.01, 1, 9, rate=1.0)[0]
    assert all(float(paths[n - 1]) == pytest.approx(Observed(n, n).evidence(0.01)) for n in (1, 7, 900, LOOKS))


def table(p: float) -> np.ndarray:
    """log M_n(p) as a table [count, yes], by the recursion of the martingale: a second way to the same number."""
    found = np.full((60, 60), -np.inf)
    found[0, 0] = 0.0
    for n in range(59):
        for k in range(n + 1):
            mean = (0.5 + k) / (10.5 + n)  # the mixture's own forecast of the next observation
            found[n + 1, k + 1] = found[n, k] + math.log(mean / p)
            found[n + 1, k] = found[n, k] + math.log((1 - mean) / (1 - p))
    return found


def test_the_evidence_is_a_game_of_bets_at_the_mixtures_forecasts():
    want = table(0.03)
    for n, k in ((1, 0), (1, 1), (10, 3), (59, 0), (59, 12)):
        assert Observed(n, k).evidence(0.03) == pytest.approx(want[n, k], abs=1e-9)


@pytest.mark.parametrize("p", [0.002, 0.01, 0.05, 0.3])
def test_over_ten_thousand_looks_the_truth_is_missed_no_more_often_than_said(p):
    """Of 600 jobs, those that ever miss it, at any look, are at most alpha (and 3 standard errors of that)."""
    ever = (evidence_paths(p, 600, seed=int(p * 1000)) >= -math.log(ALPHA)).any(dim=1)
    assert float(ever.double().mean()) <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / 600)


def test_an_ordinary_interval_would_miss_it_often():
    """Why it takes a confidence sequence: a 95% interval that is right at each look is wrong at some look."""
    p, runs = 0.2, 200
    yes = np.cumsum(np.random.default_rng(3).random((runs, LOOKS)) < p, axis=1)
    count = np.arange(1, LOOKS + 1)
    far = np.abs(yes / count - p) > 1.96 * np.sqrt(p * (1 - p) / count)
    assert far[:, 100:].any(axis=1).mean() > 0.3


def test_a_drift_is_seen_and_a_kept_promise_is_not_called_broken():
    drifted = evidence_paths(0.01, 200, 4, rate=0.05) >= -math.log(ALPHA)
    assert float(drifted.double().argmax(dim=1).double().median()) < 150  # samples chosen
    assert drifted[:, 1_500].all()
    assert all(Observed(n, n // 100).interval()[0] < 0.01 for n in range(1, 5_000, 7))


def test_the_interval_is_where_the_evidence_is_below_the_limit():
    for n, k in ((1, 0), (1, 1), (5, 5), (300, 3), (100_000, 1_200), (40, 0)):
        seen = Observed(n, k)
        low, high = seen.interval(0.95)
        assert 0 <= low <= seen.estimate <= high <= 1
        assert low == 0 if k == 0 else seen.evidence(low) == pytest.approx(math.log(20), abs=1e-6)
        assert high == 1 if k == n else seen.evidence(high) == pytest.approx(math.log(20), abs=1e-6)
    assert Observed(100_000, 1_200).interval()[0] > 0.01  # narrow enough to be of use
    assert Observed(300, 3).interval(0.99)[0] < Observed(300, 3).interval(0.95)[0]


def test_before_the_first_observation_nothing_is_known():
    assert Observed().interval() == (0.0, 1.0)
    assert Observed().estimate is None
    assert Observed().plus(True).plus(False) == Observed(2, 1)


@pytest.mark.parametrize(("count", "yes"), [(1, 2), (3, -1)])
def test_impossible_counts_are_refused(count, yes):
    with pytest.raises(ValueError, match="is no count"):
        Observed(count, yes)


def test_certainty_is_a_probability():
    with pytest.raises(ValueError, match="certainty"):
        Observed(3, 1).interval(1.0)


def test_a_hash_becomes_a_share():
    assert share_of(bytes(8)) == 0.0
    assert share_of(b"\xff" * 8) < 1.0
    assert share_of(b"\x80" + bytes(7)) == 0.5
