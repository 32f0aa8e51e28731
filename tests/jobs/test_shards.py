"""Predictions → Parquet: the columns that are documented, exactly; null where nothing was asked for or computed."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmpipe.errors import InputError
from mmpipe.jobs import shards
from mmpipe.types import Prediction

ROW = Prediction(
    id="a/ü\n1",
    status="partial",
    error="image:truncated: a.jpg: the file ends before the picture does",
    label="mug",
    confidence=0.75,
    top_k=(("mug", 0.75), ("lamp", 0.25)),
    answered_by="image+text",
    present=("image", "text", "audio"),
    used=("text",),
    skipped=("audio",),
    failed=("image",),
    keep={"price": 3, "note": None},
    probabilities=(0.75, 0.25),
    embeddings={"text": np.array([0.6, 0.8], np.float32)},
    embedding=np.array([0, 0, 0, 0.6, 0.8], np.float32),
)


def written(tmp_path, predictions, columns):
    return pq.read_table(shards.write_shard(tmp_path / "predictions", 3, shards.table(predictions, columns)))


def test_the_columns_are_those_that_are_documented(tmp_path):
    keep = {"price": pa.int64(), "note": pa.string()}
    table = written(tmp_path, [ROW], shards.schema({"image": 3, "text": 2}, 2, keep))
    assert [(field.name, str(field.type).replace("element", "item")) for field in table.schema] == [
        ("id", "string"),
        ("status", "string"),
        ("error", "string"),
        ("label", "string"),
        ("confidence", "float"),
        ("top_k", "list<item: struct<label: string, probability: float>>"),
        ("answered_by", "string"),
        ("deliberated", "bool"),
        ("present", "list<item: string>"),
        ("used", "list<item: string>"),
        ("skipped", "list<item: string>"),
        ("failed", "list<item: string>"),
        ("price", "int64"),
        ("note", "string"),
        ("probabilities", "fixed_size_list<item: float>[2]"),
        ("embedding", "fixed_size_list<item: float>[5]"),
        ("embedding_image", "fixed_size_list<item: float>[3]"),
        ("embedding_text", "fixed_size_list<item: float>[2]"),
    ]
    assert table.schema.metadata[b"mmpipe.schema"] == b"1"
    assert all(field.nullable for field in table.schema)


def test_a_row_reads_back_as_it_was(tmp_path):
    keep = {"price": pa.int64(), "note": pa.string()}
    (row,) = written(tmp_path, [ROW], shards.schema({"image": 3, "text": 2}, 2, keep)).to_pylist()
    assert row == {
        "id": "a/ü\n1",
        "status": "partial",
        "error": "image:truncated: a.jpg: the file ends before the picture does",
        "label": "mug",
        "confidence": 0.75,
        "top_k": [{"label": "mug", "probability": 0.75}, {"label": "lamp", "probability": 0.25}],
        "answered_by": "image+text",
        "deliberated": False,
        "present": ["image", "text", "audio"],
        "used": ["text"],
        "skipped": ["audio"],
        "failed": ["image"],
        "price": 3,
        "note": None,
        "probabilities": [0.75, 0.25],
        "embedding": pytest.approx([0, 0, 0, 0.6, 0.8]),
        "embedding_image": None,
        "embedding_text": pytest.approx([0.6, 0.8]),
    }


def test_what_nobody_asked_for_and_what_failed_is_null_not_absent(tmp_path):
    plain = Prediction(id="a", status="ok", label="mug", confidence=1.0, top_k=(("mug", 1.0),), answered_by="all")
    failed = Prediction(id="b", status="failed", error="sample:no_media: has none of text")
    table = written(tmp_path, [plain, failed], shards.schema({"text": 2}, 2, {}))
    for name in ("probabilities", "embedding", "embedding_text"):
        assert table.column(name).null_count == 2
    for name in ("label", "confidence", "top_k", "answered_by"):
        assert table.column(name).to_pylist()[1] is None
    assert table.column("deliberated").to_pylist() == [False, False]
    assert table.column("failed").to_pylist() == [[], []]
    assert table.column("error").to_pylist()[0] is None


def test_embedding_pipelines_have_the_same_columns_without_labels(tmp_path):
    row = Prediction(id="a", status="ok", answered_by="all", embeddings={"text": np.ones(2, np.float32)})
    table = written(tmp_path, [row], shards.schema({"text": 2}, 0, {}))
    assert table.column("label").to_pylist() == table.column("probabilities").to_pylist() == [None]
    assert table.column("embedding_text").to_pylist() == [[1.0, 1.0]]
    assert written(tmp_path, [], shards.schema({"text": 2}, 0, {})).num_rows == 0


@pytest.mark.parametrize("name", ["id", "label", "embedding", "embedding_text", "probabilities", "deliberated"])
def test_a_kept_column_can_not_take_a_name_of_ours(name):
    with pytest.raises(InputError, match=f"input.keep: {name} is a column that the output has already"):
        shards.schema({"text": 2}, 2, {name: pa.string(), "price": pa.int64()})


def test_a_kept_column_may_have_any_other_name(tmp_path):
    kept = {"embeddings": "a", "embedding_model": "clip", "keep": 3}
    types = {"embeddings": pa.string(), "embedding_model": pa.string(), "keep": pa.int64()}
    table = written(tmp_path, [Prediction("a", "ok", keep=kept)], shards.schema({"text": 2}, 2, types))
    assert table.select(list(kept)).to_pylist() == [kept]
    assert table.column("embedding_text").null_count == 1


def test_errors_that_quote_half_a_character_can_be_written(tmp_path):
    row = Prediction(id="a", status="failed", error="text:unusable: ValueError: \ud83d")
    assert written(tmp_path, [row], shards.schema({"text": 2}, 2, {})).column("error").to_pylist() == [
        "text:unusable: ValueError: \\ud83d"
    ]


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "part-00000.parquet"
    path.write_bytes(b"before")

    def half():
        with shards.replacing(path) as temporary:
            temporary.write_bytes(b"half")
            assert path.read_bytes() == b"before"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert path.read_bytes() == b"before"
    with shards.replacing(path) as temporary:
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_temporary_file_that_can_not_be_renamed_is_not_left_behind(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(OSError), shards.replacing(tmp_path / "run.json") as temporary:
        temporary.write_bytes(b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
