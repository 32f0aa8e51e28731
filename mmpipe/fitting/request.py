"""What a fit was asked for, checked before any model is loaded. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mmpipe.config import Config, load
from mmpipe.errors import InputError
from mmpipe.jobs.output import EMPTY, refuse
from mmpipe.listing import input_root
from mmpipe.media.manifest import read_manifest
from mmpipe.starter import BLANK_LABELS
from mmpipe.truth import read_truth

LEAST = 3  # labelled samples of each label: one each to train on, to choose by, to measure with
DEFAULT_HEAD = "transformer"  # where the configuration names none


@dataclass(frozen=True)
class Request:
    """The options of `mmpipe fit`."""

    config: Config
    labels: tuple[str, ...]
    truth: dict[str, str]  # id → label
    output: Path
    seed: int
    epochs: int
    limit: int | None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        source: str | Path,
        truth: Path,
        output: Path,
        *,
        overrides: Sequence[str] = (),
        input: Path | None = None,
        seed: int = 0,
        epochs: int = 60,
        limit: int | None = None,
    ) -> Self:
        """Raises ConfigError, InputError (the truth), OutputError."""
        overrides = [*overrides, "fusion.calibration=null"]
        config, notes = load(source, overrides=overrides, training=True), []
        if config.task == "embed":
            raise config.error("task", "embed has no labels: there is nothing to fit", "task: classify")
        if "head" not in config.fusion.model_fields_set:
            config = load(source, overrides=[*overrides, f"fusion.head={DEFAULT_HEAD}"], training=True)
            notes.append(f"the configuration names no head: fitting a {DEFAULT_HEAD}")
        if config.fusion.head == "zero_shot":
            hint = "head: transformer or linear, or --set fusion.head=transformer"
            raise config.error("fusion.head", "zero_shot has no weights to fit", hint)
        if config.fusion.checkpoint is not None:
            notes.append("fusion.checkpoint is not read: fit makes a new one")
        refuse(output, EMPTY, inside=input_root(config, input))
        labels = config.all_labels
        if not labels or labels == BLANK_LABELS:
            labels = truth_labels(truth)
            notes.append(f"the configuration has no labels: taking the {len(labels)} of {truth.name}")
        return cls(config, labels, read_truth(truth, labels), output, seed, epochs, limit, tuple(notes))


def truth_labels(path: Path) -> tuple[str, ...]:
    """The labels of a truth file, sorted. Blank ones are left to `read_truth`, which says where they stand."""
    rows = read_manifest(Path(path), columns={"id": "id", "label": "label"}, modalities=("label",)).rows
    return tuple(sorted({label for _, (label,), _ in rows if label is not None}))


def check_counts(labels: Sequence[str], found: Sequence[str]) -> None:
    """InputError where a label has too few samples, or there is one label alone."""
    counts = Counter(found)
    if len(counts) < 2:
        only = f"all {len(found):,} labelled samples are {next(iter(counts))!r}" if counts else "no sample has a label"
        raise InputError(f"{only}: a head tells at least two labels apart")
    few = [label for label in labels if counts[label] < LEAST]
    if few:
        told = ", ".join(f"{label!r} has {counts[label]}" for label in few[:5]) + (", …" if len(few) > 5 else "")
        raise InputError(
            f"{told}: each label needs at least {LEAST} samples, to train on, to choose by and to measure with. "
            "Label more, or take these labels out of the configuration and the truth file"
        )
