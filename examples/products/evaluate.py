"""Figures of the trained models on held-out items, without a pipeline around them.

Shapes: N sample, M modality, L label, D embedding, E exit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from data import Inputs
from torch import Tensor, nn

from mmpipe.encoders.base import BuiltEncoder
from mmpipe.encoders.tiny import NoteNet
from mmpipe.fusion.gate import confidence, leaves, probabilities

MODALITIES = ("image", "text", "audio")
EXITS = (("image",), ("image", "text"))  # the last stage, all, always answers


@dataclass(frozen=True)
class Embedded:
    """Items after their encoders."""

    embeddings: dict[str, Tensor]  # modality -> float32 [N, D]; rows of absent media mean nothing
    presence_NM: Tensor
    labels_N: Tensor

    def rows(self, start: int, stop: int) -> Embedded:
        parts = {name: value[start:stop] for name, value in self.embeddings.items()}
        return Embedded(parts, self.presence_NM[start:stop], self.labels_N[start:stop])


@torch.no_grad()
def embed(encoders: Mapping[str, BuiltEncoder], inputs: Inputs) -> Embedded:
    note = cast(NoteNet, encoders["audio"].module)
    work: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "image": (encoders["image"].module, (inputs.photo,)),
        "text": (encoders["text"].module, (inputs.pieces, inputs.mask)),
        "audio": (lambda log_mel: note.from_log_mel(log_mel.float()), (inputs.log_mel,)),
    }
    embeddings = {
        name: torch.cat([module(*part) for part in zip(*(torch.split(t, 256) for t in given), strict=True)])
        for name, (module, given) in work.items()
    }
    return Embedded(embeddings, inputs.presence_NM, inputs.labels_N)


def recombined(items: Embedded, copies: int, seed: int) -> Embedded:
    """The items, and `copies` more of each label's with photos, titles and notes drawn from among that label's.

    What goes wrong with one medium is independent of the others, given the label, so these are as good as new items.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [items]
    for _ in range(copies):
        embeddings, presence = {}, []
        for column, name in enumerate(MODALITIES):
            order_N = torch.arange(len(items.labels_N))
            for label in items.labels_N.unique():
                rows = torch.nonzero(items.labels_N == label).squeeze(1)
                order_N[rows] = rows[torch.randperm(len(rows), generator=generator)]
            embeddings[name] = items.embeddings[name][order_N]
            presence.append(items.presence_NM[order_N, column])
        parts.append(Embedded(embeddings, torch.stack(presence, 1), items.labels_N))
    return Embedded(
        {name: torch.cat([part.embeddings[name] for part in parts]) for name in MODALITIES},
        torch.cat([part.presence_NM for part in parts]),
        torch.cat([part.labels_N for part in parts]),
    )


@torch.no_grad()
def head_probabilities(head: nn.Module, items: Embedded, seen: Sequence[str]) -> Tensor:
    """[N, L] from the modalities in `seen` alone."""
    seen_M = torch.tensor([name in seen for name in MODALITIES])
    logits_NL: Tensor = head(items.embeddings, items.presence_NM & seen_M)
    return probabilities(logits_NL)


def exit_table(head: nn.Module, items: Embedded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ confidence [E, N], labels [E, N], gated [E, N] of the early exits; labels [N] of the full pipeline."""
    tables = [head_probabilities(head, items, seen) for seen in EXITS]
    full_N = head_probabilities(head, items, MODALITIES).argmax(1)
    news = [MODALITIES.index(seen[-1]) for seen in EXITS]  # an exit that brought a sample nothing new does not gate it
    gated_EN = torch.stack([items.presence_NM[:, m] for m in news])
    return torch.stack([confidence(p) for p in tables]), torch.stack([p.argmax(1) for p in tables]), gated_EN, full_N


def logistic_regression(features_ND: Tensor, labels_N: Tensor, classes: int, penalty: float = 1e-4) -> nn.Module:
    """Standardised features, L-BFGS to convergence."""
    mean_D, deviation_D = features_ND.mean(0), features_ND.std(0).clamp_min(1e-6)
    linear = nn.Linear(features_ND.shape[1], classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    scaled_ND = (features_ND - mean_D) / deviation_D
    optimiser = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(linear(scaled_ND), labels_N) + penalty * linear.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():  # fold the standardisation in
        linear.weight.div_(deviation_D)
        linear.bias.sub_(linear.weight @ mean_D)
    return linear


def side_by_side(items: Embedded) -> Tensor:
    """[N, 3 D + 3]: zeros where absent, then presence."""
    parts = [items.embeddings[m] * items.presence_NM[:, i : i + 1] for i, m in enumerate(MODALITIES)]
    return torch.cat([*parts, items.presence_NM.float()], dim=1)


def figures(head: nn.Module, thresholds: Sequence[float | None], tune: Embedded, test: Embedded) -> dict[str, Any]:
    """Shares in [0, 1] over all test items. What is fitted here (the comparisons) is fitted on `tune`."""
    labels_N, classes = test.labels_N, int(tune.labels_N.max()) + 1
    commonest = tune.labels_N.mode().values

    def accuracy(answer_N: Tensor) -> float:
        return round(float((answer_N == labels_N).float().mean()), 4)

    confidence_EN, label_EN, gated_EN, full_N = exit_table(head, test)
    answer_N, waiting_N, left_by = full_N.clone(), torch.ones_like(full_N, dtype=torch.bool), {}
    for e, (seen, threshold) in enumerate(zip(EXITS, thresholds, strict=True)):
        going_N = waiting_N & gated_EN[e] & leaves(confidence_EN[e], 2.0 if threshold is None else threshold)
        answer_N = torch.where(going_N, label_EN[e], answer_N)
        waiting_N &= ~going_N
        left_by["+".join(seen)] = round(float(going_N.float().mean()), 4)
    left_by["all"] = round(float(waiting_N.float().mean()), 4)

    alone, summed_NL = {}, torch.zeros(len(labels_N), classes)
    for m, name in enumerate(MODALITIES):
        has_N, train_N = test.presence_NM[:, m], tune.presence_NM[:, m]
        classifier = logistic_regression(tune.embeddings[name][train_N], tune.labels_N[train_N], classes)
        with torch.no_grad():
            p_NL = probabilities(classifier(test.embeddings[name])) * has_N[:, None]
        summed_NL += p_NL
        by_head_N = head_probabilities(head, test, (name,)).argmax(1)
        alone[name] = {
            "logistic_regression": accuracy(torch.where(has_N, p_NL.argmax(1), commonest)),
            "head": accuracy(torch.where(has_N, by_head_N, commonest)),
        }
    concatenated = logistic_regression(side_by_side(tune), tune.labels_N, classes)
    best_alone = max(max(value.values()) for value in alone.values())
    return {
        "full_accuracy": accuracy(full_N),
        "accuracy_with_exits": accuracy(answer_N),
        "disagreement_with_full": round(float((answer_N != full_N).float().mean()), 4),
        "answered_by": left_by,
        "one_modality_missing_counts_as_commonest_label": alone,
        "best_one_modality": best_alone,
        "image_and_text_accuracy": accuracy(label_EN[1]),
        "averaged_probabilities": accuracy(summed_NL.argmax(1)),
        "logistic_regression_on_all": accuracy(cast(Tensor, concatenated(side_by_side(test))).argmax(1)),
    }
