"""Calibration files: read back as written, refused with the line that is wrong, bound to their model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support import shop

from mmpipe import Pipeline, runners
from mmpipe.calibrated import Calibration, mismatch, parse_calibration, write_calibration
from mmpipe.config import load
from mmpipe.encoders import tiny
from mmpipe.errors import ConfigError
from mmpipe.parity import Shift
from mmpipe.types import Sample

MADE = {
    "version": 1,
    "made_by": "mmpipe 0.1.0",
    "labels": shop.LABELS,
    "binds_to": {"model": "?", "dtype": "float32", "backends": ["eager"], "dtypes": {}},
    "confidence": "margin",
    "exits": [
        {"after": ["audio"], "threshold": 0.05, "temperature": 2.5, "answered": 0.5},
        {"after": ["audio", "image"], "threshold": 0.3, "temperature": 0.5, "answered": 0.2},
    ],
    "full_temperature": 1.5,
    "promise": {
        "max_disagreement": 0.02, "certainty": 0.9, "items_learn": 400, "items_test": 600, "observed": 0.011,
    },
    "expected": {"saving": 0.4, "seconds_full": 0.1, "seconds_with_exits": 0.06},
    "accuracy": None,
    "second_look": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def core(pipeline) -> str:
    return pipeline.built.core


def made(**changes):
    return {**json.loads(json.dumps(MADE)), **changes}


def bound(core: str, **changes):
    return made(binds_to={"model": core, "dtype": "float32", "backends": ["eager"], **changes})


def config(weights, path, content, **fusion):
    path.write_text(json.dumps(content, indent=1))
    written = shop.config(weights, shop.EXITS)
    return {**written, "fusion": {**written["fusion"], "calibration": str(path), **fusion}}


def test_what_is_written_is_read_back(tmp_path):
    found = Calibration.model_validate(made())
    write_calibration(tmp_path / "c.json", found)
    assert parse_calibration((tmp_path / "c.json").read_text(), "c.json") == found
    assert json.loads((tmp_path / "c.json").read_text()) == MADE  # and by people


def test_a_file_replaces_the_exits_in_its_own_order_and_tempers_them(weights, tmp_path, core):
    with Pipeline.load(config(weights, tmp_path / "c.json", bound(core))) as pipeline:
        built = pipeline.built
        assert [exit_.name for exit_ in pipeline.plan.exits] == ["audio", "audio+image", "all"]
        assert (built.thresholds, built.temperatures) == ((0.05, 0.3), (2.5, 0.5, 1.5))
        assert (built.confidence, built.max_disagreement) == ("margin", 0.02)
        samples = pipeline.find(shop.media(tmp_path / "media", 30)).samples
        tempered, _ = pipeline.run(samples, exits=False)
        calibrated, _ = pipeline.run(samples)
        assert {one.answered_by for one in calibrated} == {"audio", "audio+image", "all"}
        job = pipeline.fingerprints(samples)["job"]
    plain = shop.config(
        weights, [{"after": "audio", "threshold": 0.4}, {"after": ["audio", "image"], "threshold": 0.3}]
    )
    plain["fusion"]["confidence"] = "margin"
    with Pipeline.load(plain) as pipeline:
        assert pipeline.built.max_disagreement is None
        full, _ = pipeline.run(samples, exits=False)
        assert pipeline.fingerprints(samples)["job"] != job  # temperatures decide who leaves
    assert [one.label for one in tempered] == [one.label for one in full]
    for warm, plain_one in zip(tempered, full, strict=True):
        top = [p for _, p in plain_one.top_k]
        ratio = math.log(top[0] / top[1]) / 1.5  # softmax at a temperature of 1.5
        assert math.log(warm.top_k[0][1] / warm.top_k[1][1]) == pytest.approx(ratio, rel=1e-3)


LOOK = {"below": 0.8, "views": 4, "items": 900, "looked_at": 40, "won": 2, "lost": 3, "seconds": 0.4, "pays": False}


@pytest.mark.parametrize(
    ("changes", "deliberates"),
    [
        ({}, False),
        ({"pays": True}, True),
        ({"views": 3}, True),  # that was another second look
    ],
)
def test_a_second_look_that_was_not_shown_to_pay_is_left_out(weights, tmp_path, core, changes, deliberates):
    content = {**bound(core), "exits": [], "promise": None, "second_look": {**LOOK, **changes}}
    written = config(weights, tmp_path / "c.json", content, deliberate={"below": 0.8, "views": 4})
    with Pipeline.load(written) as pipeline:
        samples = pipeline.find(shop.media(tmp_path / "media", 12)).samples
        assert any(one.deliberated for one in pipeline.predict(samples)) == deliberates
        told = "of 900 items with a true label 40 were looked at again, at 10 ms each; 2 answers were won by it, 3 lost"
        assert any(told in note for note in pipeline.notes) != deliberates


def test_an_exit_that_nobody_leaves_at_stays_and_lets_nobody_go(weights, tmp_path, core):
    content = bound(core)
    content["exits"][0]["threshold"] = None
    with Pipeline.load(config(weights, tmp_path / "c.json", content)) as pipeline:
        samples = pipeline.find(shop.media(tmp_path / "media", 30)).samples
        predictions, outcome = pipeline.run(samples)
        assert pipeline.built.thresholds[0] == math.inf
    assert {one.answered_by for one in predictions} == {"audio+image", "all"}
    silent = {row for row, sample in enumerate(samples) if "audio" in sample.media and "image" not in sample.media}
    looked = {row for look in outcome.looks if look.exit_index == 1 for row in look.rows}
    assert silent
    assert not silent & looked  # the second exit brought them nothing new


def test_no_exits_could_be_certified(weights, tmp_path, core):
    content = {**bound(core), "exits": [], "promise": None}
    with Pipeline.load(config(weights, tmp_path / "c.json", content)) as pipeline:
        assert [exit_.name for exit_ in pipeline.plan.exits] == ["all"]
        assert pipeline.built.max_disagreement is None
        assert any("could certify none" in note for note in pipeline.notes)


@pytest.mark.parametrize(
    ("changes", "words"), [({"model": "0" * 32}, "another model"), ({"dtype": "bfloat16"}, "bfloat16")]
)
def test_a_file_for_another_model_is_refused_or_leaves_the_exits_out(weights, tmp_path, core, changes, words):
    content = bound(core, **changes)
    with pytest.raises(ConfigError) as caught:
        Pipeline.load(config(weights, tmp_path / "c.json", content))
    assert caught.value.path == "fusion.calibration"
    assert words in str(caught.value)
    assert "mmpipe calibrate" in str(caught.value)
    with Pipeline.load(config(weights, tmp_path / "c.json", content, on_mismatch="full")) as pipeline:
        assert [exit_.name for exit_ in pipeline.plan.exits] == ["all"]
        assert pipeline.built.max_disagreement is None
        assert any(words in note for note in pipeline.notes)
        assert pipeline(text="a red mug").answered_by == "all"


def test_every_binding_counts():
    calibration = Calibration.model_validate(bound("m"))
    assert mismatch(calibration, model="m", dtype="float32", backends=["eager"]) is None
    assert "weights" in mismatch(calibration, model="n", dtype="float32", backends=["eager"])
    assert "bfloat16" in mismatch(calibration, model="m", dtype="bfloat16", backends=["eager"])
    assert "openvino" in mismatch(calibration, model="m", dtype="float32", backends=["eager", "openvino"])


def test_what_decides_labels_changes_the_fingerprint_and_exits_do_not(weights, tmp_path, core):
    def core_of(**sections):
        with Pipeline.load(shop.config(weights, **sections)) as pipeline:
            return pipeline.built.core

    assert core_of() == core  # no exits at all
    other = shop.weights(tmp_path / "other")
    torch.manual_seed(5)
    tiny.save(other / "title.safetensors", "title", tiny.TitleNet())
    with Pipeline.load(shop.config(other)) as pipeline:
        assert pipeline.built.core != core


WRONG = [
    ("{", "c.json:1", "", "not JSON"),
    ("[]", "c.json", "", "no calibration"),
    ("{}", "c.json", "", "no version"),
    (made(version=2), "c.json", "version", "version 2"),
    (made(version=True), "c.json", "version", "version true"),
    (made(confidence="maximum"), "c.json:18", "confidence", "unknown value 'maximum'"),
    (made(suprise=1), "c.json", "suprise", "unknown key"),
    (made(full_temperature=0), "c.json", "full_temperature", "above 0"),
    (made(labels="mug"), "c.json", "labels", "a list"),
    (made(promise=None), "c.json", "promise", "go together"),
    (made(exits=[]), "c.json", "promise", "go together"),
    (made(exits=[{**MADE["exits"][0], "threshold": 1.5}]), "c.json", "exits.0.threshold", "0 to 1"),
    (made(exits=[{**MADE["exits"][0], "threshold": "0.5"}]), "c.json", "exits.0.threshold", "expected"),
    (made(exits=[{**MADE["exits"][0], "after": ["vidoe"]}]), "c.json", "exits.0.after.0", "no place for an exit"),
    (made(exits=[{"after": ["audio"], "threshold": 0.5}]), "c.json", "exits.0", "missing"),
]


@pytest.mark.parametrize(("content", "where", "path", "words"), WRONG)
def test_what_is_wrong_with_a_file_is_said_with_its_line(content, where, path, words):
    with pytest.raises(ConfigError) as caught:
        parse_calibration(content if isinstance(content, str) else json.dumps(content, indent=1), "c.json")
    assert caught.value.where.startswith(where)
    assert caught.value.path.startswith(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": ["mug", "lamp", "chair", "boot"]}, "'boot', which the configuration doesn't"),
        ({"labels": shop.LABELS[:3]}, "doesn't know the label 'book'"),
        ({"labels": shop.LABELS[::-1]}, "order differs"),
        ({"exits": [MADE["exits"][1], MADE["exits"][0]]}, "does not extend"),
    ],
)
def test_a_file_that_does_not_fit_the_configuration_is_refused(weights, tmp_path, changes, words):
    with pytest.raises(ConfigError) as caught:
        Pipeline.load(config(weights, tmp_path / "c.json", made(**changes)))
    assert caught.value.path == "fusion.calibration"
    assert words in str(caught.value)
    with Pipeline.load(config(weights, tmp_path / "c.json", made(**changes), on_mismatch="full")) as pipeline:
        assert [exit_.name for exit_ in pipeline.plan.exits] == ["all"]
        assert any(words in note for note in pipeline.notes)


def test_switching_exits_off_without_a_promise_is_told_to_do_nothing(weights):
    written = shop.config(weights)
    written["fusion"]["audit"] = {"share": 0.5, "on_drift": "disable"}
    with Pipeline.load(written) as pipeline:
        assert any("does nothing without a calibration" in note for note in pipeline.notes)


def test_a_file_that_is_not_there_is_a_config_error(weights, tmp_path):
    written = shop.config(weights)
    written["fusion"]["calibration"] = str(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="does not exist"):
        load(written)


@pytest.mark.parametrize("way", ["predict", "call", "run"])
def test_exits_of_a_type_that_the_parity_gate_refuses(weights, tmp_path, core, monkeypatch, way):
    """They were certified for it: `on_mismatch` says what becomes of them, then too."""
    shift, item = runners.Runners._shift, {"text": "a red mug"}
    asked = {"runtime": {"dtype": "bfloat16", "cache": "off"}}

    def refusing(self, kind, real):
        lowered = self.resolved(kind).segments.values()
        return Shift({"text": 0.5}, 0.0, 0, 4) if "bfloat16" in {c.dtype for c in lowered} else shift(self, kind, real)

    def asking(pipeline):
        if way == "predict":
            return pipeline.predict([item])[0]
        return pipeline(**item) if way == "call" else pipeline.run([Sample("a", item)])[0][0]

    with Pipeline.load({**shop.config(weights, shop.EXITS), **asked}) as plain:
        kinds = {"dtypes": dict(plain.dtypes), "backends": plain.resolved.backend.split("+")}
        content = bound(core, dtype=plain.resolved.dtype, **kinds)
    monkeypatch.setattr(runners.Runners, "_shift", refusing)
    with Pipeline.load({**config(weights, tmp_path / "c.json", content), **asked}) as pipeline:
        assert len(pipeline.plan.exits) == 3
        with pytest.raises(ConfigError, match="does not hold here"):
            asking(pipeline)
    with Pipeline.load({**config(weights, tmp_path / "c.json", content, on_mismatch="full"), **asked}) as pipeline:
        assert len(pipeline.plan.exits) == 3
        assert asking(pipeline).answered_by == "all"
        assert [exit_.name for exit_ in pipeline.plan.exits] == ["all"]
        assert any("does not hold" in note for note in pipeline.notes)
