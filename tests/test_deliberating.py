"""Deliberation as users meet it: unsure samples are looked at again, each by itself, and nothing is lost by it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import shop, words

from mmpipe import Pipeline, deliberating
from mmpipe.deliberating import characters_read
from mmpipe.errors import ConfigError, MediaError

BELOW = 0.9
EXITS = [{"after": "image", "threshold": 0.965}, {"after": ["image", "text"], "threshold": 0.9}]
LONG = np.random.default_rng(3).normal(0, 0.1, 16_000 * 9).astype(np.float32), 16_000
TEXT = "red old oak tall tea desk paper steel soft light blue signed " * 5


def config(weights, exits=(), views=4, below=BELOW, **sections):
    made = shop.config(weights, list(exits), **sections)
    return {**made, "fusion": {**made["fusion"], "deliberate": {"below": below, "views": views}}}


@pytest.fixture(scope="module")
def again(weights):
    with Pipeline.load(config(weights, EXITS)) as made:
        yield made


@pytest.fixture(scope="module")
def samples(again, tmp_path_factory):
    return list(again.find(shop.media(tmp_path_factory.mktemp("media"), 30)).samples)


def same(one, other):
    return [dataclasses.replace(p, embedding=None, embeddings=None) for p in one] == [
        dataclasses.replace(p, embedding=None, embeddings=None) for p in other
    ]


def test_only_unsure_answers_of_the_last_stage_are_looked_at_again(again, samples):
    first, second = again.run(samples, deliberate=False)[0], again.predict(samples)
    assert any(prediction.deliberated for prediction in second)
    for one, other, sample in zip(first, second, samples, strict=True):
        wanted = one.answered_by == "all" and one.confidence < BELOW and "image" in sample.media
        assert other.deliberated == wanted
        assert (one.answered_by, one.used, one.skipped) == (other.answered_by, other.used, other.skipped)
        if not wanted:
            assert one == other


def test_a_row_is_the_weighed_answer_throughout(weights, samples):
    made = config(weights, output={"probabilities": True}, below=1.0)
    with Pipeline.load(made) as pipeline:
        for prediction in pipeline.predict(samples):
            if prediction.deliberated:
                assert prediction.confidence == max(prediction.probabilities)
                assert prediction.label == shop.LABELS[int(np.argmax(prediction.probabilities))]
                assert prediction.top_k[0] == (prediction.label, prediction.confidence)
                assert sum(prediction.probabilities) == pytest.approx(1.0, abs=1e-5)


def test_the_bytes_depend_on_the_sample_alone(again, samples):
    together = again.predict(samples)
    assert same(together, [again.predict([sample])[0] for sample in samples])
    assert same(together, again.predict(samples[::-1])[::-1])
    assert same(together, list(again.stream(samples)))


def test_shards_and_chunks_of_views_change_nothing(weights, again, samples):
    with Pipeline.load(config(weights, EXITS, output={"shard_rows": 7})) as pipeline:
        assert same(again.predict(samples), pipeline.predict(samples))


def test_a_single_call_deliberates(again, samples):
    sample = next(s for s, p in zip(samples, again.predict(samples), strict=True) if p.deliberated)
    prediction = again(**sample.media)
    assert prediction.deliberated
    assert prediction.label == again.predict([sample])[0].label


def test_what_has_nothing_more_to_show_is_left_alone(weights):
    with Pipeline.load(config(weights, below=1.0)) as pipeline:
        short = (LONG[0][:16_000], 16_000)
        found = pipeline.predict([{"text": "a red mug", "audio": short}, {"text": TEXT}, {"audio": LONG}])
    assert [prediction.deliberated for prediction in found] == [False, True, True]


@pytest.mark.parametrize(("views", "runs"), [(2, 1), (4, 2), (32, 2)])
def test_no_more_views_than_asked_for_and_none_twice(weights, monkeypatch, views, runs):
    seen = []
    whole = deliberating.weigh
    monkeypatch.setattr(deliberating, "weigh", lambda p, sure: seen.append(p.shape[0]) or whole(p, sure))
    with Pipeline.load(config(weights, views=views, below=1.0)) as pipeline:
        pipeline.predict([{"audio": LONG}, {"text": TEXT}])
    # nine seconds are three windows of 3.5 s, sixty words three of 24
    assert seen == [min(views, 3)] * 2


def test_no_exits_is_one_look(again, samples):
    predictions, _ = again.run(samples, exits=False)
    assert not any(prediction.deliberated for prediction in predictions)
    assert any(p.deliberated for p in again.run(samples, exits=False, deliberate=True)[0])


def test_a_view_that_fails_is_dropped_and_the_sample_is_not(weights, again, samples, monkeypatch):
    whole = again.predict(samples)
    assert any(prediction.deliberated for prediction in whole)
    broken = b"no picture"
    monkeypatch.setattr(deliberating.views, "of_picture", lambda source, count, size: [source, broken, broken])
    monkeypatch.setattr(deliberating.views, "of_sound", lambda source, *rest: [source])
    monkeypatch.setattr(deliberating.views, "of_text", lambda source, *rest: [source])
    found = again.predict(samples)
    assert not any(prediction.deliberated for prediction in found)
    assert [p.status for p in found] == [p.status for p in whole]
    assert not any(prediction.error for prediction in found)


def test_failed_media_are_not_opened_again_and_a_failed_sample_stays_failed(weights, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    given = [
        {"image": tmp_path / "bad.png", "audio": tmp_path / "bad.wav"},
        {"image": tmp_path / "bad.png", "text": TEXT},
        {"text": " "},
        {},
    ]
    with Pipeline.load(config(weights, below=1.0)) as pipeline:
        found = pipeline.predict(given)
    assert [prediction.status for prediction in found] == ["failed", "partial", "failed", "failed"]
    assert [prediction.deliberated for prediction in found] == [False, True, False, False]
    assert found[1].error.count("image:") == 1


def test_nothing_at_all(again):
    assert again.predict([]) == []
    assert list(again.stream([])) == []


def test_an_answer_that_is_no_number_is_not_looked_at_again(again, samples):
    _, outcome = again.run(samples, deliberate=False)
    outcome.confidence_N = torch.full_like(outcome.confidence_N, float("nan"))
    assert again._engine.deliberation.of(samples, outcome, 2, lambda views: pytest.fail("looked again")) == {}


def test_views_whose_answer_is_no_number_are_dropped(again, samples):
    _, outcome = again.run(samples, deliberate=False)

    def broken(views):
        _, seen = again.run(views, exits=False)
        seen.exit_N = torch.full_like(seen.exit_N, -1)
        return seen

    assert again._engine.deliberation.of(samples, outcome, 2, broken) == {}


def test_a_job_counts_what_a_second_look_did(again, tmp_path):
    summary = again.run_folder(shop.media(tmp_path / "media", 30), tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "predictions").to_pylist()
    told = summary.run["deliberated"]
    assert told["rows"] == sum(row["deliberated"] for row in rows) > 0
    assert 0 <= told["changed"] <= told["rows"]
    assert told["seconds"] > 0
    assert "deliberating" not in summary.run["seconds"]["segments"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Looked at again" in page


def test_embedding_has_nothing_to_deliberate(tmp_path):
    made = {"task": "embed", "encoders": {"image": {"model": "org/name"}}, "fusion": {"deliberate": {"below": 0.5}}}
    with pytest.raises(ConfigError, match="deliberate stands beside task: embed"):
        Pipeline.load(made)


def test_how_much_of_a_text_is_read_is_found_by_asking(again):
    preparation = again.built.preparations["text"]
    text = "word " * 3_000
    read = characters_read(preparation, text)
    assert text[:read].split() == ["word"] * 24
    assert characters_read(preparation, "a red mug") == 9
    assert characters_read(
        dataclasses.replace(preparation, prepare=lambda given: {"all": torch.tensor(hash(given))}), text
    ) == len(text)


def test_a_prepare_that_raises_leaves_the_first_look(tmp_path):
    made = words.config(tmp_path, fusion={"head": "word_parts:Head", "deliberate": {"below": 1.0}})
    with Pipeline.load(made) as pipeline:
        found = pipeline.predict([{"text": "unusable text"}, {"text": "a mug"}])
    assert [prediction.status for prediction in found] == ["failed", "ok"]
    assert not any(prediction.deliberated for prediction in found)


def test_media_errors_while_looking_for_views(again, samples, monkeypatch):
    def load(*given, **more):
        raise MediaError("text", "not_found", "gone")

    monkeypatch.setattr(deliberating, "load", load)
    assert same(again.predict([{"text": TEXT}]), again.predict([{"text": TEXT}]))
