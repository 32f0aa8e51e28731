"""Ways that are tried in another process: what is found there, and what becomes of it when it dies."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch
from support import compilers, shop

from mmpipe import Pipeline
from mmpipe.graphs import backends, parcel
from mmpipe.graphs.backends import Target, examples_of
from mmpipe.graphs.digest import digest
from mmpipe.graphs.fuse import mark_of
from mmpipe.graphs.precision import lowered
from mmpipe.resolved import PLAIN, Choice
from mmpipe.trying import Trial, Workbench

ROWS = 4


@pytest.fixture(scope="module")
def segments(weights):
    """Name → (segment, module, examples) of the small encoders and heads, and of an encoder that is a user's own."""
    found = {}
    for config in (shop.config(weights, shop.EXITS), "custom"):
        with Pipeline.load(config) as pipeline:
            for segment in pipeline.plan.segments:
                examples = examples_of(pipeline.plan, segment, ROWS)
                found[f"{segment.name} of {len(found)}"] = segment, pipeline.modules[segment.name], examples
    return found


@pytest.fixture(scope="module")
def trial(segments):
    segment, module, examples = segments["image@0 of 0"]
    return Trial.of(segment, module, examples, real=2, threads=1, folder=None, seconds=0.0)


def children():
    return [process for process in multiprocessing.active_children() if process.name == "mmpipe autotune"]


# --- as bytes ---------------------------------------------------------------------------------------------------------


def test_a_module_as_bytes_and_back_is_the_same_module(segments):
    for segment, module, examples in segments.values():
        again = parcel.unwrap(parcel.wrap(module))
        assert digest(again) == digest(module)
        assert [node.name for node in again.graph.nodes] == [node.name for node in module.graph.nodes]
        assert all(
            mark_of(one) == mark_of(other) for one, other in zip(again.graph.nodes, module.graph.nodes, strict=True)
        )
        for dtype in (torch.float32, torch.bfloat16):  # what is done next depends on the marks
            assert digest(lowered(again, dtype)) == digest(lowered(module, dtype))
        target = Target(ROWS)
        with torch.inference_mode():
            found, wanted = (
                backends.lower("eager", segment, one, target, examples)(*examples) for one in (again, module)
            )
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_weights_that_are_one_tensor_stay_one(segments):
    _, module, _ = segments["image@0 of 0"]
    names = [str(node.target) for node in module.graph.nodes if node.op == "get_attr"]
    plain = sum(module.get_buffer(name).nbytes for name in dict.fromkeys(names))
    assert plain < len(parcel.wrap(module)) < 1.3 * plain + 200_000


# --- in another process -----------------------------------------------------------------------------------------------


def test_a_way_is_measured_and_the_process_ends_with_the_bench(trial):
    with Workbench(backends.lower) as bench:
        found = bench.measure(trial, PLAIN)
        short = bench.measure(trial, Choice("eager", "bfloat16"))
        (child,) = children()
    assert (found.why, short.why) == ("", "")
    assert found.cosine == pytest.approx(1.0, abs=1e-6)
    assert 0.99 < short.cosine < 1.0
    assert min(found.row_seconds, short.row_seconds, found.compile_seconds) > 0
    assert children() == []
    with pytest.raises(ValueError, match="closed"):
        child.is_alive()


def test_whatever_a_compiler_does_to_its_process_is_an_answer(trial, capfd):
    with Workbench(compilers.crashing) as bench:
        assert bench.measure(trial, Choice("openvino", "float32")).why == "it crashed (signal 11)"
        assert bench.measure(trial, PLAIN).why == ""  # in a new process
        assert bench.measure(trial, Choice("tensorrt", "float32")).why == "RuntimeError: out of luck"
        assert bench.measure(trial, Choice("onnx", "float32")).why == "its process ended with code 3"
        assert bench.measure(trial, PLAIN).why == ""
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "tensorrt: nothing works\n")  # results are alone on standard output


def test_what_was_compiled_may_crash_too(trial):
    with Workbench(compilers.crashing_when_run) as bench:
        assert bench.measure(trial, Choice("openvino", "float32")).why == "it crashed (signal 11)"


def test_a_compiler_that_never_ends_is_given_up(trial):
    with Workbench(compilers.crashing, limit_s=60.0) as bench:
        assert bench.measure(trial, PLAIN).why == ""  # the process has started
        bench.limit_s = 0.5
        began = time.monotonic()
        assert bench.measure(trial, Choice("inductor", "float32")).why == "it did not end within 0.5 s"
        assert time.monotonic() - began < 10
        assert children() == []
        bench.limit_s = 60.0
        assert bench.measure(trial, PLAIN).why == ""
