"""Manifests: rows in their order, text as it is, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmpipe.errors import InputError
from mmpipe.media import Listing, find

ROWS: list[dict[str, Any]] = [
    {"sku": "b/2", "photo": "img/2.jpg", "title": 'shoe, "trail"\nblue', "price": 12.5},
    {"sku": "a", "photo": None, "title": "0", "price": 3.0},
    {"sku": "00", "photo": "../else/é.jpg", "title": None, "price": None},
]
COLUMNS = {"id": "sku", "image": "photo", "text": "title"}


def written(folder: Path, kind: str) -> Path:
    path = folder / f"items.{kind}"
    if kind == "csv":
        import csv

        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def manifest(folder: Path, text: str | bytes, name: str = "items.csv", **options: Any) -> Listing:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return find(None, manifest=path, **options)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_three_kinds_say_the_same(tmp_path: Path, kind: str) -> None:
    listing = find(None, manifest=written(tmp_path, kind), columns=COLUMNS, keep=["price"])
    first, second, third = listing.samples
    assert (first.id, second.id, third.id) == ("b/2", "a", "00")
    assert first.media == {"image": tmp_path / "img/2.jpg", "text": 'shoe, "trail"\nblue'}
    assert second.media == {"text": "0"}
    assert third.media == {"image": tmp_path / "../else/é.jpg"}
    assert listing.counts == {"image": 2, "text": 2, "audio": 0}
    if kind == "csv":
        assert [s.keep["price"] for s in listing.samples] == ["12.5", "3.0", ""]
        assert listing.keep_types == {"price": pa.string()}
    else:
        assert [s.keep["price"] for s in listing.samples] == [12.5, 3.0, None]
        assert listing.keep_types == {"price": pa.float64()}


def test_without_an_id_column_the_row_number_is_the_id(tmp_path: Path) -> None:
    listing = manifest(tmp_path, "text\nred\nblue\n")
    assert [(s.id, s.media) for s in listing.samples] == [("000001", {"text": "red"}), ("000002", {"text": "blue"})]


def test_numbers_are_ids_too(tmp_path: Path) -> None:
    listing = manifest(tmp_path, '{"id": 7, "text": "x"}\n{"id": "8", "text": "y"}', "items.jsonl")
    assert [s.id for s in listing.samples] == ["7", "8"]


def test_a_row_without_media_stays_a_row(tmp_path: Path) -> None:
    listing = manifest(tmp_path, "id,text,extra\n1,,\n2,x,\n", modalities=("text",))
    assert [s.media for s in listing.samples] == [{}, {"text": "x"}]
    assert listing.combinations == {"": 1, "text": 1}


def test_long_cells_and_unused_columns(tmp_path: Path) -> None:
    listing = manifest(tmp_path, "id,text,audio\n1,{},gone.wav\n".format("word " * 60_000), modalities=("text",))
    assert len(listing.samples[0].media["text"]) == 300_000
    assert "audio" not in listing.samples[0].media


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("items.csv", "", "empty"),
        ("items.csv", "id,text\n", "no rows"),
        ("items.csv", "id,text\n1,a\n1,b\n", r"items\.csv:3: id '1' is already used in line 2"),
        ("items.csv", 'id,text\n1,"two\nlines"\n1,b\n', r"items\.csv:4: id '1' is already used in line 2"),
        ("items.csv", "id,text\n1,a\n ,b\n", r"items\.csv:3: column 'id' is blank"),
        ("items.csv", "id,text\n1,a\n2,b,c\n", r"items\.csv:3: 3 cells under 2 columns"),
        ("items.csv", "id,text\n1,a\n2\n", r"items\.csv:3: 1 cells under 2 columns"),
        ("items.csv", 'id,text\n1,a\n2,"b\n', r"items\.csv:3: "),
        ("items.csv", b"id,text\n1,a\n2,caf\xe9\n", r"items\.csv:3: byte 0xe9 is not UTF-8"),
        ("items.csv", "id,text\n1,a\n".encode("utf-16"), "not UTF-8"),
        ("items.csv", "id;text\n1;a\n", "save the file with commas"),
        ("items.csv", "id,name\n1,a\n", r"no column named image or text or audio.*columns: id, name"),
        ("items.csv", "id,text,text\n1,a,b\n", "'text' is there 2 times"),
        ("items.jsonl", "", "empty"),
        ("items.jsonl", '{"text": "a"}\n{"text": \n', r"items\.jsonl:2: not JSON"),
        ("items.jsonl", '{"text": "a"}\n[1]\n', r"items\.jsonl:2: a list"),
        ("items.jsonl", '{"text": 5}', r"items\.jsonl:1: column 'text' holds a int"),
        ("items.jsonl", '{"text": "\\ud800"}', r"items\.jsonl:1: column 'text' holds half a character"),
        ("items.jsonl", '{"id": [1], "text": "a"}', r"items\.jsonl:1: column 'id' holds a list"),
        ("items.jsonl", "[" * 100_000, r"items\.jsonl:1: not JSON"),
        ("items.parquet", "PAR1 no", "not a Parquet file"),
        ("items.xlsx", "x", r"\.csv, \.jsonl, \.parquet"),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path: Path, name: str, text: str | bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        manifest(tmp_path, text, name)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_column_that_is_not_there(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind)
    with pytest.raises(InputError, match=r"no column 'foto' \(for image\); did you mean 'photo'\? .*sku"):
        find(None, manifest=path, columns={"id": "sku", "image": "foto"})
    with pytest.raises(InputError, match=r"no column 'prise' \(for keep\); did you mean 'price'"):
        find(None, manifest=path, columns=COLUMNS, keep=["prise"])


def test_kept_values_without_a_common_type(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="column 'size' can't be kept"):
        manifest(tmp_path, '{"text": "a", "size": 4}\n{"text": "b", "size": "L"}', "items.jsonl", keep=["size"])
    listing = manifest(tmp_path, '{"text": "a", "size": 4}\n{"text": "b", "size": 4.5}', "items.jsonl", keep=["size"])
    assert listing.keep_types == {"size": pa.float64()}


@pytest.mark.parametrize("depth", [300, 700, 2000])
def test_what_is_nested_deeply_is_no_text_and_may_not_be_kept(tmp_path: Path, depth: int) -> None:
    """However deep Python can read, keep or write it: the line is told, or the column."""
    line = f'{{"text": "a", "deep": {"[" * depth}{"]" * depth}}}'
    with pytest.raises(InputError, match=r"items\.jsonl:1: "):
        manifest(tmp_path, line, "items.jsonl", columns={"text": "deep"})
    if depth > 500:
        with pytest.raises(InputError, match=r"items\.jsonl:1: |column 'deep'"):
            manifest(tmp_path, line, "items.jsonl", keep=["deep"])
    if depth < 900:
        assert len(manifest(tmp_path, line, "items.jsonl").samples) == 1


@pytest.mark.parametrize("value", ["{}", "[{}]", '{"a": [{}]}'])
def test_objects_without_keys_can_not_be_kept(tmp_path: Path, value: str) -> None:
    with pytest.raises(InputError, match="'m' can't be kept: an object without a key"):
        manifest(tmp_path, f'{{"text": "a", "m": {value}}}', "items.jsonl", keep=["m"])
    made = manifest(tmp_path, '{"text": "a", "m": {"k": [1]}}', "items.jsonl", keep=["m"])
    assert str(made.keep_types["m"]) == "struct<k: list<item: int64>>"


def test_values_that_python_can_not_hold_are_told_with_their_column(tmp_path: Path) -> None:
    when = pa.array([1_700_000_000_123_456_789], pa.timestamp("ns"))
    pq.write_table(pa.table({"text": ["a"], "when": when}), tmp_path / "items.parquet")
    with pytest.raises(InputError, match=r"items\.parquet: column 'when' can't be kept, of type timestamp\[ns\]"):
        find(None, manifest=tmp_path / "items.parquet", keep=["when"])


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such manifest"):
        find(None, manifest=tmp_path / "items.csv")
    (tmp_path / "items.csv").mkdir()
    with pytest.raises(InputError, match="a folder, not a manifest"):
        find(None, manifest=tmp_path / "items.csv")


def test_a_parquet_file_with_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "items.parquet")
    with pytest.raises(InputError, match=r"items\.parquet: column 'text' is there 2 times"):
        find(None, manifest=tmp_path / "items.parquet")
