"""What every exit of every order would say of each sample, and what it costs: all that calibration needs.

Shapes: N sample, L label, M modality, E exit.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmpipe.errors import InputError
from mmpipe.fusion import gate
from mmpipe.fusion.thresholds import Bools, Exits, Floats

HEAD = "head"


@dataclass(frozen=True)
class Scores:
    """One pass over samples with all exits held shut.

    `logits[what]` float32 [N, L]: `what` is a set of modalities in encoder order ("image+text": the head on these of
    them that the sample has), or a depth exit ("image.layer2", "head.layer1"); not a number where it wasn't looked at.
    `seconds[what]`: of one sample: all of a modality ("image", decoding included), what a depth exit needs of its
    encoder ("image.layer2"), and one look of the head ("head").
    """

    modalities: tuple[str, ...]  # M, in encoder order
    labels: tuple[str, ...]  # L
    logits: Mapping[str, Tensor]
    present_NM: Tensor  # bool: what could be used
    full_N: Tensor  # int64: the full pipeline's label
    truth_N: Tensor  # int64: the true label; -1: not known
    seconds: Mapping[str, float]
    model: str  # the fingerprint that the scores are of
    dtype: str
    backends: tuple[str, ...]
    dtypes: Mapping[str, str] = field(default_factory=dict)  # of each encoder
    dropped: int = 0  # samples that the full pipeline could not answer: they are no part of any share

    @property
    def count(self) -> int:
        return len(self.full_N)

    def sequences(self) -> Iterator[tuple[tuple[str, ...], ...]]:
        """The sequences of exits to choose from: for each order of the modalities, `after` of each exit.

        With all that an order has, and with only some: an exit that few leave at costs everyone a look of the head.
        Depth exits of the encoder that comes first come before it, those of the head after all.
        """
        depths = [name for name in self.logits if ".layer" in name]
        of_head = tuple((name,) for name in sorted((d for d in depths if d.startswith("head.")), key=_layer))
        seen: set[tuple[tuple[str, ...], ...]] = set()
        for order in itertools.permutations(self.modalities):
            first = tuple((name,) for name in sorted((d for d in depths if d.startswith(f"{order[0]}.")), key=_layer))
            prefixes = [order[:length] for length in range(1, len(order))]
            for count in range(len(prefixes), -1, -1):
                for kept in itertools.combinations(prefixes, count):
                    sequence = (*first, *kept, *of_head)
                    same = tuple(tuple(sorted(after)) for after in sequence)
                    if same not in seen:
                        seen.add(same)
                        yield sequence

    def subset(self, after: Sequence[str]) -> str:
        """The name under which an exit's logits stand."""
        return after[0] if ".layer" in after[0] else "+".join(name for name in self.modalities if name in after)

    def sees(self, after: Sequence[str]) -> tuple[str, ...]:
        if after[0].startswith("head."):
            return self.modalities
        return tuple(name for name in self.modalities if name in {part.partition(".")[0] for part in after})

    def exits(self, sequence: Sequence[Sequence[str]], temperatures: Mapping[str, float], confidence: str) -> Exits:
        """One sequence of exits as the gate would see it."""
        confidence_EN, differs_EN, gated_EN, cost_FN = [], [], [], []
        seen_before: tuple[str, ...] = ()
        whole_before = True
        looks_N = np.zeros(self.count)
        for after in sequence:
            name = self.subset(after)
            probabilities_NL = gate.probabilities(self.logits[name], temperatures.get(name, 1.0))
            confidence_N = gate.confidence(probabilities_NL, confidence).numpy().astype(np.float64)
            sees = self.sees(after)
            new = tuple(m for m in sees if m not in seen_before) if whole_before else sees
            seen_before, whole_before = sees, ".layer" not in after[0]
            gated_N = self.has(new or sees) & np.isfinite(confidence_N)
            looks_N = looks_N + gated_N
            confidence_EN.append(np.where(gated_N, confidence_N, -np.inf))
            differs_EN.append((probabilities_NL.argmax(dim=1) != self.full_N).numpy())
            gated_EN.append(gated_N)
            cost_FN.append(self._cost(after, looks_N))
        cost_FN.append(self._cost(self.modalities, looks_N + 1))
        whole_N = self._cost(self.modalities, np.ones(self.count))
        names = tuple("+".join(after) for after in sequence)
        if not names:
            nothing = np.empty((0, self.count))
            return Exits((), nothing, nothing.astype(bool), nothing.astype(bool), np.stack(cost_FN), whole_N)
        confidences, differ, gated, costs = map(np.stack, (confidence_EN, differs_EN, gated_EN, cost_FN))
        return Exits(names, confidences, differ, gated, costs, whole_N)

    def has(self, modalities: Sequence[str]) -> Bools:
        """[N]: whether a sample has any of these."""
        columns = [self.modalities.index(name) for name in modalities]
        found: Bools = self.present_NM[:, columns].any(dim=1).numpy()
        return found

    def _cost(self, after: Sequence[str], looks_N: Floats) -> Floats:
        cost_N: Floats = looks_N * self.seconds[HEAD]
        for name in self.sees(after):
            part = self.seconds[after[0] if after[0].startswith(f"{name}.") else name]
            cost_N = cost_N + part * self.has([name])
        return cost_N


def _layer(name: str) -> int:
    return int(name.rpartition(".layer")[2])


def subsets(modalities: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every set of modalities but none, in encoder order."""
    for length in range(1, len(modalities) + 1):
        yield from itertools.combinations(modalities, length)


_META = ("modalities", "labels", "seconds", "model", "dtype", "backends", "dtypes", "dropped")


def write_scores(path: Path, scores: Scores) -> None:
    """Write what `read_scores` reads: safetensors."""
    from safetensors.torch import save_file

    meta = json.dumps({name: getattr(scores, name) for name in _META})
    tensors = {f"logits.{name}": logits_NL.float().contiguous() for name, logits_NL in scores.logits.items()}
    tensors |= {"present": scores.present_NM, "full": scores.full_N.short(), "truth": scores.truth_N.short()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path), {"mmpipe.scores": meta})


def read_scores(path: Path) -> Scores:
    """Scores from a file. InputError where it isn't one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {})["mmpipe.scores"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return Scores(
            modalities=tuple(meta["modalities"]),
            labels=tuple(meta["labels"]),
            logits={n.removeprefix("logits."): t for n, t in tensors.items() if n.startswith("logits.")},
            present_NM=tensors["present"],
            full_N=tensors["full"].long(),
            truth_N=tensors["truth"].long(),
            seconds=dict(meta["seconds"]),
            model=meta["model"],
            dtype=meta["dtype"],
            backends=tuple(meta["backends"]),
            dtypes=dict(meta.get("dtypes", {})),  # files of before have none
            dropped=meta["dropped"],
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path.name} holds no scores: {type(error).__name__}: {error}") from error


def with_truth(scores: Scores, ids: Sequence[str], truth: Mapping[str, str]) -> Scores:
    """The same with true labels, by id. InputError where none is of these samples."""
    check_known(ids, truth)
    index = {label: number for number, label in enumerate(scores.labels)}
    numbers = [index[truth[id_]] if id_ in truth else -1 for id_ in ids]
    return replace(scores, truth_N=torch.tensor(numbers, dtype=torch.long))


def check_known(ids: Sequence[str], truth: Mapping[str, str]) -> None:
    """Raises InputError where the true labels are of none of these samples."""
    if ids and not any(id_ in truth for id_ in ids):
        known = next(iter(truth))
        raise InputError(
            f"none of the {len(truth):,} ids with a true label is among the samples: for example '{known}'; "
            f"ids are those of the predictions, such as '{ids[0]}'"
        )
