"""`mmpipe autotune` and `mmpipe bench` as a user meets them, on the quickstart."""

from __future__ import annotations

import json

import pytest
from support.words import mmpipe

pytest.importorskip("onnxruntime", reason="the backend that is tried")
pytest.importorskip("onnxscript", reason="exports for it")

ENCODERS = ("image@0", "text@1", "audio@2")
SMALL = ("--set", "runtime.batch_size=4")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What the commands are given. Without bfloat16, whatever the machine has: half as much to measure."""
    return {"MMPIPE_CACHE": str(tmp_path_factory.mktemp("cache")), "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.fixture(scope="module")
def tuning(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    done = mmpipe("autotune", "quickstart", "--backends", "onnx", "--json", *SMALL, cwd=folder, **cache)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_autotune_prints_what_it_tried_and_what_won(tuning):
    found, told = tuning
    ways = {(one["segment"], one["rows"], one["choice"]["backend"]) for one in found["tried"]}
    assert ways == {(name, 4, backend) for name in ENCODERS for backend in ("eager", "onnx")}
    assert all(one["row_seconds"] > 0 and one["cosine"] > 0.999 and one["why"] == "" for one in found["tried"])
    assert {(one["segment"], one["rows"]) for one in found["best"]} == {(name, 4) for name in ENCODERS}
    assert told.count("ms a row") == len(found["tried"])
    assert "leaked" not in told  # by the process that is used for it


def test_winners_are_kept_and_the_next_pipeline_knows_them(tuning, cache, tmp_path):
    found, _ = tuning
    explained = json.loads(
        mmpipe("explain", "quickstart", "--json", "--limit", 8, *SMALL, cwd=tmp_path, **cache).stdout
    )
    (why,) = (one["why"] for one in explained["autos"] if one["key"] == "runtime.backend")
    told = set()
    for one in found["best"]:  # of several numbers of threads: those that a run over the whole input takes are told of
        used = f"tuned: {one['segment']} {one['choice']['backend']} float32"
        waits = f"{one['segment']} not onnx: 62 rows would save "
        forks = f"{one['segment']} not onnx, which needs one process for all cores"
        if used in why or (one["choice"]["backend"] == "onnx" and (waits in why or forks in why)):
            told.add(one["segment"])
    assert told == set(ENCODERS)


def test_a_backend_that_there_is_none_of_is_exit_code_2(tmp_path):
    done = mmpipe("autotune", "quickstart", "--backends", "onxx", "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert "no backend 'onxx': there are eager, native, inductor, openvino, onnx, tensorrt" in done.stderr
    assert done.stdout == ""


def test_bench_prints_a_line_for_each_variant(tmp_path):
    done = mmpipe("bench", "quickstart", "--limit", 16, "--rounds", 2, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["items"] == 16
    names = [one["name"] for one in found["variants"]]
    assert names[:2] == ["as configured", "without exits"]
    assert "one row a bucket" in names
    for one in found["variants"]:
        assert len(one["seconds"]) == 2
        assert min(one["seconds"]) > 0
        assert min(one["decode_core_seconds"], one["compute_seconds"], one["bound_seconds"]) > 0
    assert list(tmp_path.iterdir()) == []
