"""Embedded samples → a trained head, the probes of exits inside encoders, and thresholds.

Shapes: N sample, V validation, M modality, L label, D feature, E exit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from mmpipe.config import Config, ExitConfig
from mmpipe.errors import MmpipeError
from mmpipe.fitting.embedding import Embedded
from mmpipe.fitting.splitting import Split
from mmpipe.fusion import gate
from mmpipe.fusion.baselines import side_by_side
from mmpipe.fusion.checkpoint import load_head
from mmpipe.fusion.experts import FEATURES, Joined, again, experts, joined, start_from, take_answers
from mmpipe.fusion.heads import DepthHead, HeadError, LinearHead, TransformerHead
from mmpipe.fusion.items import Items, TrainingError, balanced_weights
from mmpipe.fusion.regression import PENALTIES, Regression, regression
from mmpipe.fusion.training import Epoch, TrainingResult, choose_thresholds, train_head

HEAD = "head"
MAX_DISAGREEMENT = 0.01  # share of the validation part on which the exits together may differ from the full pipeline

# How the transformer head is trained: chosen on products and digits of seeds that no figure is told of.
TRANSFORMER: dict[str, Any] = {
    "lr": 2e-3,
    "weight_decay": 0.05,
    "recombined": 0.5,
    "averaging": 0.98,
    "patience": 15,
}


@dataclass(frozen=True)
class Fitted:
    """What was trained. `thresholds`: one per exit of the configuration; None: the exit can't keep the bound."""

    kind: str
    head: nn.Module
    options: Mapping[str, Any]
    probes: Mapping[str, Regression]  # "image.layer4"
    exits: Sequence[ExitConfig]
    thresholds: Sequence[float | None]
    result: TrainingResult
    class_weights_L: Tensor = field(repr=False)


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every non-empty set of modalities, small ones first, the whole last."""
    return [chosen for size in range(1, len(names) + 1) for chosen in combinations(names, size)]


def fit(config: Config, labels: Sequence[str], embedded: Embedded, split: Split, *, seed: int, epochs: int) -> Fitted:
    """Train on the split's training part, choose by its validation part. Raises ConfigError where a head can't be made,
    MmpipeError where it can't be trained."""
    with _one_thread():
        return _fit(config, labels, embedded, split, seed, epochs)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Heads are so small that threads cost more than they bring; and the weights don't depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit(config: Config, labels: Sequence[str], embedded: Embedded, split: Split, seed: int, epochs: int) -> Fitted:
    items, classes = embedded.items, len(labels)
    weights_L = balanced_weights(items.labels_N[split.training], classes)
    kind = config.fusion.head
    try:
        torch.manual_seed(seed)
        start = _experts(items, split, weights_L, seed) if kind == "transformer" else None
        head, options = _head(config, labels, embedded.dims, start)
        if isinstance(head, LinearHead):
            result = _solve(head, items, split, classes, weights_L)
        else:
            result = _train(head, start, items, split, weights_L, seed, epochs)
        head.eval().requires_grad_(False)
        probes = {name: _probe(name, state, embedded, split, classes, weights_L) for name, state in _states(embedded)}
    except HeadError as error:
        raise config.error("fusion.head", str(error)) from error
    except TrainingError as error:
        raise MmpipeError(f"this can't be trained on: {error}") from error
    validation = items.rows(split.validation)
    states = {name: state[split.validation] for name, state in embedded.states.items()}
    tables = [exit_probabilities(exit_, head, probes, validation, states) for exit_ in config.fusion.exits]
    thresholds = _thresholds(config, tables, full_probabilities(head, validation), validation)
    if start is not None and isinstance(head, TransformerHead):
        # last, so that thresholds are of answers to samples that these had not seen
        both = items.rows(torch.cat([split.training, split.validation]))
        take_answers(head, again(start, both, classes, weights_L))
    return Fitted(kind, head, options, probes, config.fusion.exits, thresholds, result, weights_L)


def _experts(items: Items, split: Split, weights_L: Tensor, seed: int) -> Joined:
    training, validation = items.rows(split.training), items.rows(split.validation)
    return joined(experts(training, validation, len(weights_L), weights_L, seed=seed), validation, weights_L)


def _head(
    config: Config, labels: Sequence[str], dims: Mapping[str, int], start: Joined | None
) -> tuple[nn.Module, dict[str, Any]]:
    kind = config.fusion.head
    if kind == "linear":
        return LinearHead(dims, labels), {}
    if kind == "transformer":
        deepest = [int(e.name.partition(".layer")[2]) for e in config.fusion.exits if e.name.startswith(f"{HEAD}.")]
        shape: dict[str, Any] = {
            "width": 64,
            "depth": max([2, *(depth + 1 for depth in deepest)]),
            "heads": 4,
            "direct": True,
            "fourier": {
                name: FEATURES for name, one in (start.experts if start else {}).items() if one.fourier is not None
            },
            "floors": True,
        }
        return TransformerHead(dims, labels, **shape), shape
    options = dict(config.fusion.options)
    head = load_head(kind, dims, labels, checkpoint=None, options=options, base=config.source.folder)
    if not list(head.parameters()):
        raise HeadError(f"head {kind} has no parameters: there is nothing to train")
    return head.requires_grad_(True), options


def _train(
    head: nn.Module, start: Joined | None, items: Items, split: Split, weights_L: Tensor, seed: int, epochs: int
) -> TrainingResult:
    both = torch.cat([split.training, split.validation])
    here = items.rows(both)
    if isinstance(head, TransformerHead) and start is not None:
        training = items.rows(split.training)
        head.standardise(training.embeddings, training.presence_NM)
        start_from(head, start)
        # the experts have their best answers: what the layers learn is added to these
        for part in (head.direct, head.pool):
            assert part is not None
            part.requires_grad_(False)
    return train_head(
        head,
        here.embeddings,
        here.presence_NM,
        here.labels_N,
        prefixes=subsets(list(items.embeddings))[:-1],
        epochs=epochs,
        batch_size=min(256, max(16, len(split.training) // 8)),  # few samples need no fewer steps
        class_weights_L=weights_L,
        from_start=isinstance(head, TransformerHead),
        validation_rows=torch.arange(len(split.training), len(both)),
        seed=seed,
        **TRANSFORMER,
    )


def _solve(head: LinearHead, items: Items, split: Split, classes: int, weights_L: Tensor) -> TrainingResult:
    """The linear head has one best answer over every subset of modalities: found by regression, without epochs."""
    training, validation = (_every_view(items.rows(rows)) for rows in (split.training, split.validation))
    found = regression(*training, validation, classes, class_weights_L=weights_L)
    with torch.no_grad():
        head.linear.weight.copy_(found.weight_LF)
        head.linear.bias.copy_(found.bias_L)

    def loss(features_NF: Tensor, labels_N: Tensor) -> float:
        chosen_N = found(features_NF).gather(1, labels_N[:, None]).squeeze(1)
        return float((-chosen_N.clamp_min(1e-12).log() * weights_L[labels_N]).mean())

    whole = items.rows(split.validation)
    accuracy = float((full_probabilities(head, whole).argmax(1) == whole.labels_N).float().mean())
    return TrainingResult((Epoch(loss(*training), loss(*validation), accuracy),), 0, tuple(split.validation.tolist()))


def _every_view(items: Items) -> tuple[Tensor, Tensor]:
    """Features and labels of the items through every set of modalities that leaves them any."""
    features, labels = [], []
    for names in subsets(list(items.embeddings)):
        seen = items.seeing(names)
        some_N = seen.presence_NM.any(dim=1)
        features.append(side_by_side(seen.rows(some_N)))
        labels.append(items.labels_N[some_N])
    return torch.cat(features), torch.cat(labels)


def _states(embedded: Embedded) -> list[tuple[str, Tensor]]:
    return list(embedded.states.items())


def _probe(
    name: str, state_ND: Tensor, embedded: Embedded, split: Split, classes: int, weights_L: Tensor
) -> Regression:
    items = embedded.items
    column = list(items.embeddings).index(name.partition(".")[0])
    training, validation = (rows[items.presence_NM[rows, column]] for rows in (split.training, split.validation))
    if len(training) == 0:
        raise TrainingError(f"{name}: no labelled sample to train on has this modality")
    return regression(
        state_ND[training],
        items.labels_N[training],
        (state_ND[validation], items.labels_N[validation]),
        classes,
        class_weights_L=weights_L,
        penalties=(*PENALTIES, 1.0),
    )


@torch.no_grad()
def full_probabilities(head: nn.Module, items: Items) -> Tensor:
    """[N, L] of the full pipeline."""
    return gate.probabilities(head(items.embeddings, items.presence_NM))


@torch.no_grad()
def exit_probabilities(
    exit_: ExitConfig, head: nn.Module, probes: Mapping[str, Regression], items: Items, states: Mapping[str, Tensor]
) -> Tensor:
    """[N, L] of an exit, as the graph would answer there. `states`: of the same items."""
    place, _, layer = exit_.name.partition(".layer")
    if not layer:
        return full_probabilities(head, items.seeing(exit_.after))
    if place != HEAD:
        return probes[exit_.name](states[exit_.name])
    depths = head.all_depths(items.embeddings, items.presence_NM) if isinstance(head, DepthHead) else []
    if int(layer) > len(depths):
        raise MmpipeError(f"exit {exit_.name}: the head answers at {len(depths)} depths")
    return gate.probabilities(depths[int(layer) - 1])


def gated(exits: Sequence[ExitConfig], items: Items) -> Tensor:
    """bool [E, N]: who is looked at there, because the exit brought it something new."""
    names = list(items.embeddings)
    before: set[tuple[str, bool]] = set()  # modality, and whether all of it was seen
    rows = []
    for exit_ in exits:
        place, _, layer = exit_.name.partition(".layer")
        sees = {(place, False)} if layer and place != HEAD else {(n, True) for n in (names if layer else exit_.after)}
        new = [name for name in names if (name, True) in sees - before or (layer and name == place)]
        new = new or [name for name, _ in sees]
        rows.append(items.presence_NM[:, [names.index(name) for name in new]].any(dim=1))
        before |= sees
    return torch.stack(rows) if rows else torch.zeros(0, len(items), dtype=torch.bool)


def _thresholds(config: Config, tables: Sequence[Tensor], full_VL: Tensor, validation: Items) -> list[float | None]:
    if not tables:
        return []
    kind, full_V = config.fusion.confidence, full_VL.argmax(dim=1)
    return choose_thresholds(
        torch.stack([gate.confidence(p_VL, kind) for p_VL in tables]),
        torch.stack([p_VL.argmax(dim=1) != full_V for p_VL in tables]),
        gated(config.fusion.exits, validation),
        max_disagreement=MAX_DISAGREEMENT,
    )
