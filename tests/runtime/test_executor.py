"""A plan's runs: the cascade against the whole graph, the numerics contract, gates, and what is never opened."""

from __future__ import annotations

import pytest
import torch
from support.parts import ORDER, batch
from support.running import DEPTH_EXITS, MODALITY_EXITS, Rows, executor, subset

from mmpipe.graphs.plan import PRESENCE


@pytest.mark.parametrize("specs", [[], MODALITY_EXITS, DEPTH_EXITS], ids=["none", "modalities", "depths"])
def test_exits_that_never_fire_are_the_full_graph(specs):
    runner, graph = executor(specs, [2.0] * len(specs))
    rows = batch(21)
    outcome = runner.run(rows[PRESENCE], Rows(rows))
    with torch.no_grad():
        want = graph(*rows.values())["exits"]["all"].softmax(-1)
    has_any = rows[PRESENCE].any(1)
    assert outcome.exit_N[has_any].tolist() == [len(specs)] * int(has_any.sum())
    assert outcome.exit_N[~has_any].tolist() == [-1] * int((~has_any).sum())
    assert (outcome.probabilities_NL[has_any] - want[has_any]).abs().max() <= 1e-5


@pytest.mark.parametrize("specs", [MODALITY_EXITS, DEPTH_EXITS], ids=["modalities", "depths"])
def test_every_row_leaves_at_the_first_exit_that_is_sure_of_it(specs):
    """Against the whole graph and plain rules, row by row."""
    thresholds = [0.3] * len(specs)
    runner, graph = executor(specs, thresholds)
    rows = batch(40, seed=3)
    rows[PRESENCE][:7] = torch.tensor([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1) if a + b + c]).bool()
    outcome = runner.run(rows[PRESENCE], Rows(rows))
    with torch.no_grad():
        answers = {name: logits.softmax(-1) for name, logits in graph(*rows.values())["exits"].items()}
    left = set()
    for row in range(40):
        has = {name for name, flag in zip(ORDER, rows[PRESENCE][row].tolist(), strict=True) if flag}
        want = -1
        for number, exit_ in enumerate(runner.plan.exits):
            last = number == len(specs)
            if has and (last or (has & set(exit_.brings) and answers[exit_.name][row].max() >= 0.3)):
                want = number
                break
        assert outcome.exit_N[row] == want, (row, has)
        if want >= 0:
            exact = answers[runner.plan.exits[want].name][row]
            assert (outcome.probabilities_NL[row] - exact).abs().max() <= 1e-5
        left.add(want)
    assert len(left) >= 3  # the test saw several ways out


@pytest.mark.parametrize("specs", [[], MODALITY_EXITS, DEPTH_EXITS], ids=["none", "modalities", "depths"])
def test_a_row_s_bytes_depend_on_its_sample_alone(specs):
    runner, _ = executor(specs, [0.3] * len(specs))
    rows = batch(30, seed=4)
    whole = runner.run(rows[PRESENCE], Rows(rows))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    shuffled = runner.run(rows[PRESENCE][order], Rows(subset(rows, order)))
    assert torch.equal(shuffled.probabilities_NL, whole.probabilities_NL[order])
    assert torch.equal(shuffled.exit_N, whole.exit_N[order])
    for row in range(0, 30, 5):
        alone = runner.run(rows[PRESENCE][row : row + 1], Rows(subset(rows, [row])))
        if alone.probabilities_NL is not None:
            assert torch.equal(alone.probabilities_NL[0], whole.probabilities_NL[row])
        assert alone.exit_N[0] == whole.exit_N[row]
        for name, table in alone.embeddings.items():
            column = ORDER.index(name)
            if alone.embedded_NM[0, column]:
                assert torch.equal(table[0], whole.embeddings[name][row])


def test_what_an_answered_row_did_not_need_is_never_asked_for():
    runner, _ = executor(MODALITY_EXITS, [0.0, 0.0])
    rows = batch(20)
    rows[PRESENCE][:] = True
    feed = Rows(rows)
    outcome = runner.run(rows[PRESENCE], feed)
    assert feed.asked == [(row, "image") for row in range(20)]
    assert outcome.opened_NM.tolist() == [[True, False, False]] * 20


def test_a_row_to_which_an_exit_brings_nothing_goes_on():
    runner, _ = executor(MODALITY_EXITS, [0.0, 0.0])
    rows = batch(3)
    rows[PRESENCE][:] = torch.tensor([[False, True, True], [False, False, True], [True, True, True]])
    outcome = runner.run(rows[PRESENCE], Rows(rows))
    assert outcome.exit_N.tolist() == [1, 2, 0]


def test_a_medium_that_fails_is_as_if_absent_and_says_why():
    runner, _ = executor(MODALITY_EXITS, [0.0, 0.0])
    rows = batch(4)
    rows[PRESENCE][:] = True
    feed = Rows(rows, broken=[(1, "image"), (2, "image"), (2, "text"), (2, "audio")])
    outcome = runner.run(rows[PRESENCE], feed)
    assert outcome.exit_N.tolist() == [0, 1, -1, 0]
    assert {row: sorted(why) for row, why in outcome.failures.items()} == {1: ["image"], 2: ["audio", "image", "text"]}
    absent = subset(rows, [1])
    absent[PRESENCE] = torch.tensor([[False, True, True]])
    assert torch.equal(runner.run(absent[PRESENCE], Rows(absent)).probabilities_NL[0], outcome.probabilities_NL[1])


def test_what_is_not_a_number_never_leaves_early_and_is_no_answer():
    runner, _ = executor(MODALITY_EXITS, [0.0, 0.0])
    rows = batch(3)
    rows[PRESENCE][:] = torch.tensor([[False, False, True]] * 3)
    rows["audio.frames"][1] = float("nan")
    outcome = runner.run(rows[PRESENCE], Rows(rows))
    assert outcome.exit_N.tolist() == [2, -1, 2]


def test_buckets_are_full_but_for_the_last():
    runner, _ = executor(MODALITY_EXITS, [2.0, 2.0])
    rows = batch(30)
    rows[PRESENCE][:] = True
    rows[PRESENCE][::3, 1] = False  # 20 rows have text
    spans = runner.run(rows[PRESENCE], Rows(rows)).spans
    assert [span.rows for span in spans if span.step == "text@1"] == [8, 8, 4]
    assert [span.rows for span in spans if span.step == "head@1"] == [8, 8, 4]


def test_the_callers_threads_and_gradients_stay_as_they_were():
    runner, _ = executor([], [])
    rows = batch(2)
    before = torch.get_num_threads(), torch.is_grad_enabled()
    runner.run(rows[PRESENCE], Rows(rows))
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == before


def test_no_rows_at_all():
    runner, _ = executor(MODALITY_EXITS, [0.5, 0.5])
    rows = batch(0)
    outcome = runner.run(rows[PRESENCE], Rows(rows))
    assert outcome.exit_N.tolist() == []
