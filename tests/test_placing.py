"""What `auto` becomes, why, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from support import shop

from mmpipe import ConfigError, Pipeline, machine, placing
from mmpipe.config import load
from mmpipe.graphs.plan import from_json, to_json
from mmpipe.lowering import Lowering
from mmpipe.placing import resolve
from mmpipe.resolved import Choice
from mmpipe.runtime.device import HostDevice
from mmpipe.runtime.measure import expected_seconds, leaving
from mmpipe.tuned import Best, Tuned


def configured(weights, **runtime):
    return load({**shop.config(weights, shop.EXITS), "runtime": runtime})


def cut_of(pipeline):
    return pipeline.runners.cut


def test_every_choice_has_a_reason(pipeline):
    resolved = pipeline.resolved
    assert set(resolved.reasons) >= {"device", "dtype", "backend", "schedule", "batch_size", "lanes", "threads"}
    assert all(resolved.reasons.values())
    assert sum(resolved.memory.values()) <= resolved.memory_limit


def test_the_plan_that_users_see_is_scheduled_and_can_be_written_down(pipeline):
    plan = pipeline.plan
    assert [s.stages for s in plan.stage_plans] == [(0,), (1,), (2,)]
    assert from_json(to_json(plan)) == plan


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused_before_models_are_loaded(weights):
    said = []
    config = {**shop.config(weights, shop.EXITS), "runtime": {"device": "cuda:1"}}
    with pytest.raises(ConfigError, match=r"runtime\.device: cuda:1: .* sees no CUDA devices") as caught:
        Pipeline.load(config, say=said.append)
    assert caught.value.exit_code == 2
    assert said == []


def test_too_little_memory_is_refused_with_figures(weights):
    with pytest.raises(ConfigError, match=r"runtime\.memory_limit") as caught:
        Pipeline.load({**shop.config(weights, shop.EXITS), "runtime": {"memory_limit": "1MB"}})
    text = str(caught.value)
    for part in ("1.0 MB are not enough", "1 row a bucket need", "weights", "workspaces", "media"):
        assert part in text
    with pytest.raises(ConfigError, match="512 rows a bucket need"):
        Pipeline.load({**shop.config(weights, shop.EXITS), "runtime": {"memory_limit": "50MB", "batch_size": 512}})


def test_less_memory_makes_smaller_buckets_and_the_same_answers(weights, tmp_path):
    media = shop.media(tmp_path, 24)
    plain = {**shop.config(weights, shop.EXITS)}
    with Pipeline.load(plain) as large:
        samples = list(large.find(media).samples)
        want = [(p.label, p.answered_by) for p in large.predict(samples)]
        needed = sum(large.resolved.memory.values()) - large.resolved.memory["decoding"]
    sizes = set()
    for share in (1.2, 0.7, 0.45):
        limit = int(needed * share * 4 / 3)  # a quarter is kept for decoding
        with Pipeline.load({**plain, "runtime": {"memory_limit": f"{limit}B"}}) as small:
            assert [(p.label, p.answered_by) for p in small.predict(samples)] == want
            assert sum(small.resolved.memory.values()) <= limit
            sizes.add((small.resolved.batch_size, small.resolved.lanes, small.resolved.slots))
    assert len(sizes) > 1


def timed(asked, **seconds):
    """A measurement that knows what it will find."""

    def measure(way):
        asked.append((way.schedule, way.threads, way.batch_size))
        return seconds.get(f"{way.schedule}_{way.threads}", seconds[way.schedule])

    return measure


def test_a_call_takes_what_was_measured_to_be_fastest(pipeline, weights, monkeypatch):
    config, cut, host = configured(weights), pipeline.runners.cut, HostDevice()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    asked = []
    fast = resolve(config, cut, host, "call", measure=timed(asked, parallel=0.010, cascade=0.020))
    assert (fast.schedule, fast.streams, fast.batch_size) == ("parallel", "parallel", 1)
    assert "parallel, parallel, 1 x 1 threads: 10.0 ms" in fast.reasons["schedule"]
    assert "cascade, caller, 1 x 4 threads: 20.0 ms" in fast.reasons["schedule"]
    assert set(asked) == {("cascade", 4, 1), ("cascade", 1, 1), ("parallel", 1, 1)}
    slow = resolve(config, cut, host, "call", measure=timed([], parallel=0.021, cascade=0.022, cascade_1=0.020))
    assert (slow.schedule, slow.streams, slow.threads) == ("cascade", "caller", 1)
    monkeypatch.setattr("mmpipe.placing._NUMBERS_FOR_THREADS", 10)  # now it is a large graph
    asked.clear()
    resolve(config, cut, host, "call", measure=timed(asked, parallel=0.021, cascade=0.020))
    assert set(asked) == {("cascade", 4, 1), ("parallel", 1, 1)}


def test_the_time_to_an_answer_counts_where_samples_leave():
    assert expected_seconds([1.0, 2.0, 6.0], [1, 0, 0]) == 1.0
    assert expected_seconds([1.0, 2.0, 6.0], [30, 50, 20]) == pytest.approx(0.3 + 1.0 + 1.2)
    assert expected_seconds([1.0, 2.0, 6.0], None) == 3.0  # not known: as many at each
    assert expected_seconds([5.0], None) == 5.0


def test_short_jobs_wait_for_no_measurement(pipeline, weights, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    config, cut, asked = configured(weights, processes=1), pipeline.runners.cut, []
    small = resolve(config, cut, HostDevice(), measure=timed(asked), rows=5000)
    assert (small.schedule, small.streams, small.lanes, small.threads) == ("cascade", "lanes", 3, 1)
    monkeypatch.setattr("mmpipe.placing._NUMBERS_FOR_THREADS", 10)
    large = resolve(config, cut, HostDevice(), measure=timed(asked), rows=5000)
    assert (large.schedule, large.streams, large.lanes, large.threads) == ("cascade", "caller", 1, 3)
    assert asked == []


def test_a_long_job_takes_what_was_measured_to_be_fastest(pipeline, weights, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(20)), raising=False)
    config, cut, host, asked = configured(weights, processes=1), pipeline.runners.cut, HostDevice(), []
    measure = timed(asked, cascade=0.3, cascade_2=0.1, parallel=0.2)
    chosen = resolve(config, cut, host, measure=measure, rows=200_000)
    assert (chosen.schedule, chosen.streams, chosen.lanes, chosen.threads) == ("cascade", "lanes", 8, 2)
    assert asked == [("cascade", 1, 32), ("cascade", 20, 32), ("cascade", 2, 32), ("parallel", 1, 32)]
    assert "cascade, lanes, 8 x 2 threads: 100.0 ms" in chosen.reasons["threads"]
    configured_so = resolve(
        configured(weights, schedule="cascade", processes=1), cut, host, measure=measure, rows=200_000
    )
    assert (configured_so.threads, configured_so.reasons["schedule"]) == (2, "configured")


def test_a_job_of_many_samples_has_a_process_for_each_core(pipeline, weights, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)), raising=False)
    cut, asked = pipeline.runners.cut, []
    many = resolve(configured(weights), cut, HostDevice(), measure=timed(asked), rows=512)
    assert (many.processes, many.streams, many.lanes, many.threads, many.decode_workers) == (4, "caller", 1, 1, 1)
    assert many.reasons["processes"].startswith("one for each of 4 cores")
    assert asked == []
    one = resolve(configured(weights), cut, HostDevice(), rows=511)
    assert (one.processes, one.reasons["processes"][:11]) == (1, "511 samples")
    assert sum(many.memory.values()) - sum(one.memory.values()) > 0
    assert many.memory["slots"] == 4 * many.slots * one.memory["slots"] // one.slots
    assert resolve(configured(weights), cut, HostDevice(), "call", rows=512).processes == 1
    few = resolve(configured(weights, processes=3), cut, HostDevice(), rows=1)
    assert (few.processes, few.threads, few.reasons["processes"]) == (3, 1, "configured")


def test_large_encoders_have_smaller_buckets_where_each_process_has_one_thread(pipeline, weights, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr(placing, "_NUMBERS_FOR_THREADS", 0)  # these are large

    def found(rows, **runtime):
        way = resolve(configured(weights, **runtime), pipeline.runners.cut, HostDevice(), rows=rows)
        return way.processes, way.batch_size

    assert [found(255), found(256)] == [(1, 32), (4, 16)]
    assert [found(511, batch_size=32), found(512, batch_size=32)] == [(1, 32), (4, 32)]
    monkeypatch.undo()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert found(512) == (4, 32)


def test_why_a_job_has_one_process(pipeline, weights, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)), raising=False)
    cut = pipeline.runners.cut

    def why(config, **more):
        found = resolve(config, cut, HostDevice(), rows=10_000, **more)
        assert found.processes == 1
        return found.reasons["processes"]

    assert why(configured(weights), alone="somebody looks") == "somebody looks"
    assert why(configured(weights, schedule="parallel")).startswith("runtime.schedule: parallel")
    assert why(configured(weights, decoding="processes")).startswith("runtime.decoding: processes")
    assert why(configured(weights, processes=1)) == "configured"
    least = sum(resolve(configured(weights, processes=1), cut, HostDevice(), rows=10_000).memory.values()) // 2
    small = configured(weights, memory_limit=f"{least}B")
    assert why(small).startswith("4 processes do not fit runtime.memory_limit")
    with pytest.raises(ConfigError, match="4 processes do not fit"):
        resolve(configured(weights, memory_limit=f"{least}B", processes=4), cut, HostDevice())
    monkeypatch.setattr("mmpipe.placing.parse_model", lambda model: type("Own", (), {"kind": placing.OWN}))
    assert why(configured(weights)).startswith("image: what your own prepare() holds")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    assert why(configured(weights)) == "one core"


def test_a_compiler_s_own_threads_are_not_forked(pipeline, weights, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)), raising=False)
    compiled = configured(weights, backend="inductor")
    lowering = Lowering(compiled, HostDevice(), Tuned())
    found = resolve(compiled, pipeline.runners.cut, HostDevice(), lowering=lowering, rows=10_000)
    assert (found.processes, found.backend) == (1, "inductor")
    assert found.reasons["processes"].startswith("inductor has threads of its own")
    with pytest.raises(ConfigError, match="inductor has threads of its own"):
        resolve(
            configured(weights, backend="inductor", processes=2), pipeline.runners.cut, HostDevice(), lowering=lowering
        )


@pytest.mark.parametrize(("apart", "processes"), [(None, 1), (1.0, 4), (2.4, 1)])
def test_what_was_tuned_has_to_beat_a_process_for_each_core(pipeline, weights, monkeypatch, apart, processes):
    """`apart`: seconds of a row on one thread, without a compiler; None: it was not measured."""
    inductor, plain = Choice("inductor", "float32"), Choice("eager", "float32")

    def best(self, module, rows, threads):
        if threads > 1:
            return Best(inductor, 0.45, 0.54, plain, 0.0)
        return None if apart is None else Best(inductor, 0.9, apart, plain, 0.0)

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr(placing, "_NUMBERS_FOR_THREADS", 0)  # these are large
    monkeypatch.setattr(Tuned, "best", best)
    monkeypatch.setattr(Lowering, "_made", lambda *anything: None)
    lowering = Lowering(configured(weights), HostDevice(), Tuned())
    found = resolve(configured(weights), pipeline.runners.cut, HostDevice(), lowering=lowering, rows=10_000)
    assert found.processes == processes
    if processes == 1:
        assert found.backend == "inductor"
        assert "inductor has threads of its own" in found.reasons["processes"]
    else:
        assert found.backend == "eager"
        if apart is not None:
            assert "image@0 not inductor, which needs one process for all cores" in found.reasons["backend"]


def test_a_container_s_share_of_the_cores_is_what_there_is(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    told = tmp_path / "cpu.max"
    monkeypatch.setattr(machine, "_QUOTA", told)
    found = []
    for text in ("max 100000", "250000 100000", "50000 100000", "nonsense"):
        told.write_text(text + "\n", encoding="ascii")
        found.append(machine.cores())
    assert found == [64, 2, 1, 64]


def test_a_job_measures_for_itself_and_no_batch_after_it_changes_the_plan(weights, tmp_path, monkeypatch):
    media = shop.media(tmp_path / "media", 6)
    monkeypatch.setattr("mmpipe.placing._WORTH", 1e9)
    with Pipeline.load(shop.config(weights, shop.EXITS)) as made:
        made.run_folder(media, tmp_path / "out")
        measured, plan = made.resolved, made.plan
        assert min(measured.measured.values()) > 0
        assert len(measured.measured) >= 2
        made.predict(made.find(media).samples)
        made.run_folder(media, tmp_path / "again")
        assert made.resolved is measured
        assert made.plan is plan


def test_a_made_up_gate_lets_the_shares_leave():
    gate = leaving([1.0, 1.0, 2.0], 3)
    assert [int(gate(at, torch.zeros(rows, 2))[2].sum()) for at, rows in ((0, 32), (1, 24), (2, 16))] == [8, 8, 16]
    assert int(leaving(None, 2)(0, torch.zeros(8, 2))[2].sum()) == 4
    assert int(leaving([0.0, 0.0, 5.0], 3)(1, torch.zeros(8, 2))[2].sum()) == 0


def test_a_single_call_is_a_row_of_its_own_and_agrees(weights, tmp_path):
    pipeline = Pipeline.load({**shop.config(weights, shop.EXITS), "runtime": {}})
    samples = list(pipeline.find(shop.media(tmp_path, 12)).samples)
    for sample, want in zip(samples, pipeline.predict(samples), strict=True):
        got = pipeline(**sample.media)
        assert (got.label, got.answered_by, got.used) == (want.label, want.answered_by, want.used)
        assert got.confidence == pytest.approx(want.confidence, abs=1e-5)
    assert pipeline.runners.plan("call").stage_plans[0].rows == 1
    assert pipeline.runners.plan("batch").stage_plans[0].rows == 32
    pipeline.close()


@pytest.mark.parametrize("schedule", ["cascade", "parallel"])
def test_what_is_configured_is_taken(weights, pipeline, schedule):
    resolved = resolve(configured(weights, schedule=schedule, batch_size=8), cut_of(pipeline), HostDevice())
    assert (resolved.schedule, resolved.batch_size) == (schedule, 8)
    assert resolved.reasons["schedule"] == resolved.reasons["batch_size"] == "configured"


def test_the_schedule_changes_no_row(weights, tmp_path):
    """parallel speculates; which rows it computed in vain depends on the clock, and no answer does."""
    media = shop.media(tmp_path, 30)
    found = []
    for schedule in ("cascade", "parallel"):
        config = {**shop.config(weights, shop.EXITS), "runtime": {"schedule": schedule, "batch_size": 8}}
        with Pipeline.load(config) as made:
            samples = list(made.find(media).samples)
            found += [made.predict(samples), made.predict(samples)]
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize(
    ("cores", "available", "rows", "single", "becomes", "why"),
    [
        (16, 10**12, 100_000, False, "processes", "100,000 samples"),
        (16, 10**12, 100_000, True, "threads", "a single call"),
        (4, 10**12, 100_000, False, "threads", "4 cores"),
        (16, 10**12, 100, False, "threads", "2,000 samples"),
        (16, 10**10, 100_000, False, "threads", "would take 6.4 GB"),
    ],
)
def test_processes_decode_long_jobs_on_many_cores_where_there_is_room(cores, available, rows, single, becomes, why):
    decoding, reason = placing._decoding(cores, available, rows, single=single)
    assert decoding == becomes
    assert why in reason


@pytest.mark.parametrize("works", [True, False])
def test_auto_is_a_gpu_where_it_computes(weights, monkeypatch, works):
    class Gpu(HostDevice):
        kind = "cuda"

        def held(self, tensor):
            if not works:
                raise RuntimeError("no kernel image is available for execution on the device")
            return tensor

    monkeypatch.setattr(placing, "cuda_devices", lambda: 1)
    monkeypatch.setattr(placing, "device_for", lambda name: Gpu() if name == "cuda" else HostDevice())
    assert placing.device_of(configured(weights)).kind == ("cuda" if works else "cpu")
    assert placing.device_of(configured(weights, backend="openvino")).kind == "cpu"
    assert placing.device_of(configured(weights, device="cpu")).kind == "cpu"
    with Pipeline.load(shop.config(weights, shop.EXITS, runtime={"device": "cpu"})) as pipeline:
        made = resolve(configured(weights), pipeline.runners.cut, Gpu())
    assert (made.device, made.streams) == ("cuda", "staged")
    assert "a GPU that it can use" in made.reasons["device"]


def test_beside_a_gpu_the_host_computes_on_one_thread(weights):
    host = HostDevice()
    host.kind = "cuda"
    with Pipeline.load(shop.config(weights, shop.EXITS)) as pipeline:
        config = configured(weights, device="cuda")
        ways = [resolve(config, pipeline.runners.cut, host, kind) for kind in ("batch", "call")]
    assert [way.threads for way in ways] == [1, 1]
    assert all("a GPU computes" in way.reasons["threads"] for way in ways)


def test_a_backend_for_gpus_says_so_where_there_is_none(weights, monkeypatch):
    """With `device: auto` too; a GPU that is there is taken."""
    config = configured(weights, backend="tensorrt")
    monkeypatch.setattr(placing, "cuda_devices", lambda: 0)
    with pytest.raises(ConfigError, match="tensorrt computes on an NVIDIA GPU, and PyTorch sees none") as caught:
        placing.device_of(config)
    assert caught.value.path == "runtime.backend"
    gpu = object()
    monkeypatch.setattr(placing, "_gpu", lambda config: gpu)
    assert placing.device_of(config) is gpu
