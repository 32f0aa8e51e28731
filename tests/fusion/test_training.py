from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmpipe.fusion.heads import LinearHead, TransformerHead
from mmpipe.fusion.training import TrainingError, choose_thresholds, train_head

DIMS = {"image": 6, "text": 5, "audio": 4}
LABELS = ["a", "b", "c"]


def blobs(n: int, seed: int = 0, missing: float = 0.2) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Each modality alone tells the label most of the time; absent rows hold what nobody may look at."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(0, 3, (n,), generator=generator)
    presence_NM = torch.rand(n, 3, generator=generator) >= missing
    embeddings = {}
    for m, (name, dim) in enumerate(DIMS.items()):
        centres = torch.randn(3, dim, generator=torch.Generator().manual_seed(100 + m)) * 3
        noisy_ND = centres[labels_N] + torch.randn(n, dim, generator=generator)
        embeddings[name] = torch.where(presence_NM[:, m : m + 1], noisy_ND, torch.full_like(noisy_ND, 1e3))
    return embeddings, presence_NM, labels_N


def trained(seed: int = 0, **options: object) -> tuple[nn.Module, object]:
    torch.manual_seed(1)
    head = TransformerHead(DIMS, LABELS, width=16, depth=2, heads=2)
    result = train_head(
        head, *blobs(600, missing=0), prefixes=[["image"], ["image", "text"]], epochs=15, lr=1e-2, seed=seed, **options
    )  # type: ignore[arg-type]
    return head.eval(), result


def accuracy(head: nn.Module, seen: list[str], depth: int = -1) -> float:
    embeddings, presence_NM, labels_N = blobs(400, seed=9)
    left_NM = presence_NM & torch.tensor([name in seen for name in DIMS])
    some_N = left_NM.any(1)
    with torch.no_grad():
        logits = head.all_depths({k: v[some_N] for k, v in embeddings.items()}, left_NM[some_N])[depth]  # type: ignore[operator]
    return float((logits.argmax(1) == labels_N[some_N]).float().mean())


def test_every_subset_and_every_depth_answers() -> None:
    head, result = trained()
    for seen in (["image"], ["text"], ["audio"], ["image", "text"], ["text", "audio"], list(DIMS)):
        for depth in (0, 1):
            assert accuracy(head, seen, depth) > 0.8, (seen, depth)
    assert accuracy(head, list(DIMS)) >= accuracy(head, ["audio"])
    assert result.best.validation_loss == min(epoch.validation_loss for epoch in result.history)  # type: ignore[attr-defined]


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    one, two, other = trained(3)[0], trained(3)[0], trained(4)[0]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_weights_are_the_best_epochs_and_training_stops_early() -> None:
    """Labels without a pattern: what is learnt can only hurt the held-out part."""
    embeddings, presence_NM, _ = blobs(200)
    labels_N = torch.randint(0, 3, (200,), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    head = TransformerHead(DIMS, LABELS, width=16, depth=1, heads=2)
    result = train_head(head, embeddings, presence_NM, labels_N, epochs=60, lr=1e-2, patience=5, validation_share=0.25)
    assert len(result.history) < 60
    assert len(result.history) == result.best_epoch + 6
    rows = list(result.validation_rows)
    kept = presence_NM[rows]
    with torch.no_grad():
        logits = head.eval()({name: value[rows] for name, value in embeddings.items()}, kept)
    assert float(nn.functional.cross_entropy(logits, labels_N[rows])) == pytest.approx(
        result.best.validation_loss, 1e-4
    )


def test_absent_rows_are_not_looked_at() -> None:
    embeddings, presence_NM, labels_N = blobs(300)
    changed = {
        name: torch.where(presence_NM[:, m : m + 1], value, torch.full_like(value, -7.0))
        for m, (name, value) in enumerate(embeddings.items())
    }
    weights = []
    for given in (embeddings, changed):
        torch.manual_seed(0)
        head = TransformerHead(DIMS, LABELS, width=16, depth=1, heads=2)
        train_head(head, given, presence_NM, labels_N, epochs=2)
        weights.append(torch.cat([p.detach().flatten() for p in head.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)


def test_a_head_without_depths_trains_too() -> None:
    head = LinearHead(DIMS, LABELS)
    result = train_head(head, *blobs(300), prefixes=[["text"]], epochs=15, lr=2e-2)
    assert result.best.validation_accuracy > 0.9


def test_what_does_not_fit_is_said() -> None:
    embeddings, presence_NM, labels_N = blobs(50)
    head = LinearHead(DIMS, LABELS)
    with pytest.raises(TrainingError, match=r"prefix \['sound'\]: no embeddings for sound"):
        train_head(head, embeddings, presence_NM, labels_N, prefixes=[["sound"]])
    with pytest.raises(TrainingError, match=r"not bool \[50, 3\]"):
        train_head(head, embeddings, presence_NM[:, :2], labels_N)
    with pytest.raises(TrainingError, match=r"audio embeddings are \(49, 4\)"):
        train_head(head, {**embeddings, "audio": embeddings["audio"][:49]}, presence_NM, labels_N)
    with pytest.raises(TrainingError, match="too few"):
        train_head(head, embeddings, torch.zeros_like(presence_NM), labels_N)
    embeddings["text"][presence_NM[:, 1].nonzero()[0]] = torch.nan
    with pytest.raises(TrainingError, match="text embeddings hold values that are not finite"):
        train_head(head, embeddings, presence_NM, labels_N)


def thresholds(
    confidence: list[list[float]], differs: list[list[int]], budget: float, **given: Tensor
) -> list[float | None]:
    differs_EN = torch.tensor(differs, dtype=torch.bool)
    gated_EN = given.get("gated_EN", torch.ones_like(differs_EN))
    return choose_thresholds(torch.tensor(confidence), differs_EN, gated_EN, max_disagreement=budget)


def test_one_exit_takes_the_smallest_threshold_within_the_budget() -> None:
    confidence = [[0.9, 0.8, 0.7, 0.6, 0.5]]
    assert thresholds(confidence, [[0, 0, 0, 0, 0]], 0.0) == pytest.approx([0.5])
    assert thresholds(confidence, [[0, 0, 1, 0, 0]], 0.0) == pytest.approx([0.8])
    assert thresholds(confidence, [[0, 1, 0, 0, 1]], 0.2) == pytest.approx([0.6])  # one in five may differ
    assert thresholds(confidence, [[1, 0, 0, 0, 0]], 0.0) == [None]


def test_equal_confidences_leave_together_or_not_at_all() -> None:
    assert thresholds([[0.9, 0.7, 0.7, 0.6]], [[0, 0, 1, 0]], 0.0) == pytest.approx([0.9])


def test_what_has_left_is_not_seen_again_and_what_was_not_spent_is_handed_on() -> None:
    confidence = [[0.9, 0.8, 0.1, 0.1], [0.2, 0.2, 0.9, 0.6]]
    differs = [[0, 0, 1, 1], [1, 1, 0, 1]]  # the first two differ at exit 2, but they are gone
    assert thresholds(confidence, differs, 0.25) == pytest.approx([0.8, 0.6])
    assert thresholds(confidence, differs, 0.0) == pytest.approx([0.8, 0.9])


def test_only_gated_and_finite_rows_count() -> None:
    gated_EN = torch.tensor([[True, False, True]])
    assert thresholds([[0.9, 0.99, 0.5]], [[0, 1, 0]], 0.0, gated_EN=gated_EN) == pytest.approx([0.5])
    assert thresholds([[0.9, float("nan"), 0.5]], [[0, 1, 0]], 0.0) == pytest.approx([0.5])


def test_the_realised_disagreement_stays_within_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence_EN = torch.rand(3, 2000, generator=generator)
    differs_EN = torch.rand(3, 2000, generator=generator) > confidence_EN.sqrt()
    gated_EN = torch.rand(3, 2000, generator=generator) > 0.1
    chosen = choose_thresholds(confidence_EN, differs_EN, gated_EN, max_disagreement=0.02)
    waiting_N, spent = torch.ones(2000, dtype=torch.bool), 0
    for e, threshold in enumerate(chosen):
        assert threshold is not None
        going_N = waiting_N & gated_EN[e] & (confidence_EN[e] >= threshold)
        spent += int((going_N & differs_EN[e]).sum())
        waiting_N &= ~going_N
        assert spent <= 0.02 * 2000 * (e + 1) / 3
    assert spent > 30  # and is used
