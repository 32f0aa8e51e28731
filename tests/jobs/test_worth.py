"""What exits are said to have brought."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from support import shop

from mmpipe import Pipeline
from mmpipe.jobs.tally import Tally
from mmpipe.jobs.worth import worth_of


def tally(exits=("image", "all"), **seconds):
    made = Tally(("a", "b"), exits, ("image", "text"))
    made.present, made.files_opened = Counter(image=100, text=80), Counter(image=100, text=20)
    made.seconds = {"image@0": 1.0, "head@0": 0.5, "text@1": 2.0, "head@1": 0.3, **seconds}
    made.decoding["text"] = 1.0
    return made


def test_what_was_spared_counts_at_the_mean_cost_of_what_was_computed():
    worth = worth_of(tally())
    assert worth.saved == pytest.approx(60 * (2.0 + 1.0) / 20)
    assert worth.spent == 0.5
    assert worth.pays
    assert "spared about 9.0 s" in worth.note()
    assert "took 500 ms of looking" in worth.note()


def test_exits_that_cost_more_than_they_spare_are_named():
    worth = worth_of(tally(**{"head@0": 9.5}))
    assert not worth.pays
    assert "do not pay" in worth.note()
    assert "fusion.exits: []" in worth.note()


def test_nothing_is_said_without_exits_or_without_a_cost_to_go_by():
    assert worth_of(tally(exits=("all",))) is None
    never = tally()
    never.files_opened["text"] = 0
    assert worth_of(never) is None
    known = tally()
    known.recalled["text"] = 20
    assert worth_of(known) is None


def test_a_job_tells_of_its_buckets_and_of_exits_that_do_not_pay(weights, tmp_path):
    media = shop.media(tmp_path / "media", 30)
    config = shop.config(
        weights, [{"after": "image", "threshold": 1.0}, {"after": ["image", "text"], "threshold": 1.0}]
    )
    with Pipeline.load(config) as pipeline:
        run = pipeline.run_folder(media, tmp_path / "out").run
    assert run["exits"]["saved_seconds"] < run["exits"]["spent_seconds"]
    assert any("do not pay" in note for note in run["notes"])
    assert run["buckets"]["image@0"]["count"] == 4
    assert run["buckets"]["image@0"]["fill"] == pytest.approx(run["files_opened"]["image"] / 32, abs=1e-3)
    assert json.loads((tmp_path / "out/run.json").read_text())["buckets"] == run["buckets"]
