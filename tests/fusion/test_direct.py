from __future__ import annotations

import pytest
import torch

from mmpipe.fusion.checkpoint import load_head, read_checkpoint, save_checkpoint
from mmpipe.fusion.direct import BANDWIDTH, FourierFeatures, Pool
from mmpipe.fusion.experts import again, experts, joined, start_from, take_answers
from mmpipe.fusion.heads import HeadError, TransformerHead
from mmpipe.fusion.items import Items

DIMS = {"image": 6, "text": 5}
LABELS = ["a", "b"]
WEIGHTS = torch.ones(2)


def curved(n: int, seed: int) -> Items:
    """The label is whether two small, hidden directions of the picture agree in sign: no linear answer tells it."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(9)))[0]
    hidden_ND = torch.randn(n, 6, generator=draw) * torch.tensor([0.05, 0.05, 1, 1, 1, 1])
    labels_N = (hidden_ND[:, 0] * hidden_ND[:, 1] > 0).long()
    image = hidden_ND @ mix + 3 * mix[2]
    text = torch.randn(n, 5, generator=draw) + 2 * labels_N[:, None] * torch.eye(5)[0]
    presence_NM = torch.rand(n, 2, generator=draw) >= 0.1
    return Items({"image": image, "text": text}, presence_NM, labels_N)


def test_products_of_features_are_the_kernel_on_whitened_embeddings() -> None:
    x_ND = torch.randn(400, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 0.1, 3.0, 0.01]) + 2.0
    features = FourierFeatures.drawn(x_ND, 20_000, 0.0, torch.Generator().manual_seed(2))
    found_NK = features(x_ND[:50])
    white_ND = (x_ND - x_ND.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x_ND.T.cov())).T
    squared_NN = torch.cdist(white_ND[:50], white_ND[:50]).square()
    torch.testing.assert_close(
        2 * found_NK @ found_NK.T / 20_000, torch.exp(-BANDWIDTH * squared_NN / 4), atol=0.05, rtol=0
    )


def test_directions_below_the_floor_count_for_nothing() -> None:
    x_ND = torch.randn(300, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 1e-3])
    loud, quiet = (FourierFeatures.drawn(x_ND, 500, floor, torch.Generator().manual_seed(2)) for floor in (0.0, 1e-2))
    moved_ND = x_ND + torch.tensor([0.0, 1e-3])
    assert (loud(moved_ND) - loud(x_ND)).abs().mean() > 20 * (quiet(moved_ND) - quiet(x_ND)).abs().mean()


def test_no_modality_alone_rules_a_label_out() -> None:
    """One that is surely wrong against two that agree: a product follows it, a pool with a floor does not."""
    logits_MBL = torch.tensor([[[30.0, 0.0]], [[0.0, 2.0]], [[0.0, 2.0]]])
    pool = Pool(3)
    with torch.no_grad():
        pool.log_floor_M.fill_(-2.5)
        assert logits_MBL.sum(0).argmax() == 0
        assert sum(pool(logits_BL, m) for m, logits_BL in enumerate(logits_MBL)).argmax() == 1  # type: ignore[union-attr]
        pool.log_floor_M.fill_(-60.0)
        torch.testing.assert_close(pool(logits_MBL[1], 1), logits_MBL[1].log_softmax(-1))


def test_each_modality_takes_what_loses_least_on_the_held_out() -> None:
    training, validation, test = (curved(n, seed) for seed, n in enumerate((900, 300, 500)))
    found = experts(training, validation, 2, WEIGHTS, seed=0)
    assert found["image"].fourier is not None
    assert found["text"].fourier is None
    has_N = test.presence_NM[:, 0]
    unit_ND = torch.nn.functional.normalize(test.embeddings["image"], dim=-1)[has_N]
    assert (found["image"].logits(unit_ND).argmax(1) == test.labels_N[has_N]).float().mean() > 0.75
    same = experts(training, validation, 2, WEIGHTS, seed=0)
    for name in DIMS:
        assert torch.equal(found[name].answer.weight_LF, same[name].answer.weight_LF)


def test_answers_found_again_use_all_samples_and_leave_the_rest_of_the_head(tmp_path) -> None:  # type: ignore[no-untyped-def]
    training, validation = curved(300, 1), curved(150, 2)
    start = joined(experts(training, validation, 2, WEIGHTS, seed=0), validation, WEIGHTS)
    counts = {name: len(one.fourier.get_buffer("phases_K")) for name, one in start.experts.items() if one.fourier}
    options = {"width": 8, "depth": 1, "heads": 2, "direct": True, "fourier": counts, "floors": True}
    head = TransformerHead(DIMS, LABELS, **options)  # type: ignore[arg-type]
    start_from(head, start)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    both = Items(
        {name: torch.cat([training.embeddings[name], validation.embeddings[name]]) for name in DIMS},
        torch.cat([training.presence_NM, validation.presence_NM]),
        torch.cat([training.labels_N, validation.labels_N]),
    )
    take_answers(head, again(start, both, 2, WEIGHTS))
    changed = {name for name, value in head.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"direct.{name}.{part}" for name in DIMS for part in ("weight", "bias")}
    take_answers(head, again(start, training, 2, WEIGHTS))  # the same samples: the same answers
    for name, value in head.state_dict().items():
        torch.testing.assert_close(value, before[name])
    save_checkpoint(tmp_path / "head.safetensors", head, kind="transformer", labels=LABELS, dims=DIMS, options=options)
    loaded = load_head("transformer", DIMS, LABELS, checkpoint=read_checkpoint(tmp_path / "head.safetensors"))
    with torch.no_grad():
        given = validation.embeddings, validation.presence_NM
        assert torch.equal(loaded(*given), head.eval()(*given))


def test_heads_without_the_options_have_the_weights_that_they_had() -> None:
    plain = set(TransformerHead(DIMS, LABELS, width=8, depth=1, heads=2).state_dict())
    direct = set(TransformerHead(DIMS, LABELS, width=8, depth=1, heads=2, direct=True).state_dict())
    assert direct - plain == {f"direct.{name}.{part}" for name in DIMS for part in ("weight", "bias")}
    assert not any(name.startswith(("fourier", "pool")) for name in plain)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(HeadError, match="direct is off"):
        TransformerHead(DIMS, LABELS, floors=True)
    with pytest.raises(HeadError, match="fourier names sound"):
        TransformerHead(DIMS, LABELS, direct=True, fourier={"sound": 8})
