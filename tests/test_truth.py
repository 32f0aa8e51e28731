"""True labels: read from three kinds of tables, and refused with the line that is wrong."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmpipe.errors import InputError
from mmpipe.truth import read_truth

LABELS = ("mug", "lamp", "easy chair")


def test_three_kinds_of_tables_say_the_same(tmp_path):
    (tmp_path / "a.csv").write_text('price,id,label\n3,x/1,mug\n4,2,"easy chair"\n')
    (tmp_path / "a.jsonl").write_text('{"id": "x/1", "label": "mug"}\n\n{"id": 2, "label": "easy chair"}\n')
    pq.write_table(pa.table({"id": ["x/1", "2"], "label": ["mug", "easy chair"]}), tmp_path / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        assert read_truth(tmp_path / name, LABELS) == {"x/1": "mug", "2": "easy chair"}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", "id,label\n1,mug\n2,lmap\n", ["t.csv:3", "'lmap'", "did you mean 'lamp'?"]),
        ("t.csv", 'id,label\n"1\n1",mug\n2,xyz\n', ["t.csv:4", "'xyz'", "easy chair"]),
        ("t.csv", "id,label\n1,mug\n2,\n", ["t.csv:3", "blank"]),
        ("t.csv", "id,label\n1,mug\n1,lamp\n", ["t.csv:3", "already used in line 2"]),
        ("t.csv", "id,label\n1,mug,3\n", ["t.csv:2", "3 cells under 2 columns"]),
        ("t.csv", "name,label\n1,mug\n", ["no column 'id'", "name, label"]),
        ("t.csv", "id,class\n1,mug\n", ["no column 'label'"]),
        ("t.csv", "id,label\n", ["no rows"]),
        ("t.csv", "", ["empty"]),
        ("t.jsonl", '{"id": 1, "label": "mug"}\n{"id": 2, "label": 7}\n', ["t.jsonl:2", "not text"]),
        ("t.jsonl", '{"id": 1, "label": "mug"\n', ["t.jsonl:1", "not JSON"]),
        ("t.parquet", "no table", ["t.parquet", "Parquet"]),
        ("t.txt", "id,label\n", ["t.txt", ".csv, .jsonl, .parquet"]),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        read_truth(tmp_path / name, LABELS)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such"):
        read_truth(tmp_path / "none.csv", LABELS)
