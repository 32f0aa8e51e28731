"""Number types and backends: what is chosen, that the gate guards it, and that the answers hold."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support import hub, shop
from support.lowering import native_here

from mmpipe import ConfigError, Pipeline, lowering, machine, parity, runners
from mmpipe.graphs import backends, cost
from mmpipe.graphs.backends import Unlowerable, kernels
from mmpipe.parity import Shift
from mmpipe.resolved import PLAIN


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return hub.Models(tmp_path_factory.mktemp("models"))


def embedded(section, modality, samples, **runtime):
    made = {"task": "embed", "encoders": {modality: section}, "runtime": {"batch_size": 8, "cache": "off", **runtime}}
    with Pipeline.load(made) as pipeline:
        return pipeline.embed(samples), pipeline.resolved


@pytest.mark.parametrize("name", hub.FAMILIES)
def test_every_family_in_bfloat16_keeps_its_embeddings_and_each_row_its_bytes(models, name):
    modality = hub.FAMILIES[name]
    section = {**hub.section(models, name), **({"max_tokens": 32} if modality == "text" else {})}
    samples = [{modality: medium} for medium in hub.media_of(modality, 11)]
    plain, _ = embedded(section, modality, samples, dtype="float32")
    short, resolved = embedded(section, modality, samples, dtype="bfloat16")
    assert resolved.dtype == "bfloat16"
    assert (plain * short).sum(1).min() > 0.999
    assert np.abs(plain - short).max() > 0  # it did compute in another type
    order = np.random.default_rng(0).permutation(len(samples))
    again, _ = embedded(section, modality, [samples[n] for n in order], dtype="bfloat16")
    assert np.array_equal(again, short[order])


def test_small_models_stay_float32(pipeline):
    assert (pipeline.resolved.dtype, pipeline.resolved.backend, pipeline.resolved.segments) == ("float32", "eager", {})


@pytest.mark.parametrize(("gain", "becomes"), [(0.0, "float32"), (1.1, "float32"), (4.0, "bfloat16")])
def test_auto_is_bfloat16_for_large_encoders_where_it_is_faster(weights, monkeypatch, gain, becomes):
    monkeypatch.setattr(machine, "bfloat16_gain", lambda: gain)
    monkeypatch.setattr(lowering, "LARGE_NUMBERS", 1000)
    with Pipeline.load(shop.config(weights)) as pipeline:
        assert pipeline.resolved.dtype == becomes
        assert set(pipeline.resolved.segments) == (set() if becomes == "float32" else {"image@0", "text@0", "audio@0"})
        assert PLAIN not in pipeline.resolved.segments.values()
        assert pipeline.resolved.reasons["dtype"]


def test_hidden_instructions_are_not_used(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    machine.bfloat16_gain.cache_clear()
    assert machine.bfloat16_gain() == 0.0
    machine.bfloat16_gain.cache_clear()


# --- the parity gate --------------------------------------------------------------------------------------------------


def spoiled(monkeypatch, branch, change):
    """Spoil what a branch is lowered to."""
    whole = lowering.lower

    def lower(backend, segment, module, target, examples=()):
        run = whole(backend, segment, module, target, examples)
        if segment.branch != branch or target.dtype == torch.float32:
            return run
        return lambda *tensors: tuple(change(result) for result in run(*tensors))

    monkeypatch.setattr(lowering, "lower", lower)


def test_an_encoder_that_turns_too_far_stays_float32(weights, tmp_path, monkeypatch):
    spoiled(monkeypatch, "image", lambda result: result.flip(-1))
    folder = shop.media(tmp_path / "media", 12)
    made = shop.config(weights, runtime={"batch_size": 8, "dtype": "bfloat16"})
    with Pipeline.load(made) as pipeline, Pipeline.load(shop.config(weights)) as plain:
        samples = list(pipeline.find(folder).samples)
        answers, wanted = pipeline.predict(samples), plain.predict(samples)
        assert set(pipeline.resolved.segments) == {"text@0", "audio@0"}
        assert "image stays float32: cosine" in pipeline.resolved.reasons["dtype"]
        assert [one.label for one in answers] == [one.label for one in wanted]


def test_not_a_number_does_not_pass(weights, tmp_path, monkeypatch):
    spoiled(monkeypatch, "text", lambda result: result * float("nan"))
    folder = shop.media(tmp_path / "media", 12)
    with Pipeline.load(shop.config(weights, runtime={"batch_size": 8, "dtype": "bfloat16"})) as pipeline:
        pipeline.predict(pipeline.find(folder).samples)
        assert "text@0" not in pipeline.resolved.segments


def test_the_gate_looks_at_answers_too():
    assert Shift({"image": 1.0}, confidence=0.01, flipped=0, rows=4).ok
    assert not Shift({"image": 1.0}, confidence=0.2, flipped=0, rows=4).ok
    assert not Shift({"image": 1.0}, confidence=0.0, flipped=1, rows=4).ok
    assert not Shift({"image": float("nan")}, confidence=0.0, flipped=0, rows=4).ok


def test_media_that_cannot_be_read_do_not_stop_the_gate(weights, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with Pipeline.load(shop.config(weights, runtime={"batch_size": 8, "dtype": "bfloat16"})) as pipeline:
        (answer,) = pipeline.predict([{"image": str(tmp_path / "a.jpg"), "text": "a red mug"}])
        assert answer.status == "partial"
        found = parity.real_rows(pipeline.find(shop.media(tmp_path / "m", 9)).samples, pipeline.built.preparations,
                                 pipeline.limits)  # fmt: skip
        assert {name: len(rows) for name, rows in found.items() if name.startswith("image")} == {"image.photo": 4}


# --- backends ---------------------------------------------------------------------------------------------------------


def test_a_backend_that_is_configured_and_can_not_is_an_error(weights, monkeypatch):
    def refuse(*arguments):
        raise Unlowerable("inductor needs a C++ compiler")

    monkeypatch.setattr(lowering, "lower", refuse)
    with (
        Pipeline.load(shop.config(weights, runtime={"backend": "inductor"})) as pipeline,
        pytest.raises(ConfigError, match=r"runtime\.backend: inductor needs a C\+\+ compiler"),
    ):
        pipeline(text="a red mug")


def test_what_segments_may_take_inside_fits_the_limit(weights, monkeypatch):
    targets, lower = {}, lowering.lower

    def seen(backend, segment, module, target, examples=()):
        targets[segment.name] = target
        return lower(backend, segment, module, target, examples)

    monkeypatch.setattr(lowering, "lower", seen)
    runtime = {"memory_limit": "1GB", "dtype": "bfloat16", "batch_size": 8, "cache": "off"}
    with Pipeline.load(shop.config(weights, shop.EXITS, runtime=runtime)) as pipeline:
        pipeline.predict([{"id": "1", "text": "a mug"}])
        way, segments = pipeline.resolved, pipeline.plan.segments
    encoders = [segment.name for segment in segments if segment.branch != "head"]
    inside = sum(way.lanes * targets[name].memory for name in encoders)
    rest = sum(size for name, size in way.memory.items() if name != "workspaces")
    assert 0.99e9 < inside + rest <= way.memory_limit == 1_000_000_000


def test_packed_copies_count_as_weights(weights):
    counted = {}
    for dtype in ("float32", "bfloat16"):
        with Pipeline.load(shop.config(weights, runtime={"dtype": dtype})) as pipeline:
            counted[dtype] = pipeline.resolved.memory["weights"]
            encoders = [m for name, m in pipeline.modules.items() if not name.startswith("head")]
    copies = sum(cost.weight_bytes([module]) // 2 for module in encoders)
    assert counted["bfloat16"] - counted["float32"] == copies > 0


def test_auto_stays_float32_where_packed_copies_do_not_fit(weights, monkeypatch):
    """Copies that nobody asked for are no reason to refuse a pipeline."""
    monkeypatch.setattr(machine, "bfloat16_gain", lambda: 5.0)
    monkeypatch.setattr(lowering, "LARGE_NUMBERS", 0)
    copied = lowering.Lowering.copied_bytes
    monkeypatch.setattr(lowering.Lowering, "copied_bytes", lambda self, made: 10**6 * copied(self, made))
    for limit in ("1GB", "auto"):
        with Pipeline.load(shop.config(weights, runtime={"memory_limit": limit, "cache": "off"})) as pipeline:
            assert pipeline.resolved.dtype == "float32"
            assert "do not fit runtime.memory_limit" in pipeline.resolved.reasons["dtype"]
            assert pipeline.predict([{"id": "1", "text": "a mug"}])[0].label is not None
    with pytest.raises(ConfigError, match="are not enough"):
        Pipeline.load(shop.config(weights, runtime={"memory_limit": "1GB", "dtype": "bfloat16"}))


@pytest.fixture
def attentive(models, monkeypatch):
    """A text encoder with attention that counts as large, on a processor that could; what was loaded, from where."""
    loaded = []
    monkeypatch.setattr(machine, "bfloat16_gain", lambda: 4.0)
    monkeypatch.setattr(lowering, "LARGE_NUMBERS", 1000)
    monkeypatch.setattr(lowering, "_LEAST_SAVED_S", 0.0)
    monkeypatch.setattr(kernels, "why_not", lambda: "")
    monkeypatch.setattr(kernels, "ready", lambda folder: False)
    monkeypatch.setattr(kernels, "load", loaded.append)
    with Pipeline.load({"task": "embed", "encoders": {"text": hub.section(models, "minilm")}}) as pipeline:
        yield pipeline, loaded


def chosen(pipeline, job_rows):
    made = pipeline.runners.lowering.choose(pipeline.runners.cut, 32, 2, job_rows)
    return made.segments["text@0"].backend, made.reasons["backend"], made.more_from


def test_attention_is_compiled_where_a_job_wins_it_back(attentive):
    pipeline, loaded = attentive
    assert loaded == []
    backend, why, pays_from = chosen(pipeline, 0)
    assert backend == "eager"
    assert "not native: 0 rows would save 0.0 s, compiling takes 2 s, once" in why
    assert chosen(pipeline, pays_from - 1)[0] == "eager"
    assert loaded == []
    backend, why, pays_from = chosen(pipeline, pays_from)
    assert (backend, pays_from) == ("native", None)
    assert "native: attention, MLPs and norms compiled for this processor" in why
    assert len(loaded) == 1


def test_where_attention_of_our_own_would_save_next_to_nothing_it_is_not_asked_for(attentive, monkeypatch):
    pipeline, loaded = attentive
    monkeypatch.setattr(lowering, "_LEAST_SAVED_S", 1.0)  # of a row; the fixture asks for nothing
    monkeypatch.setattr(kernels, "ready", lambda folder: True)
    backend, why, pays_from = chosen(pipeline, 1_000_000)
    assert (backend, pays_from) == ("eager", None)
    assert "native" not in why
    assert loaded == []


def test_a_way_that_a_later_job_takes_goes_through_the_gate_too(attentive, monkeypatch):
    pipeline, _ = attentive
    gates, shift = [], runners.Runners._shift

    def seen(self, kind, real):
        gates.append((kind, self.resolved(kind).segments["text@0"].backend))
        return Shift({"text": 1.0}, 0.0, 0, 4) if gates[-1][1] == "native" else shift(self, kind, real)

    monkeypatch.setattr(runners.Runners, "_shift", seen)
    monkeypatch.setattr(lowering, "lower", lambda backend, *rest: backends.lower("eager", *rest))
    pipeline(text="red oak desk")
    monkeypatch.setattr(kernels, "SECONDS", 1e-9)
    assert len(pipeline.embed([])) == 0  # decides nothing
    pipeline.embed([{"text": "red oak desk"}, {"text": "a chair"}])
    pipeline.embed([{"text": "red oak desk"}])
    assert gates == [("call", "eager"), ("batch", "native")]


def test_calls_stay_as_they_were_where_native_is_not_at_parity(attentive, monkeypatch):
    pipeline, _ = attentive
    refused = Shift({"text": 0.5}, 0.0, 0, 4)
    monkeypatch.setattr(lowering, "lower", lambda backend, *rest: backends.lower("eager", *rest))
    shift = runners.Runners._shift
    monkeypatch.setattr(
        runners.Runners,
        "_shift",
        lambda self, kind, real: refused if self.resolved(kind).backend == "native" else shift(self, kind, real),
    )
    pipeline(text="red oak desk")
    assert pipeline.runners.resolved("call").backend == "eager"
    monkeypatch.setattr(kernels, "ready", lambda folder: True)
    pipeline.runners._calls = pipeline.runners.resolved("call").more_from
    for _ in range(3):
        pipeline(text="red oak desk")
        assert pipeline.runners.resolved("call").backend == "eager"


def test_an_encoder_that_makes_no_numbers_does_not_hold_the_gate_for_ever(attentive, monkeypatch):
    """NaN is far from float32's NaN too: once there is nothing left to refuse of it, the others are."""
    pipeline, _ = attentive
    gates = []

    def seen(self, kind, real):
        gates.append(set(self.resolved(kind).segments))
        return Shift({"another": float("nan")}, 0.0, 0, 4)

    monkeypatch.setattr(runners.Runners, "_shift", seen)
    monkeypatch.setattr(kernels, "ready", lambda folder: True)
    monkeypatch.setattr(lowering, "lower", lambda backend, *rest: backends.lower("eager", *rest))
    pipeline(text="red oak desk")
    assert len(gates) <= 3
    assert not pipeline.runners.resolved("call").segments


def test_what_the_gate_refused_needs_no_memory(attentive, monkeypatch):
    pipeline, _ = attentive
    shift = runners.Runners._shift

    def refusing(self, kind, real):
        found = shift(self, kind, real)  # lowers what it compares
        return Shift({"text": 0.5}, 0.0, 0, 4) if self.resolved(kind).segments else found

    monkeypatch.setattr(kernels, "ready", lambda folder: True)
    monkeypatch.setattr(lowering, "lower", lambda backend, *rest: backends.lower("eager", *rest))
    monkeypatch.setattr(runners.Runners, "_shift", refusing)
    pipeline.embed([{"text": "red oak desk"}])
    choices = {key[1] for key in pipeline.runners.lowering._kept}
    assert choices <= {*pipeline.runners.resolved("batch").segments.values(), PLAIN}


def test_an_edited_graph_goes_through_the_gate_again(attentive, monkeypatch):
    pipeline, _ = attentive
    gates, shift = [], runners.Runners._shift
    monkeypatch.setattr(kernels, "ready", lambda folder: True)
    monkeypatch.setattr(lowering, "lower", lambda backend, *rest: backends.lower("eager", *rest))
    monkeypatch.setattr(runners.Runners, "_shift", lambda self, *given: gates.append(1) or shift(self, *given))
    for expected in (1, 1):
        pipeline(text="red oak desk")
        assert len(gates) == expected
    pipeline.graph.recompile()
    pipeline(text="red oak desk")
    assert len(gates) == 2


def test_attention_that_was_compiled_before_is_used_by_any_job(attentive, monkeypatch):
    pipeline, _ = attentive
    monkeypatch.setattr(kernels, "ready", lambda folder: True)
    assert chosen(pipeline, 0)[0] == "native"


def test_attention_that_can_not_be_had_is_pytorchs_and_explained(attentive, monkeypatch):
    pipeline, _ = attentive
    monkeypatch.setattr(kernels, "why_not", lambda: "this processor has no AMX")
    assert chosen(pipeline, 100) == ("eager", "not native: this processor has no AMX", None)
    monkeypatch.setattr(kernels, "why_not", lambda: "")

    def refuse(folder):
        raise Unlowerable("it needs GCC once")

    monkeypatch.setattr(kernels, "load", refuse)
    monkeypatch.setattr(kernels, "SECONDS", 1e-9)
    assert chosen(pipeline, 100) == ("eager", "not native: it needs GCC once", None)


@native_here
def test_native_leaves_what_it_has_nothing_for_to_eager(weights, monkeypatch):
    monkeypatch.setattr(machine, "bfloat16_gain", lambda: 4.0)
    monkeypatch.setattr(lowering, "LARGE_NUMBERS", 1000)
    with Pipeline.load(shop.config(weights, runtime={"backend": "native"})) as pipeline:
        backends_of = {name: choice.backend for name, choice in pipeline.resolved.segments.items()}
        assert backends_of == {"image@0": "eager", "text@0": "native", "audio@0": "eager"}
        assert "eager where there is nothing for it in bfloat16" in pipeline.resolved.reasons["backend"]


def test_a_backend_that_was_asked_for_and_computes_nothing_is_noted(weights, tmp_path):
    with Pipeline.load(shop.config(weights, runtime={"backend": "native"})) as pipeline:
        pipeline.run_folder(shop.media(tmp_path / "media", 3), tmp_path / "out")
    notes = json.loads((tmp_path / "out/run.json").read_text())["notes"]
    assert "runtime.backend: native computes nothing here, eager does: configured; eager where there is" in str(notes)


@native_here
def test_native_gives_the_answers_of_eager(models):
    section, media = hub.section(models, "clip"), [{"image": one} for one in hub.media_of("image", 11)]
    ways = [embedded(section, "image", media, dtype="bfloat16", backend=backend) for backend in ("eager", "native")]
    (plain, _), (own, resolved) = ways
    assert resolved.backend == "native"
    assert (plain * own).sum(1).min() > 0.9999
    assert np.abs(plain - own).max() > 0
