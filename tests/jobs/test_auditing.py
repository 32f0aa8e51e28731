"""The audit of a job: which samples, what of it is told, and that a broken promise has consequences."""

from __future__ import annotations

import dataclasses
import itertools

import pyarrow.parquet as pq
import pytest
from support import shop

from mmpipe import Pipeline, Prediction, Sample
from mmpipe.errors import ConfigError
from mmpipe.fusion.audit import Observed
from mmpipe.jobs.auditing import Auditor, AuditSettings, is_chosen

SETTINGS = AuditSettings(share=1.0, disable=False, promised=0.01, last_exit="all", batch=8)
IDS = [f"item-{number:05d}" for number in range(20_000)]


def rows(ids, early=True, label="mug"):
    answered_by = "image" if early else "all"
    return [Sample(i, {}) for i in ids], [Prediction(i, "ok", label=label, answered_by=answered_by) for i in ids]


def auditor(full_label="mug", said=None, **changes):
    def run(samples):
        return [Prediction(sample.id, "ok", label=full_label, answered_by="all") for sample in samples]

    return Auditor(dataclasses.replace(SETTINGS, **changes), run, (said if said is not None else []).append)


def test_a_share_is_chosen_by_the_id_alone():
    chosen = {i for i in IDS if is_chosen(i, 0.01)}
    assert 150 <= len(chosen) <= 250
    assert chosen < {i for i in IDS if is_chosen(i, 0.02)}
    assert not any(is_chosen(i, 0.0) for i in IDS)
    assert all(is_chosen(i, 1.0) for i in IDS)


def test_the_shards_make_no_difference():
    found = []
    for size in (1, 7, 1000):
        one = auditor(full_label="lamp", share=0.1)
        for start in range(0, 1000, size):
            one.look(one.choose(*rows(IDS[start : start + size])))
        one.finish()
        found.append(one.observed)
    assert found[0] == found[1] == found[2] == Observed(found[0].count, found[0].count)


def test_the_share_is_of_all_samples_and_only_early_ones_cost_a_run():
    one = auditor(full_label="lamp", promised=None)
    one.look(one.choose(*rows(IDS[:10])))
    one.look(one.choose(*rows(IDS[10:100], early=False)))
    one.finish()
    assert one.report() | {"seconds": 0} == {
        "share": 1.0, "chosen": 100, "audited": 10, "disagreements": 10, "estimate": 0.1,
        "interval": [pytest.approx(0.0321, abs=1e-4), pytest.approx(0.2175, abs=1e-4)], "certainty": 0.95,
        "promised": None, "broken": False, "exits_disabled": False, "seconds": 0,
    }  # fmt: skip


def test_a_broken_promise_is_said_once_and_is_noted():
    said = []
    one = auditor(full_label="lamp", said=said)
    for start in range(0, 80, 8):
        one.look(one.choose(*rows(IDS[start : start + 8])))
    assert one.broken
    assert one.exits
    assert said == one.notes
    assert len(said) == 1
    assert "more than the 1.00% that the calibration promised; calibrate on data as they are now" in said[0]


def test_a_kept_promise_is_never_called_broken():
    one = auditor()
    for start in range(0, 8000, 8):
        one.look(one.choose(*rows(IDS[start : start + 8])))
    assert not one.broken
    assert one.report()["interval"][1] < 0.01


def test_disabled_exits_end_the_audit():
    one = auditor(full_label="lamp", disable=True)
    one.look(one.choose(*rows(IDS[:80])))
    assert not one.exits
    count = one.observed.count
    one.look(one.choose(*rows(IDS[80:200])))
    one.finish()
    assert one.observed.count == count
    assert "exits are off" in one.notes[0]


def test_what_is_known_only_at_the_end_switches_nothing_off():
    one = auditor(full_label="lamp", disable=True, batch=1000)
    one.look(one.choose(*rows(IDS[:80])))
    one.finish()
    assert one.broken
    assert not one.report()["exits_disabled"]
    assert "known only at the end, when no exit could be switched off any more" in one.notes[0]


def test_samples_wait_until_they_fill_a_bucket():
    sizes = []
    one = auditor()
    run = one._run
    one._run = lambda samples: sizes.append(len(samples)) or run(samples)
    for start in range(0, 30, 3):
        one.look(one.choose(*rows(IDS[start : start + 3])))
    one.finish()
    assert sizes == [9, 9, 9, 3]


def test_of_a_shard_it_keeps_what_is_to_be_computed():
    one = auditor(share=0.1)
    chosen = one.choose(*rows(IDS[:1000]))
    assert 60 <= len(chosen) <= 140
    assert one.choose(*rows(IDS[:1000], early=False)) == [None] * len(chosen)  # counted, and nothing to compute


def test_no_rows_and_rows_without_an_answer():
    one = auditor()
    one.look(one.choose([], []))
    one.look(one.choose([Sample("a", {})], [Prediction("a", "failed", "text:empty: no text")]))
    one.finish()
    report = one.report()
    assert (report["chosen"], report["estimate"], report["interval"]) == (0, None, [0.0, 1.0])


# --- a real pipeline

EXITS = [{"after": "text", "threshold": 0.0}]  # random weights: the text alone often says something else


def config(weights, **audit):
    made = shop.config(weights, EXITS, output={"shard_rows": 16})
    return {**made, "fusion": {**made["fusion"], "audit": audit or None}}


def audited(made, folder, out, promised=None):
    with Pipeline.load(made) as pipeline:
        pipeline._built = dataclasses.replace(pipeline.built, max_disagreement=promised)
        return pipeline.run_folder(folder, out).run, pq.read_table(out / "predictions").to_pylist()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return shop.media(tmp_path_factory.mktemp("media"), 60)


def test_what_a_job_finds_is_what_the_full_pipeline_says(weights, media, tmp_path):
    run, table = audited(config(weights, share="100%"), media, tmp_path / "out")
    with Pipeline.load(shop.config(weights)) as full:
        answers = {p.id: p.label for p in full.predict(full.find(media).samples)}
    early = [row for row in table if row["answered_by"] != "all"]
    assert run["audit"]["chosen"] == len(table)
    assert run["audit"]["audited"] == len(early) > 0
    assert run["audit"]["disagreements"] == sum(row["label"] != answers[row["id"]] for row in early) > 0
    assert run["audit"]["broken"] is False
    assert "Audit of the exits" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_an_audit_changes_no_row(weights, media, tmp_path):
    _, watched = audited(config(weights, share="50%"), media, tmp_path / "a")
    run, alone = audited(config(weights, share="0%"), media, tmp_path / "b")
    assert watched == alone
    assert run["audit"] is None


def test_on_drift_the_exits_are_off_from_the_next_look_on(weights, media, tmp_path):
    run, table = audited(config(weights, share="100%", on_drift="disable"), media, tmp_path / "out", promised=0.001)
    assert run["audit"]["broken"]
    assert run["audit"]["exits_disabled"]
    by_shard = [{row["answered_by"] for row in table[start : start + 16]} for start in range(0, 60, 16)]
    last = next(number for number, names in enumerate(by_shard) if names == {"all"})
    assert last > 0
    assert all(names == {"all"} for names in by_shard[last:])
    assert any("exits are off from here on" in note for note in run["notes"])


@pytest.mark.parametrize(
    ("audit", "promised", "share"),
    [
        (None, None, None),
        (None, 0.01, 0.01),
        ({"share": "0%"}, 0.01, None),
        ({"on_drift": "disable"}, None, 0.01),
        ({"share": "3%"}, 0.02, 0.03),
    ],
)
def test_what_is_audited_by_default(weights, audit, promised, share):
    with Pipeline.load(config(weights, **(audit or {}))) as pipeline:
        pipeline._built = dataclasses.replace(pipeline.built, max_disagreement=promised)
        settings = pipeline.job_settings([]).audit
    assert (settings and settings.share) == share
    assert settings is None or (settings.promised, settings.last_exit, settings.batch) == (promised, "all", 8)


def test_without_exits_there_is_nothing_to_audit(weights):
    made = shop.config(weights)
    with Pipeline.load({**made, "fusion": {**made["fusion"], "audit": {"share": "5%"}}}) as pipeline:
        assert pipeline.job_settings([]).audit is None


def test_embedding_has_nothing_to_audit():
    made = {"task": "embed", "encoders": {"image": {"model": "org/name"}}, "fusion": {"audit": {"share": "1%"}}}
    with pytest.raises(ConfigError, match="audit stands beside task: embed"):
        Pipeline.load(made)


def test_a_job_looks_when_there_is_enough_to_compute():
    off = dataclasses.replace(SETTINGS, disable=True, batch=32)
    looks = [dataclasses.replace(off, share=share).shards_a_look(1024) for share in (1.0, 0.03, 0.01, 0.0001)]
    assert looks == [1, 2, 4, 16]
    assert SETTINGS.shards_a_look(1024) == 64


def test_every_kind_of_answer_counts_once():
    one = auditor(full_label="lamp")
    for early, number in itertools.product((True, False), range(8)):
        one.look(one.choose(*rows([f"{early}-{number}"], early=early)))
    one.finish()
    assert (one.observed.count, one.observed.yes, one.audited) == (16, 8, 8)
