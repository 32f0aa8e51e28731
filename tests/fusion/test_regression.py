from __future__ import annotations

import math

import pytest
import torch

from mmpipe.fusion.baselines import baselines
from mmpipe.fusion.experts import experts, joined, start_from
from mmpipe.fusion.heads import TransformerHead
from mmpipe.fusion.items import Items, TrainingError, balanced_weights
from mmpipe.fusion.regression import regression, train_probe
from mmpipe.fusion.training import train_head

DIMS = {"image": 6, "text": 5}
LABELS = ["a", "b", "c"]


def items(n: int, seed: int, noise: float = 1.5) -> Items:
    """Either modality tells the label more often than not; a fifth of each is missing."""
    draw = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(0, 3, (n,), generator=draw)
    presence_NM = torch.rand(n, 2, generator=draw) >= 0.2
    embeddings = {}
    for m, (name, dim) in enumerate(DIMS.items()):
        centres = torch.randn(3, dim, generator=torch.Generator().manual_seed(50 + m))
        embeddings[name] = 3 + centres[labels_N] + noise * torch.randn(n, dim, generator=draw)
    return Items(embeddings, presence_NM, labels_N)


def test_a_probe_is_where_the_gradient_vanishes() -> None:
    """Standardising is folded in: the answer is that of the problem as it is stated."""
    given = items(200, 1)
    x_ND, y_N = given.embeddings["image"], given.labels_N
    weight_LD, bias_L = train_probe(x_ND, y_N, 3, penalty=1e-2)
    deviation_D = x_ND.std(0, correction=0)
    weight_LD, bias_L = weight_LD.requires_grad_(), bias_L.requires_grad_()
    loss = torch.nn.functional.cross_entropy(x_ND @ weight_LD.T + bias_L, y_N)
    (loss + 1e-2 * (weight_LD * deviation_D).square().sum()).backward()  # type: ignore[no-untyped-call]
    assert weight_LD.grad is not None
    assert bias_L.grad is not None
    assert weight_LD.grad.abs().max() < 1e-3
    assert bias_L.grad.abs().max() < 1e-3


def test_balanced_weights_by_hand() -> None:
    assert balanced_weights(torch.tensor([0, 0, 0, 1]), 2).tolist() == pytest.approx([2 / 3, 2.0])
    rare = torch.cat([torch.zeros(90), torch.ones(10)]).long()
    x_ND = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)) + rare[:, None] * 1.5
    plain, even = (
        regression(x_ND, rare, (x_ND, rare), 2, class_weights_L=weights)(x_ND).argmax(1)[90:].sum()
        for weights in (None, balanced_weights(rare, 2))
    )
    assert even > plain


def test_states_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(TrainingError, match="not finite"):
        train_probe(torch.tensor([[1.0], [torch.nan]]), torch.tensor([0, 1]), 2, penalty=0.1)


def test_a_refit_is_the_regression_on_both_parts_with_the_chosen_penalty() -> None:
    one, other = items(200, 1), items(60, 2)
    parts = [(part.embeddings["image"], part.labels_N) for part in (one, other)]
    found = regression(*parts[0], parts[1], 3, refit=True)
    assert found.penalty == regression(*parts[0], parts[1], 3).penalty
    both = [torch.cat(pair) for pair in zip(*parts, strict=True)]
    want_LF, _ = train_probe(*both, 3, penalty=found.penalty)
    assert torch.equal(found.weight_LF, want_LF)


def test_baselines_do_not_look_at_absent_rows() -> None:
    parts = [items(n, seed) for seed, n in enumerate((300, 80, 100))]
    found = baselines(*parts, 3)
    spoilt = [
        Items(
            {name: torch.where(part.presence_NM[:, m : m + 1], value, torch.full_like(value, 1e3))
             for m, (name, value) in enumerate(part.embeddings.items())},
            part.presence_NM, part.labels_N,
        )
        for part in parts
    ]  # fmt: skip
    again = baselines(*spoilt, 3)
    torch.testing.assert_close(found.averaged, again.averaged)
    torch.testing.assert_close(found.concatenated, again.concatenated, rtol=1e-3, atol=1e-4)
    assert found.alone["image"].isnan().any(dim=1).equal(~parts[2].presence_NM[:, 0])


def test_a_head_starts_as_the_sum_of_its_experts_and_may_stay_there() -> None:
    training, validation = items(300, 1), items(120, 2)
    weights_L = torch.ones(3)
    start = joined(experts(training, validation, 3, weights_L, seed=0), validation, weights_L)
    fourier = {name: len(one.fourier.get_buffer("phases_K")) for name, one in start.experts.items() if one.fourier}
    head = TransformerHead(DIMS, LABELS, width=16, depth=2, heads=2, direct=True, fourier=fourier, floors=True)
    start_from(head, start)
    with torch.no_grad():
        depths = head.all_depths(validation.embeddings, validation.presence_NM)
    want = torch.zeros(len(validation), 3)
    for m, (name, expert) in enumerate(start.experts.items()):
        unit = torch.nn.functional.normalize(validation.embeddings[name], dim=-1)
        p_NL = (start.scale[name] * expert.logits(unit)).softmax(-1) + math.exp(start.log_floor[name])
        want += validation.presence_NM[:, m : m + 1] * math.exp(start.log_weight[name]) * p_NL.log()
    for logits in depths:
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    whole = [torch.cat([one, other]) for one, other in (
        (training.presence_NM, validation.presence_NM), (training.labels_N, validation.labels_N))]  # fmt: skip
    embeddings = {name: torch.cat([training.embeddings[name], validation.embeddings[name]]) for name in DIMS}
    rows = torch.arange(300, 420)
    result = train_head(
        head, embeddings, *whole, epochs=3, lr=10.0, averaging=0.5, from_start=True, validation_rows=rows
    )  # a step so wide that it only does harm
    assert result.best_epoch == 0
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert set(result.validation_rows) <= set(rows.tolist())


def test_recombined_media_keep_their_label() -> None:
    from mmpipe.fusion.augment import Augment

    labels_N = torch.arange(60) % 3
    embeddings = {name: labels_N[:, None].float() + torch.rand(60, 1) * 0.5 for name in DIMS}
    given = Items(embeddings, torch.ones(60, 2, dtype=torch.bool), labels_N)
    seen = Augment(given, 0.0, 1.0, torch.Generator().manual_seed(0))(torch.arange(60))
    for name in DIMS:
        assert seen.embeddings[name].floor().squeeze(1).long().equal(labels_N)
        assert not seen.embeddings[name].equal(embeddings[name])
