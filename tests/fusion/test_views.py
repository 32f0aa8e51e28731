"""Weighing several views of a sample, with numbers written by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpipe.fusion.views import weigh


def weighed(*rows):
    table = torch.tensor(rows)
    return weigh(table, table.amax(dim=1))


def test_a_sure_view_outweighs_unsure_ones_that_do_not_agree():
    found = weighed([0.4, 0.3, 0.3], [0.05, 0.9, 0.05], [0.3, 0.36, 0.34])
    assert int(found.argmax()) == 1
    assert float(found.sum()) == pytest.approx(1.0)


def test_views_that_agree_outweigh_one_that_is_as_sure():
    assert int(weighed([0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [0.7, 0.2, 0.1]).argmax()) == 0


def test_views_that_disagree_leave_it_less_sure_than_the_first():
    assert 0.5 < float(weighed([0.7, 0.3], [0.3, 0.7])[0]) < 0.6


def test_a_view_that_rules_a_label_out_does_not_outvote_the_others():
    assert int(weighed([0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.0, 1.0]).argmax()) == 0


def test_one_view_is_its_own_answer_to_the_bit():
    one = torch.softmax(torch.randn(1, 5), dim=1)
    assert torch.equal(weigh(one, one.amax(dim=1)), one[0])


def test_a_tie_goes_to_the_first_label():
    assert int(weighed([0.5, 0.5], [0.5, 0.5]).argmax()) == 0


@given(st.lists(st.lists(st.floats(-8, 8), min_size=3, max_size=3), min_size=2, max_size=6), st.randoms())
def test_views_after_the_first_have_no_order(logits, random):
    table = torch.softmax(torch.tensor(logits, dtype=torch.float32), dim=1)
    later = list(range(1, len(logits)))
    random.shuffle(later)
    order = [0, *later]
    sure = table.amax(dim=1)
    assert torch.allclose(weigh(table, sure), weigh(table[order], sure[order]), atol=1e-6)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(broken):
    with pytest.raises(ValueError, match="no numbers"):
        weigh(torch.tensor([[0.5, broken], [0.5, 0.5]]), torch.tensor([0.5, 0.5]))


def test_nothing_to_weigh_is_refused():
    with pytest.raises(ValueError, match="shapes"):
        weigh(torch.zeros(0, 3), torch.zeros(0))
