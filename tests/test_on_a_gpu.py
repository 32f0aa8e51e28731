"""Whole pipelines on a GPU, held against the CPU's answers. `make gpu` runs these; without one they are skipped."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet
import pytest
from support import hub, shop

from mmpipe import Pipeline, lowering

pytestmark = pytest.mark.gpu
COUNT = 43  # five full buckets of 8, and one that is filled up
COMPILED = ("open_clip", "bert", "clap")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return hub.Models(tmp_path_factory.mktemp("models"))


def embedded(models, family, samples, **runtime):
    """Embeddings, and what every `auto` became; on the GPU run three times: plainly, captured and replayed."""
    modality = hub.FAMILIES[family]
    section = {**hub.section(models, family), **({"max_tokens": 32} if modality == "text" else {})}
    made = {"task": "embed", "encoders": {modality: section}, "runtime": {"batch_size": 8, "cache": "off", **runtime}}
    with Pipeline.load(made) as pipeline:
        runs = [pipeline.embed(samples) for _ in range(3 if runtime["device"] == "cuda" else 1)]
        assert pipeline.runners.device.notes == []
        assert pipeline.runners.lowering.refused == {}
        resolved = pipeline.resolved
    for run in runs[1:]:
        assert np.array_equal(run, runs[0])
    return runs[0], resolved


def compared(models, family, least, **runtime):
    """The least cosine between what the GPU says and the CPU's float32 is as asked for; each row has its own bytes."""
    modality = hub.FAMILIES[family]
    samples = [{modality: medium} for medium in hub.media_of(modality, COUNT)]
    wanted, _ = embedded(models, family, samples, device="cpu", dtype="float32")
    got, resolved = embedded(models, family, samples, device="cuda", **runtime)
    cosine = (wanted * got).sum(1)
    print(f"{family} {runtime}: 1 - cosine {1 - cosine.min():.1e}")  # noqa: T201
    assert cosine.min() > least
    order = np.random.default_rng(0).permutation(len(samples))
    again, _ = embedded(models, family, [samples[n] for n in order], device="cuda", **runtime)
    assert np.array_equal(again, got[order])
    return resolved


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.99999), ("bfloat16", 0.999)])
@pytest.mark.parametrize("family", hub.FAMILIES)
def test_an_encoder_says_what_it_says_on_the_cpu(models, family, dtype, least):
    assert compared(models, family, least, dtype=dtype).dtype == dtype


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.99999), ("bfloat16", 0.999)])
@pytest.mark.parametrize("family", COMPILED)
def test_inductor_compiles_for_the_gpu(models, family, dtype, least):
    pytest.importorskip("triton")
    resolved = compared(models, family, least, dtype=dtype, backend="inductor")
    assert (resolved.dtype, resolved.backend) == (dtype, "inductor")


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.99999), ("bfloat16", 0.999)])
@pytest.mark.parametrize("family", COMPILED)
def test_tensorrt_runs_its_engines(models, family, dtype, least, tmp_path, monkeypatch):
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("MMPIPE_CACHE", str(tmp_path))
    resolved = compared(models, family, least, dtype=dtype, backend="tensorrt")
    assert (resolved.dtype, resolved.backend) == (dtype, "tensorrt")


def test_the_demo_answers_as_on_the_cpu():
    answers = {}
    for device in ("cpu", "cuda"):
        with Pipeline.load("quickstart", overrides=[f"runtime.device={device}", "runtime.cache=off"]) as pipeline:
            samples = pipeline.find().samples
            answers[device] = pipeline.predict(samples)
            alone = pipeline(**samples[0].media)
            assert alone.label == answers[device][0].label
    for one, other in zip(answers["cpu"], answers["cuda"], strict=True):
        assert (one.id, one.status, one.label, one.answered_by) == (
            other.id,
            other.status,
            other.label,
            other.answered_by,
        )
        assert one.label is None or one.confidence == pytest.approx(other.confidence, abs=1e-3)


@pytest.mark.parametrize("schedule", ["cascade", "parallel"])
def test_a_folder_job_writes_the_rows_that_the_cpu_writes(tmp_path, schedule):
    rows = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        changes = [
            f"runtime.device={device}",
            "runtime.cache=off",
            f"runtime.schedule={schedule}",
            "output.shard_rows=16",
        ]
        with Pipeline.load("quickstart", overrides=changes) as pipeline:
            pipeline.run_folder(output=out)
        columns = ["id", "status", "label", "answered_by", "used", "skipped", "failed"]
        rows[device] = pyarrow.parquet.read_table(out / "predictions", columns=columns).to_pylist()
    assert rows["cuda"] == rows["cpu"]


def test_large_encoders_are_bfloat16_and_pass_the_gate(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(lowering, "LARGE_NUMBERS", 1000)
    config = shop.config(weights, shop.EXITS, runtime={"device": "cuda", "cache": "off"})
    with Pipeline.load(config) as pipeline:
        pipeline.predict(pipeline.find(shop.media(tmp_path)).samples)
        gain = pipeline.runners.device.bfloat16_gain()
        assert pipeline.resolved.dtype == ("bfloat16" if gain >= 1.3 else "float32")
        assert pipeline.runners.shift is not None or gain < 1.3
