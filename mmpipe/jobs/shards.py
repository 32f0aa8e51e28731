"""Predictions → Parquet shards, each of which appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmpipe.errors import InputError
from mmpipe.types import Prediction

SCHEMA_VERSION = "1"
FOLDER = "predictions"

_NAMES = pa.list_(pa.string())
_COLUMNS = [
    pa.field("id", pa.string()),
    pa.field("status", pa.string()),
    pa.field("error", pa.string()),
    pa.field("label", pa.string()),
    pa.field("confidence", pa.float32()),
    pa.field("top_k", pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float32())]))),
    pa.field("answered_by", pa.string()),
    pa.field("deliberated", pa.bool_()),
    pa.field("present", _NAMES),
    pa.field("used", _NAMES),
    pa.field("skipped", _NAMES),
    pa.field("failed", _NAMES),
]


def schema(dims: Mapping[str, int], labels: int, keep_types: Mapping[str, Any]) -> pa.Schema:
    """The table's columns. `dims`: modality → embedding size; `keep_types`: manifest column → Arrow type.

    Raises InputError for a kept column with the name of one of ours.
    """
    ours = [
        pa.field("probabilities", pa.list_(pa.float32(), labels) if labels else pa.list_(pa.float32())),
        pa.field("embedding", pa.list_(pa.float32(), sum(dims.values()))),
        *(pa.field(f"embedding_{name}", pa.list_(pa.float32(), dim)) for name, dim in dims.items()),
    ]
    taken = {field.name for field in (*_COLUMNS, *ours)} & set(keep_types)
    if taken:
        raise InputError(
            f"input.keep: {', '.join(sorted(taken))} is a column that the output has already; rename it in the manifest"
        )
    kept = [pa.field(name, kind) for name, kind in keep_types.items()]
    return pa.schema([*_COLUMNS, *kept, *ours], metadata={"mmpipe.schema": SCHEMA_VERSION})


def table(predictions: Sequence[Prediction], columns: pa.Schema) -> pa.Table:
    """One row per prediction, in order."""
    last = columns.get_field_index(_COLUMNS[-1].name), columns.get_field_index("probabilities")
    kept = set(columns.names[last[0] + 1 : last[1]])  # a manifest's column may be called as anything else is
    return pa.Table.from_arrays([_column(predictions, field, kept) for field in columns], schema=columns)


def _column(predictions: Sequence[Prediction], field: pa.Field, kept: Set[str]) -> pa.Array:
    name = field.name
    if name == "top_k":
        values: list[Any] = [
            [{"label": label, "probability": p} for label, p in row.top_k] if row.label is not None else None
            for row in predictions
        ]
    elif name in kept:
        values = [row.keep.get(name) for row in predictions]
    elif name.startswith("embedding_"):
        found = [(row.embeddings or {}).get(name.removeprefix("embedding_")) for row in predictions]
        return _vectors(found, field.type)
    elif name == "embedding":
        return _vectors([row.embedding for row in predictions], field.type)
    elif name == "error":  # may quote what a user's own code raised: half characters can't be written
        values = [row.error and row.error.encode("utf-8", "backslashreplace").decode() for row in predictions]
    else:
        values = [getattr(row, name) for row in predictions]
    return pa.array(values, type=field.type)


def _vectors(rows: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Vectors without a Python object per number."""
    zero = np.zeros(kind.list_size, dtype=np.float32)
    flat = np.concatenate([zero if row is None else row for row in rows]) if rows else zero[:0]
    missing = pa.array([row is None for row in rows], type=pa.bool_())
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, type=pa.float32()), type=kind, mask=missing)


def write_shard(folder: Path, number: int, rows: pa.Table) -> Path:
    """Write part-NNNNN.parquet: under another name first, then renamed, so that a reader never sees half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"part-{number:05d}.parquet"
    with replacing(path) as temporary:
        pq.write_table(rows, temporary)
    return path


def is_shard(path: Path) -> bool:
    """Whether mmpipe wrote this file: its metadata says so."""
    try:
        return b"mmpipe.schema" in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return False


class replacing:
    """`with replacing(path) as temporary:` write the temporary; it becomes `path` on success, is removed on failure."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> Path:
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                with open(self._temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(self._temporary, self._path)
        finally:
            self._temporary.unlink(missing_ok=True)
        if kind is not None:
            return
        if hasattr(os, "O_DIRECTORY"):  # the rename itself must survive a power cut
            folder = os.open(self._path.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
