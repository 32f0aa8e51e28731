"""Which number type small encoders have: measured once on a machine; a calibration's own, where there is one."""

from __future__ import annotations

import json
import time

import pytest
import torch
from support import shop

from mmpipe import ConfigError, Pipeline, machine, number_types, parity
from mmpipe.calibrated import Calibration, mismatch
from mmpipe.graphs.backends import Unlowerable
from mmpipe.resolved import Choice
from mmpipe.tuned import Best, Tuned

ENCODERS = ("image", "text", "audio")


@pytest.fixture
def multiplies(monkeypatch):
    """A processor that multiplies bfloat16, whatever this one does."""
    monkeypatch.setattr(machine, "bfloat16_gain", lambda: 4.0)


@pytest.fixture
def measured(monkeypatch, multiplies):
    """Short jobs measure; of what is measured, pictures are faster in bfloat16. → how often each was."""
    asked = []

    def faster(plan, encoders, threads, real):
        asked.extend(encoders)
        of = {branch: "bfloat16" if branch == "image" else "float32" for branch in encoders}
        return [(module, of[branch]) for branch, segments in encoders.items() for module in segments.values()]

    monkeypatch.setattr(number_types, "faster", faster)
    monkeypatch.setattr(number_types, "LEAST_ROWS", 6)
    return asked


@pytest.fixture
def samples(pipeline, tmp_path):
    return pipeline.find(shop.media(tmp_path / "media", 24)).samples


def types(pipeline):
    return dict(pipeline.dtypes)


# --- measuring --------------------------------------------------------------------------------------------------------


def two_ways(plain, short, *, turned=0.0, refuses=False):
    """In the place of `lower`: what takes so many milliseconds for a bucket, and turns what it returns in bfloat16."""

    def lower(backend, segment, module, target, examples=()):
        if refuses and target.dtype == torch.bfloat16:
            raise Unlowerable("it refuses")

        def run(*inputs):
            time.sleep((plain if target.dtype == torch.float32 else short) / 1e3)
            value = torch.ones(target.rows, 2)
            value[:, 0] += turned * (target.dtype == torch.bfloat16)
            return (value,)

        return run

    return lower


@pytest.mark.parametrize(
    ("lower", "becomes"),
    [
        (two_ways(20, 5), "bfloat16"),
        (two_ways(20, 18), "float32"),  # another time it could be the other way
        (two_ways(20, 5, turned=1.0), "float32"),  # not at parity
        (two_ways(20, 5, turned=float("nan")), "float32"),
        (two_ways(20, 5, refuses=True), "float32"),
        (two_ways(0, 0, refuses=True), "float32"),  # nothing to gain: not tried
    ],
)
def test_bfloat16_has_to_be_surely_faster_and_at_parity(pipeline, monkeypatch, lower, becomes):
    monkeypatch.setattr(number_types, "lower", lower)
    segment = next(s for s in pipeline.plan.segments if s.branch == "audio" and len(s.writes) == 1)
    made = {"audio": {segment: pipeline.modules[segment.name]}}
    assert number_types.faster(pipeline.plan, made, 1, {}) == [(pipeline.modules[segment.name], becomes)]


def test_it_is_measured_for_real_and_an_odd_row_is_passed_over(pipeline, samples, multiplies):
    made = pipeline.runners.lowering.undecided(pipeline.runners.cut)
    assert set(made) == set(ENCODERS)
    real = parity.real_rows(samples, pipeline.built.preparations, pipeline.limits)
    real["image.photo"][1] = torch.zeros(3)
    (segment,) = (one for one in made["image"] if "image.photo" in one.inputs)
    assert parity.bucket(pipeline.plan, segment, 8, real)[1] == 3
    found = number_types.faster(pipeline.plan, made, 1, real)
    assert len(found) == sum(map(len, made.values()))
    assert {dtype for _, dtype in found} <= {"float32", "bfloat16"}


def test_an_encoder_that_an_exit_parts_has_one_type(weights, measured, samples):
    exits = [{"after": "text.layer1", "threshold": 0.9}]
    with Pipeline.load(shop.config(weights, exits)) as pipeline:
        assert sum(segment.branch == "text" for segment in pipeline.plan.segments) == 2
        lowering, made = pipeline.runners.lowering, pipeline.runners.cut
        first, rest = lowering.undecided(made)["text"].values()
        lowering.tuned.keep_dtypes([(first, "bfloat16")])
        assert "text" in lowering.undecided(made)
        lowering.tuned.keep_dtypes([(rest, "float32")])
        assert "text" not in lowering.undecided(made)
        assert lowering._eager(made, "text").dtype == "float32"


def test_a_long_job_measures_once_and_all_kinds_of_runs_have_what_it_found(weights, cache, measured, samples):
    with Pipeline.load(shop.config(weights, shop.EXITS)) as pipeline:
        pipeline.settle(samples[:5])  # not long enough
        assert (measured, pipeline.resolved.dtype) == ([], "float32")
    with Pipeline.load(shop.config(weights, shop.EXITS)) as pipeline:
        pipeline.settle(samples)
        assert sorted(measured) == sorted(ENCODERS)
        assert types(pipeline) == {"image": "bfloat16", "text": "float32", "audio": "float32"}
        assert pipeline.runners.resolved("call").dtype == "bfloat16"
        assert len(pipeline.predict(samples)) == 24
    with Pipeline.load(shop.config(weights, shop.EXITS)) as pipeline:  # another process, a short job: it is known
        assert pipeline.resolved.dtype == "bfloat16"
        pipeline.settle(samples)
    assert len(measured) == 3


def test_where_nothing_is_kept_the_job_itself_knows(weights, measured, samples):
    with Pipeline.load(shop.config(weights)) as pipeline:
        pipeline.settle(samples)
        assert types(pipeline)["image"] == "bfloat16"


@pytest.mark.parametrize(("key", "value"), [("dtype", "float32"), ("dtype", "bfloat16"), ("backend", "inductor")])
def test_what_is_configured_is_not_measured(weights, measured, samples, monkeypatch, key, value):
    with Pipeline.load(shop.config(weights, runtime={key: value})) as pipeline:
        assert pipeline.runners.lowering.undecided(pipeline.runners.cut) == {}
    monkeypatch.setattr(machine, "bfloat16_gain", lambda: 0.0)
    with Pipeline.load(shop.config(weights)) as pipeline:
        pipeline.settle(samples)
        assert (measured, pipeline.resolved.dtype) == ([], "float32")


def test_types_and_winners_are_kept_side_by_side(pipeline, tmp_path):
    (module, *_) = pipeline.modules.values()
    best = Best(Choice("inductor", "float32"), 1e-3, 2e-3, Choice("eager", "float32"), 1.0)
    tuned = Tuned(tmp_path)
    assert tuned.dtype(module) is None
    tuned.keep_dtypes([(module, "bfloat16")])
    other = Tuned(tmp_path)
    assert not other.entries
    path = Tuned(tmp_path).keep([(module, 8, 1, best)])
    other.keep_dtypes([(module, "bfloat16")])  # what another wrote meanwhile stays
    again = Tuned(tmp_path)
    assert (again.dtype(module), again.best(module, 8, 1)) == ("bfloat16", best)
    for broken in ('{"version": 1, "types": 3}', '{"version": 1, "types": {}}', "?"):
        path.write_text(broken)
        assert Tuned(tmp_path).dtype(module) is None
    written = {"version": 1, "types": {Tuned(tmp_path)._digest(module): "float8"}}
    path.write_text(json.dumps(written))
    assert Tuned(tmp_path).dtype(module) is None


# --- calibrations -----------------------------------------------------------------------------------------------------


def calibrated(weights, path, core, dtype, dtypes, **fusion):
    content = {
        "version": 1,
        "made_by": "mmpipe",
        "labels": shop.LABELS,
        "binds_to": {"model": core, "dtype": dtype, "backends": ["eager"], "dtypes": dtypes},
        "confidence": "max_probability",
        "exits": [{"after": ["audio"], "threshold": 0.05, "temperature": 1.0, "answered": 0.5}],
        "full_temperature": 1.0,
        "promise": {"max_disagreement": 0.02, "certainty": 0.9, "items_learn": 4, "items_test": 6, "observed": 0.0},
        "expected": None,
        "accuracy": None,
    }
    path.write_text(json.dumps(content))
    written = shop.config(weights, shop.EXITS)
    return {**written, "fusion": {**written["fusion"], "calibration": str(path), **fusion}}


def test_auto_is_what_the_calibration_was_made_with(weights, cache, measured, samples, tmp_path):
    with Pipeline.load(shop.config(weights)) as pipeline:
        core = pipeline.built.core
        pipeline.settle(samples)  # from here on pictures are bfloat16, where nothing says otherwise
        assert types(pipeline)["image"] == "bfloat16"
    measured.clear()
    with Pipeline.load(calibrated(weights, tmp_path / "c.json", core, "float32", {})) as pipeline:
        pipeline.settle(samples)
        assert set(types(pipeline).values()) == {"float32"}
        assert pipeline.resolved.reasons["dtype"] == "the calibration is of float32"
    of = {"image": "float32", "text": "bfloat16", "audio": "float32"}
    with Pipeline.load(calibrated(weights, tmp_path / "c.json", core, "bfloat16", of)) as pipeline:
        pipeline.settle(samples)
        assert types(pipeline) == of
    assert not measured


def test_a_winner_of_autotune_does_not_undo_a_calibration(weights, cache, multiplies, tmp_path, monkeypatch):
    with Pipeline.load(shop.config(weights)) as pipeline:
        core = pipeline.built.core
    best = Best(Choice("eager", "bfloat16"), 1e-3, 2e-3, Choice("eager", "float32"), 0.0)
    monkeypatch.setattr(Tuned, "best", lambda *_: best)
    with Pipeline.load(shop.config(weights)) as pipeline:
        assert set(types(pipeline).values()) == {"bfloat16"}
    with Pipeline.load(calibrated(weights, tmp_path / "c.json", core, "float32", {})) as pipeline:
        assert set(types(pipeline).values()) == {"float32"}
        assert (
            "not eager bfloat16, which was fastest: the calibration is of another"
            in pipeline.resolved.reasons["backend"]
        )


def test_a_type_that_this_processor_does_not_multiply_is_a_mismatch(weights, tmp_path, core, monkeypatch):
    monkeypatch.setattr(machine, "bfloat16_gain", lambda: 0.0)
    written = calibrated(weights, tmp_path / "c.json", core, "bfloat16", dict.fromkeys(ENCODERS, "bfloat16"))
    with pytest.raises(ConfigError, match="numbers of type bfloat16, and these are float32"):
        Pipeline.load(written)


def test_a_file_that_names_no_encoder_s_type_does_not_follow_what_was_measured(
    weights, cache, measured, samples, core, tmp_path
):
    with Pipeline.load(shop.config(weights)) as pipeline:
        pipeline.settle(samples)
    for dtypes in ({}, {"image": "bfloat16+float32"}):
        with pytest.raises(ConfigError, match="numbers of type bfloat16, and these are float32"):
            Pipeline.load(calibrated(weights, tmp_path / "c.json", core, "bfloat16", dtypes))


@pytest.fixture(scope="module")
def core(pipeline):
    return pipeline.built.core


def test_each_encoder_s_type_counts():
    binds = {"model": "m", "dtype": "bfloat16", "backends": ["eager"], "dtypes": {"image": "bfloat16"}}
    made = {"version": 1, "made_by": "", "labels": ["a"], "binds_to": binds, "confidence": "margin", "exits": []}
    found = Calibration.model_validate(
        {**made, "full_temperature": 1.0, "promise": None, "expected": None, "accuracy": None}
    )
    same = {"model": "m", "dtype": "bfloat16", "backends": ["eager"]}
    assert mismatch(found, **same, dtypes={"image": "bfloat16", "text": "float32"}) is None  # of text it says nothing
    why = mismatch(found, **same, dtypes={"image": "float32", "text": "bfloat16"})
    assert why == "it was made with image in bfloat16, and here it is float32"
