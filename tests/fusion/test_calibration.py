"""Exact statistics against hand-made numbers and definitions; paths that only fall; a promise that is kept, and cheats
that are caught."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpipe.fusion import gate
from mmpipe.fusion.binomial import (
    cdf_table,
    items_for,
    least_items,
    lower_limit,
    most_errors,
    p_value,
    upper_limit,
)
from mmpipe.fusion.calibration import (
    CalibrationError,
    Certified,
    Split,
    accuracy_loss,
    certify,
    fixed_sequence,
    learnt_paths,
    split,
    temperature,
    worst_classes,
)
from mmpipe.fusion.thresholds import Exits, threshold_path

# --- exact binomial -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "items"), [(0.02, 149), (0.01, 299), (0.005, 598)])
def test_items_without_an_error_that_certify(limit, items):
    assert least_items(limit, 0.05) == items
    assert p_value(0, items, limit) <= 0.05 < p_value(0, items - 1, limit)
    assert most_errors(items, limit, 0.05) == 0
    assert most_errors(items - 1, limit, 0.05) == -1


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.floats(0.01, 0.99), st.data())
def test_a_p_value_is_the_sum_of_the_chances_of_at_most_so_many(n, rate, data):
    k = data.draw(st.integers(0, n))
    by_hand = sum(math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(k + 1))
    assert p_value(k, n, rate) == pytest.approx(by_hand, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.floats(0.005, 0.5), st.floats(0.01, 0.3), st.floats(1.0, 1.9))
def test_a_true_null_is_rejected_no_more_often_than_the_level(n, limit, level, times):
    rate = min(limit * times, 1.0)  # the limit or more
    passing = most_errors(n, limit, level)
    chance = cdf_table(n, rate)[passing] if passing >= 0 else 0.0
    assert chance <= level + 1e-12


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.data(), st.floats(0.01, 0.2))
def test_limits_are_where_the_tail_has_the_level(n, data, level):
    errors = data.draw(st.integers(0, n))
    upper, lower = upper_limit(errors, n, level), lower_limit(errors, n, level)
    assert 0 <= lower <= errors / n <= upper <= 1
    if errors < n:
        assert p_value(errors, n, upper) == pytest.approx(level, rel=1e-6)
    if errors:
        assert 1 - p_value(errors - 1, n, lower) == pytest.approx(level, rel=1e-6)


def test_items_for_is_the_size_at_which_the_expected_errors_pass():
    assert items_for(0.0, 0.01, 0.05) == 299
    needed = items_for(0.004, 0.01, 0.05)
    assert p_value(math.ceil(0.004 * needed), needed, 0.01) <= 0.05
    assert needed < items_for(0.006, 0.01, 0.05) < items_for(0.009, 0.01, 0.05)
    assert items_for(0.01, 0.01, 0.05) is None


# --- fixed sequence -------------------------------------------------------------------------------------------------


def test_testing_stops_at_the_first_failure_whatever_follows():
    assert fixed_sequence([0, 0, 50, 0, 0], 1000, 0.01, 0.05) == 2
    assert fixed_sequence([50, 0], 1000, 0.01, 0.05) == 0
    assert fixed_sequence([0, 1, 4], 1000, 0.01, 0.05) == 3
    assert fixed_sequence([], 1000, 0.01, 0.05) == 0


def test_a_p_value_equal_to_the_level_passes():
    assert fixed_sequence([0], 1, 0.5, 0.5) == 1


# --- paths ----------------------------------------------------------------------------------------------------------


def table(seed: int, count: int, exits: int = 2, *, levels: int = 0) -> Exits:
    """Exits whose confidence tells something of their errors; `levels`: so coarse that many are equal."""
    random = np.random.default_rng(seed)
    margin_EN = random.normal(size=(exits, count)) * 1.5 + np.linspace(1.5, 3.5, exits)[:, None]
    chance_EN = 1 / (1 + np.exp(margin_EN))
    confidence_EN = 1 - chance_EN
    if levels:
        confidence_EN = np.round(confidence_EN * levels) / levels
    return Exits(
        tuple(f"e{e}" for e in range(exits)),
        confidence_EN,
        random.random((exits, count)) < chance_EN,
        random.random((exits, count)) < 0.9,
        np.arange(1.0, exits + 2)[:, None] * np.ones(count),
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 120), st.integers(1, 4), st.integers(0, 12), st.integers(2, 64))
def test_thresholds_of_a_path_only_fall_and_keep_within_the_errors(seed, count, exits, most, points):
    made = table(seed, count, exits, levels=seed % 7)
    path_KE = threshold_path(made, most, points)
    assert path_KE.shape[1:] == (exits,)
    assert len(path_KE) <= points
    assert (path_KE[1:] <= path_KE[:-1]).all()
    assert (path_KE[1:] < path_KE[:-1]).any(axis=1).all()  # every point is a new one
    errors_K, saving_K = made.outcome(path_KE)
    assert (errors_K <= most).all()
    assert (saving_K >= -1e-12).all()
    assert (made.leaving(path_KE)[:, ~made.gated_EN.any(axis=0)] == exits).all()


def test_what_a_path_says_is_what_the_gate_would_do():
    made = table(3, 400)
    for thresholds in threshold_path(made, 6):
        answered = np.full(400, 2)
        for row in range(400):
            for e in (0, 1):
                sure = gate.leaves(torch.tensor(made.confidence_EN[e, row], dtype=torch.float64), thresholds[e])
                if made.gated_EN[e, row] and bool(sure):
                    answered[row] = e
                    break
        assert (made.leaving(thresholds[None])[0] == answered).all()
        differs = sum(made.differs_EN[e, row] for row, e in enumerate(answered) if e < 2)
        assert made.outcome(thresholds[None])[0][0] == differs


def test_a_path_finds_what_an_exhaustive_search_finds():
    made = table(5, 60)
    best = 0.0
    for a in [*made.confidence_EN[0], np.inf]:
        pairs = np.array([[a, b] for b in [*made.confidence_EN[1], np.inf]])
        errors_K, saving_K = made.outcome(pairs)
        best = max(best, saving_K[errors_K <= 3].max(initial=0.0))
    assert made.outcome(threshold_path(made, 3))[1].max() >= 0.9 * best


# --- the promise ----------------------------------------------------------------------------------------------------

LIMIT, LEVEL, TRIALS = 0.02, 0.1, 300


def broken(judge) -> float:
    """The share of calibrations whose true risk exceeds the limit; `judge` makes one from drawn rows and a seed."""
    whole = table(11, 20_000)
    random = np.random.default_rng(4)
    count = 0
    for trial in range(TRIALS):
        point = judge(whole.rows(random.integers(0, whole.count, 800)), trial)
        if point is not None:
            count += whole.outcome(point[None])[0][0] > LIMIT * whole.count
    return count / TRIALS


def honest(drawn: Exits, trial: int, parts: Split | None = None):
    made = certify([drawn], parts or split(800, trial), max_disagreement=LIMIT, certainty=1 - LEVEL)
    return None if made.point is None else made.path_KE[made.point]


def test_the_promise_is_kept_as_often_as_it_says_and_is_worth_something():
    assert lower_limit(round(broken(honest) * TRIALS), TRIALS, 0.05) <= LEVEL
    made = certify([table(1, 3000)], split(3000), max_disagreement=LIMIT, certainty=0.95)
    best = table(1, 3000).outcome(threshold_path(table(1, 3000), 60))[1].max()
    assert made.saving > 0.6 * best


def test_testing_on_what_was_learnt_from_breaks_it_and_is_refused():
    def cheat(drawn, trial):
        learn = np.arange(800)
        path_KE = learnt_paths([drawn], Split(learn, learn), LIMIT)[0]
        passed = fixed_sequence(drawn.outcome(path_KE)[0], 800, LIMIT, LEVEL)
        return path_KE[passed - 1] if passed else None

    assert lower_limit(round(broken(cheat) * TRIALS), TRIALS, 0.05) > LEVEL
    with pytest.raises(CalibrationError, match="share samples"):
        honest(table(1, 800), 0, Split(np.arange(500), np.arange(400, 800)))


def test_going_on_after_a_failure_would_break_it():
    """Many points at the limit, each tested by itself, and no stop: the correction is what keeps the promise."""
    random = np.random.default_rng(0)
    errors_TK = random.binomial(500, LIMIT, size=(TRIALS, 40))
    with_stop = np.mean([fixed_sequence(row, 500, LIMIT, LEVEL) > 0 for row in errors_TK])
    without = np.mean([any(p_value(int(k), 500, LIMIT) <= LEVEL for k in row) for row in errors_TK])
    assert with_stop <= LEVEL + 0.04
    assert without > 3 * LEVEL


def test_one_global_path_counts_all_exits_together():
    """Two exits that err on 1% of all samples each, on different ones: 2% differ, which no limit of 1.5% allows."""
    count = 20_000
    random = np.random.default_rng(2)
    first = np.arange(count) < count // 2
    confidence = np.stack([np.where(first, 0.9, 0.1), np.full(count, 0.9)])
    exits = Exits(
        ("a", "b"),
        confidence,
        random.random((2, count)) < 0.02,
        np.ones((2, count), bool),
        np.ones((3, count)).cumsum(0),
    )
    made = certify([exits], split(count), max_disagreement=0.015, certainty=0.95)
    at_N = exits.leaving(np.array([made.thresholds]))[0]
    assert set(at_N) <= {0, 2} or set(at_N) <= {1, 2}  # one of them alone, never both
    assert made.saving > 0


# --- the whole ------------------------------------------------------------------------------------------------------


def test_too_few_items_certify_nothing_and_say_how_many_would():
    few = certify([table(1, 200)], split(200), max_disagreement=0.01, certainty=0.95)
    assert few.point is None
    assert few.thresholds == (math.inf, math.inf)
    assert few.saving == few.observed == 0.0
    needed = few.needed()
    assert 499 <= needed <= 3000  # 299 to test on at the least
    enough = certify([table(1, 2 * needed)], split(2 * needed), max_disagreement=0.01, certainty=0.95)
    assert enough.point is not None


def test_where_the_surest_answers_differ_too_often_no_number_of_items_helps():
    exits = table(1, 2000)
    flat = Exits(exits.names, np.full((2, 2000), 0.9), exits.differs_EN, exits.gated_EN, exits.cost_FN)
    made = certify([flat], split(2000), max_disagreement=0.01, certainty=0.95)  # all leave together, or none
    assert made.point is None
    assert made.thresholds == (math.inf, math.inf)


def test_the_order_that_saves_most_is_chosen_from_the_learn_split():
    cheap, dear = table(1, 3000), table(1, 3000)
    dear = Exits(
        dear.names, dear.confidence_EN, dear.differs_EN, dear.gated_EN, dear.cost_FN + np.array([[1.8], [0.9], [0]])
    )
    parts = split(3000)
    assert certify([dear, cheap], parts, max_disagreement=0.02, certainty=0.95).order == 1
    assert certify([cheap, dear], parts, max_disagreement=0.02, certainty=0.95).order == 0


@pytest.mark.parametrize(
    ("limit", "certainty"), [(0.0, 0.95), (1.0, 0.95), (0.01, 0.0), (0.01, 1.0), (float("nan"), 0.9)]
)
def test_shares_that_are_none_are_refused(limit, certainty):
    with pytest.raises(CalibrationError):
        certify([table(1, 50)], split(50), max_disagreement=limit, certainty=certainty)


def test_splits_are_random_disjoint_and_whole():
    parts = split(1000, seed=3)
    assert sorted([*parts.learn, *parts.test]) == list(range(1000))
    assert len(parts.learn) == 400
    assert not (parts.learn == split(1000, seed=4).learn).all()


def test_a_temperature_makes_the_labels_likeliest():
    torch.manual_seed(0)
    logits = torch.randn(4000, 5) * 2
    labels = torch.distributions.Categorical(logits=logits / 2.5).sample()
    found = temperature(logits, labels)
    assert found == pytest.approx(2.5, rel=0.08)

    def loss(value: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits.double() / value, labels))

    assert loss(found) <= min(loss(found * 1.02), loss(found / 1.02))
    assert temperature(logits, logits.argmax(dim=1)) == pytest.approx(0.2)  # never a mistake: bounded
    assert temperature(torch.full((3, 5), torch.nan), torch.zeros(3, dtype=torch.long)) == 1.0


def test_the_loss_of_accuracy_is_paired_and_pays_for_its_choice_of_a_point():
    exits = table(1, 4000)
    made = certify([exits], split(4000), max_disagreement=0.02, certainty=0.95)
    at_N = exits.leaving(np.array([made.thresholds]))[0]
    right_FN = np.ones((3, 4000), dtype=bool)
    right_FN[:2] = ~exits.differs_EN
    known_N = np.ones(4000, dtype=bool)
    loss = accuracy_loss(made, right_FN, known_N)
    differ = int(exits.differs_FN()[at_N, np.arange(4000)][made.split.test].sum())
    assert (loss.items, loss.lost, loss.won) == (2400, differ, 0)
    assert loss.bound == pytest.approx(upper_limit(differ, 2400, 0.05 / (2 * len(made.path_KE))))
    assert loss.bound > upper_limit(differ, 2400, 0.05) > loss.observed  # several points were looked at
    assert accuracy_loss(made, right_FN, np.zeros(4000, dtype=bool)) is None


def test_worst_classes_come_first_and_add_up():
    exits = table(1, 4000)
    made: Certified = certify([exits], split(4000), max_disagreement=0.02, certainty=0.95)
    full_N = np.arange(4000) % 3
    classes = worst_classes(made, full_N)
    rates = [one.errors / one.items for one in classes]
    assert rates == sorted(rates, reverse=True)
    assert sum(one.items for one in classes) == 2400
    assert sum(one.errors for one in classes) == made.errors_K[made.point]
    assert all(one.low <= one.errors / one.items <= one.high for one in classes)
