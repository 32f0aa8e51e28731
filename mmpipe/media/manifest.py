"""A manifest (.csv, .jsonl, .parquet) → rows, in its own order. Nothing that a row names is opened here."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mmpipe.errors import InputError
from mmpipe.media.rows import Row, Rows

MANIFEST_SUFFIXES = (".csv", ".jsonl", ".parquet")

_FIELD_LIMIT_BYTES = 1 << 28  # the csv module's own limit, 128 KiB, is less than a long text


@dataclass(frozen=True)
class Manifest:
    """`rows` in the file's order; `keep_types`: the Arrow type of each kept column, in `keep`'s order; `places`: id →
    its line in the file (Parquet: its row), from 1."""

    rows: Rows
    keep_types: Mapping[str, Any]
    places: Mapping[str, int]


def read_manifest(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    modalities: Sequence[str] = ("image", "text", "audio"),
) -> Manifest:
    """The manifest's rows, the columns of `modalities` only.

    columns: `id` or a modality → the name of its column. What it doesn't name is read from the column called `id`,
    `image`, `text` or `audio`, if there is one. Without an id column the id is the row's number, from "000001".
    A blank cell is an absent modality; a blank id is an error. Kept columns are strings from CSV, else what the file
    has. Raises InputError with file:line (row, for Parquet) and what to do.
    """
    name, suffix = path.name, path.suffix.lower()
    if suffix not in MANIFEST_SUFFIXES:
        raise InputError(f"{name}: a manifest is one of {', '.join(MANIFEST_SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{path}: {'a folder, not a manifest' if path.is_dir() else 'no such manifest'}")
    wanted = _Wanted(name, dict(columns or {}), tuple(dict.fromkeys(keep)), tuple(modalities))
    try:
        if suffix == ".csv":
            return _read_csv(path, wanted)
        return _read_jsonl(path, wanted) if suffix == ".jsonl" else _read_parquet(path, wanted)
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror or error}") from error


class _Wanted:
    """Which columns to read: resolved once against the names that the file has."""

    def __init__(self, name: str, columns: dict[str, str], keep: tuple[str, ...], modalities: tuple[str, ...]) -> None:
        self.name, self.columns, self.keep, self.modalities = name, columns, keep, modalities
        self.column_of = {what: columns.get(what, what) for what in ("id", *modalities)}

    def check(self, present: Sequence[str]) -> None:
        """Raises for a column that was asked for by name and isn't `present`, and where there is nothing to read."""
        asked = [(what, self.columns[what]) for what in self.column_of if what in self.columns]
        for what, column in [*asked, *(("keep", column) for column in self.keep)]:
            if column not in present:
                near = difflib.get_close_matches(column, present, n=1, cutoff=0.5)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise InputError(f"{self.name}: no column '{column}' (for {what}){hint} {_have(present)}")
        if not any(self.column_of[modality] in present for modality in self.modalities):
            raise InputError(
                f"{self.name}: no column named {' or '.join(self.modalities)}: say which it is under `columns`. "
                + _have(present)
            )

    def row(self, number: int, where: str, cells: Mapping[str, Any], has_id: bool) -> Row:
        values = tuple(self._cell(where, self.column_of[modality], cells) for modality in self.modalities)
        kept = tuple(cells.get(column) for column in self.keep)
        return (self._id(where, cells) if has_id else f"{number:06d}"), values, kept

    def _cell(self, where: str, column: str, cells: Mapping[str, Any]) -> str | None:
        value = cells.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if not isinstance(value, str):
            raise InputError(f"{where}: column '{column}' holds {_kind(value)}, not text")
        return _encodable(where, column, value)

    def _id(self, where: str, cells: Mapping[str, Any]) -> str:
        column = self.column_of["id"]
        value = cells.get(column)
        if value is None or value == "" or (isinstance(value, str) and not value.strip()):
            raise InputError(f"{where}: column '{column}' is blank: every row needs an id")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InputError(f"{where}: column '{column}' holds {_kind(value)}: an id is text or a number")
        return _encodable(where, column, str(value))


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _have(present: Sequence[str]) -> str:
    """The columns there are; a single one that holds a separator says what went wrong."""
    if len(present) == 1 and any(mark in present[0] for mark in ";\t"):
        return "(the first line has no comma: save the file with commas between the columns)"
    return f"(columns: {', '.join(present) or 'none'})"


def _encodable(where: str, column: str, value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: column '{column}' holds half a character (a lone surrogate)") from error
    return value


def _distinct(places: dict[str, int], row_id: str, place: int, where: str, unit: str) -> None:
    """Remembers where an id was first seen."""
    first = places.setdefault(row_id, place)
    if first != place:
        raise InputError(f"{where}: id '{row_id}' is already used in {unit} {first}: ids are unique")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line; the first without its byte order mark."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path.name}:{number}: byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8"
                ) from error


def _read_csv(path: Path, wanted: _Wanted) -> Manifest:
    number = 0

    def texts() -> Iterator[str]:
        nonlocal number
        for number, line in _lines(path):  # noqa: B007 - read below, where the csv module reports a bad line
            yield line

    old_limit = csv.field_size_limit(_FIELD_LIMIT_BYTES)
    try:
        reader = csv.reader(texts(), strict=True)
        header = next(reader, None)
        if header is None:
            raise InputError(f"{path.name}: the file is empty: its first line names the columns")
        wanted.check(header)
        for column in (*wanted.column_of.values(), *wanted.keep):
            if header.count(column) > 1:
                raise InputError(f"{path.name}:1: column '{column}' is there {header.count(column)} times")
        return _csv_rows(path.name, reader, header, wanted)
    except csv.Error as error:
        raise InputError(f"{path.name}:{number}: {error}") from error
    finally:
        csv.field_size_limit(old_limit)


def _csv_rows(name: str, reader: Any, header: list[str], wanted: _Wanted) -> Manifest:
    rows = Rows()
    places: dict[str, int] = {}
    has_id, line = wanted.column_of["id"] in header, reader.line_num + 1
    for cells in reader:
        # A quoted cell may span lines: the row is known by its first.
        where, line, first_line = f"{name}:{line}", reader.line_num + 1, line
        if not cells:
            continue  # a blank line
        if len(cells) != len(header):
            raise InputError(
                f"{where}: {len(cells)} cells under {len(header)} columns: a cell with a comma in it needs quotes"
            )
        row = wanted.row(len(rows) + 1, where, dict(zip(header, cells, strict=True)), has_id)
        _distinct(places, row[0], first_line, where, "line")
        rows.append(row)
    return Manifest(rows, _keep_types(name, rows, wanted.keep, all_text=True), places)


def _read_jsonl(path: Path, wanted: _Wanted) -> Manifest:
    """Twice: which columns there are is known at the end, and all lines as objects would take many times the file."""
    seen: dict[str, None] = {}
    empty = True
    for _, cells in _objects(path):
        seen.update(dict.fromkeys(cells))
        empty = False
    if empty:
        raise InputError(f"{path.name}: the file is empty: each line is one JSON object")
    wanted.check(tuple(seen))
    has_id = wanted.column_of["id"] in seen
    rows = Rows()
    places: dict[str, int] = {}
    for number, cells in _objects(path):
        where = f"{path.name}:{number}"
        row = wanted.row(len(rows) + 1, where, cells, has_id)
        _distinct(places, row[0], number, where, "line")
        try:
            rows.append(row)
        except RecursionError as error:
            raise InputError(f"{where}: a column that is kept holds lists in lists beyond all measure") from error
    return Manifest(rows, _keep_types(path.name, rows, wanted.keep), places)


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, content) of each line that is not blank."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise InputError(f"{path.name}:{number}: not JSON: {reason}") from error
        if not isinstance(value, dict):
            raise InputError(f"{path.name}:{number}: {_kind(value)}, where each line is one JSON object")
        yield number, value


def _keep_types(name: str, rows: Rows, keep: Sequence[str], *, all_text: bool = False) -> dict[str, Any]:
    """One Arrow type for each kept column, so that every shard of the output has the same."""
    if not keep:
        return {}
    import pyarrow as pa

    if all_text:
        return dict.fromkeys(keep, pa.string())
    types: dict[str, Any] = {}
    columns = zip(*(kept for _, _, kept in rows), strict=True)  # all at once: to unpack a row takes a while
    for column, values in zip(keep, columns, strict=True):
        try:
            types[column] = pa.array(values).type
        except (pa.ArrowException, OverflowError, UnicodeError, RecursionError) as error:
            raise InputError(
                f"{name}: column '{column}' can't be kept, its values have no common type: {error}"
            ) from error
        if _is_void(types[column]):
            raise InputError(f"{name}: column '{column}' can't be kept: an object without a key is no Parquet value")
    return types


def _is_void(kind: Any) -> bool:
    """Whether an Arrow type is, or holds, an object without keys."""
    if str(kind).startswith("struct") and not kind.num_fields:
        return True
    return any(_is_void(kind.field(number).type) for number in range(kind.num_fields))


def _cells(name: str, batch: Any, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A batch's rows. Raises InputError for a column with values that Python has none for: nanoseconds, time zones."""
    found = []
    for column in columns:
        try:
            found.append(batch.column(column).to_pylist())
        except Exception as error:
            raise InputError(f"{name}: column '{column}' can't be kept, of type {batch.column(column).type}") from error
    for values in zip(*found, strict=True):
        yield dict(zip(columns, values, strict=True))


def _read_parquet(path: Path, wanted: _Wanted) -> Manifest:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def refuse(error: Exception) -> NoReturn:
        raise InputError(f"{path.name}: not a Parquet file that can be read: {error}") from error

    rows = Rows()
    places: dict[str, int] = {}
    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            if twice := sorted({name for name in present if present.count(name) > 1}):
                raise InputError(f"{path.name}: column '{twice[0]}' is there {present.count(twice[0])} times")
            wanted.check(present)
            needed = [
                column for column in dict.fromkeys((*wanted.column_of.values(), *wanted.keep)) if column in present
            ]
            has_id = wanted.column_of["id"] in present
            for batch in file.iter_batches(batch_size=8192, columns=needed):
                for cells in _cells(path.name, batch, needed):
                    where = f"{path.name}: row {len(rows) + 1}"
                    row = wanted.row(len(rows) + 1, where, cells, has_id)
                    _distinct(places, row[0], len(rows) + 1, where, "row")
                    rows.append(row)
            types = {column: file.schema_arrow.field(column).type for column in wanted.keep}
    except (pa.ArrowException, ValueError) as error:
        refuse(error)
    return Manifest(rows, types, places)
