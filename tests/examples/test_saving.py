"""The example that weighs exits: it counts what differs, and sets neighbours of one round against each other."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support import examples

from mmpipe import Pipeline, configs

DEMO = Path(configs.__file__).parent / "quickstart"


@pytest.fixture(scope="module")
def saving():
    return examples.load("saving")


def test_the_table_pairs_rounds_and_counts_what_differs(saving):
    rows = [{"id": str(n), "label": "a", "answered_by": "image" if n < 6 else "all"} for n in range(10)]
    full = [dict(row, label="b" if row["id"] in "01" else "a", answered_by="all") for row in rows]
    rounds = [({"wall": 1.0}, {"wall": 2.0}), ({"wall": 4.0}, {"wall": 4.0}), ({"wall": 1.0}, {"wall": 3.0})]
    told = saving.table(rounds, rows, full, {"0": "b", "5": "a"})
    assert "10 items, 60.0% answered early" in told
    assert "20.00% (95%: 2.52% to 55.61%)" in told  # Clopper and Pearson
    assert "right: 50.00% with exits, 100.00% without (-50.00 points)" in told
    assert "wall: 3.00 s → 1.00 s, ÷ 2.00 (1.00 to 3.00)" in told


def test_on_the_demo(saving, capsys):
    given = ["quickstart", "--input", str(DEMO / "media"), "--truth", str(DEMO / "labels.csv"), "--rounds", "1"]
    assert saving.main(given) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("62 items, ")
    assert [line.split(":")[0] for line in told[3:]] == ["decode + compute", "cores", "wall"]
    early = float(told[0].split(", ")[1].split("%")[0])
    assert early > 30


def test_an_exit_at_which_a_share_leaves(saving, tmp_path):
    given = saving.exit_for("quickstart", [], DEMO / "media", ["image", "text"], saving.percent("40%"))
    with Pipeline.load("quickstart", overrides=[*saving.ALIKE, *given]) as pipeline:
        pipeline.run_folder(DEMO / "media", tmp_path)
    rows = pq.read_table(tmp_path / "predictions").to_pylist()
    spared = [row for row in rows if "audio" in row["present"] and {"image", "text"} & {*row["used"]}]
    left = [row for row in spared if row["skipped"]]
    assert abs(len(left) - 0.4 * len(spared)) <= 1.5
