"""A table of true labels: what accuracy is measured against, and heads are trained on. Loads no model."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from mmpipe.errors import InputError
from mmpipe.media.manifest import MANIFEST_SUFFIXES, read_manifest


def read_truth(path: str | Path, labels: Sequence[str]) -> dict[str, str]:
    """The columns `id` and `label` of a .csv, .jsonl or .parquet file → id → label, in the file's order.

    Ids are those of the predictions, each at most once; every label is one of `labels`. Other columns are not read.
    Raises InputError with file:line (Parquet: row) and what to do.
    """
    path = Path(path)
    if path.suffix.lower() not in MANIFEST_SUFFIXES:
        raise InputError(f"{path.name}: true labels stand in one of {', '.join(MANIFEST_SUFFIXES)}")
    manifest = read_manifest(path, columns={"id": "id", "label": "label"}, modalities=("label",))
    known, found = set(labels), {}
    for id_, (label,), _ in manifest.rows:
        if label is None or label not in known:
            place = manifest.places[id_]
            where = f"{path.name}: row {place}" if path.suffix.lower() == ".parquet" else f"{path.name}:{place}"
            raise InputError(f"{where}: {_problem(label, labels)}")
        found[id_] = label
    if not found:
        raise InputError(f"{path.name}: no rows: each is an id and its label")
    return found


def _problem(label: str | None, labels: Sequence[str]) -> str:
    if label is None:
        return "column 'label' is blank: leave out the rows whose label is not known"
    near = difflib.get_close_matches(label, labels, n=1, cutoff=0.6)
    if near:
        return f"unknown label '{label}'; did you mean '{near[0]}'?"
    return f"unknown label '{label}': the configuration has {', '.join(labels[:12])}{', …' if len(labels) > 12 else ''}"


__all__ = ["read_truth"]
