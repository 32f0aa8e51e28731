"""The CUDA adapter without a GPU: what it calls exists, runs give the host's bytes on a double of the driver, torch's
race detector finds nothing in what was launched, and segments run on fake tensors of a GPU."""

from __future__ import annotations

import ast
import contextlib
import gc
import inspect
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from support import driver
from support.parts import ORDER, PARTS, batch, captured, fused
from support.running import DEPTH_EXITS, MODALITY_EXITS, Rows, executor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmpipe.errors import MmpipeError
from mmpipe.graphs.cut import cut
from mmpipe.graphs.passes import optimise
from mmpipe.graphs.plan import PRESENCE
from mmpipe.runtime import cuda, lanes
from mmpipe.runtime.cuda import CudaDevice, consecutive, placed, prologue
from mmpipe.runtime.device import HostDevice, device_for
from mmpipe.runtime.streams import Run

LAYOUTS = ["one", "staged", "branches", "parallel"]


# What the adapter calls

CALLS = {
    "torch.cuda.CUDAGraph()",
    "torch.cuda.Event(blocking=)",
    "torch.cuda.Event(enable_timing=, external=)",
    "torch.cuda.Stream(_)",
    "torch.cuda.current_stream(_)",
    "torch.cuda.device_count()",
    "torch.cuda.empty_cache()",
    "torch.cuda.get_device_capability(_)",
    "torch.cuda.get_device_name(_)",
    "torch.cuda.graph_pool_handle()",
    "torch.cuda.mem_get_info(_)",
    "torch.cuda.stream(_)",
    "torch.cuda.synchronize(_)",
    "Event.elapsed_time(_)",
    "Event.query()",
    "Event.record(_)",
    "Event.synchronize()",
    "Stream.query()",  # Event's, by name alone
    "Stream.record_event()",
    "Stream.synchronize()",
    "Stream.wait_event(_)",
    "Stream.wait_stream(_)",
    "CUDAGraph.capture_begin(pool=, capture_error_mode=)",
    "CUDAGraph.capture_end()",
    "CUDAGraph.replay()",
}
CLASSES = ("Event", "Stream", "CUDAGraph")
OURS = {"wait"}  # of CudaStream and CudaEvent; torch's Event has one too, which nothing here calls


def calls_of(source: str) -> set[str]:
    """Every call by a name of torch.cuda, and every call of a method that one of its classes has."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            shape = ", ".join(["_"] * len(node.args) + [f"{keyword.arg}=" for keyword in node.keywords])
            name, method = ast.unparse(node.func), node.func.attr
            if name.startswith("torch.cuda."):
                found.add(f"{name}({shape})")
            elif method not in OURS and not name.startswith("torch."):
                owners = [owner for owner in CLASSES if hasattr(getattr(torch.cuda, owner), method)]
                found |= {f"{owner}.{method}({shape})" for owner in owners}
    return found


def test_the_list_of_what_the_adapter_calls_is_complete():
    assert calls_of(Path(cuda.__file__).read_text()) == CALLS
    assert calls_of("event.wait(s)\nx.ipc_handle()\ntorch.cuda.synchronize(0)") == {
        "Event.ipc_handle()",
        "torch.cuda.synchronize(_)",
    }


@pytest.mark.parametrize("call", sorted(CALLS))
def test_torch_has_it_and_takes_the_arguments(call):
    name, _, rest = call.partition("(")
    function = attrgetter(name.removeprefix("torch.cuda."))(torch.cuda)
    given = [argument for argument in rest.rstrip(")").split(", ") if argument]
    places = [None] * given.count("_")
    if not name.startswith("torch.cuda."):
        places.insert(0, None)  # self
    inspect.signature(function).bind(*places, **{word.rstrip("="): None for word in given if word != "_"})


# Whole runs on the double


@pytest.fixture
def on_double(monkeypatch):
    """Run specs on the double → (outcomes of the runs, its driver, the device)."""

    def run(specs, thresholds, rows, *, runs=2, **placing):
        captured(PARTS)  # before torch's names are the double's
        with driver.double(monkeypatch) as double:
            device = CudaDevice(0)
            runner, _ = executor(specs, thresholds, device=device, **placing)
            with contextlib.closing(runner):
                for buffer in runner.pool.sizes.slot_buffers:
                    double.spare |= double.cells_of(runner.pool.view(0, buffer)[runner.plan.slots])
                outcomes = [runner.run(rows[PRESENCE], Rows(rows)) for _ in range(runs)]
        return outcomes, double, device

    return run


def same(outcome, want):
    """The same answers; and embeddings, of the rows that both have: what is cancelled at once is a matter of time."""
    assert torch.equal(outcome.exit_N, want.exit_N)
    assert torch.equal(outcome.confidence_N, want.confidence_N)
    assert torch.equal(outcome.probabilities_NL, want.probabilities_NL)
    for column, name in enumerate(ORDER):
        both = outcome.embedded_NM[:, column] & want.embedded_NM[:, column]
        if both.any():
            assert torch.equal(outcome.embeddings[name][both], want.embeddings[name][both])


@pytest.mark.parametrize("parallel", [False, True], ids=["cascade", "at once"])
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("specs", "thresholds"), [(MODALITY_EXITS, [2.0, 0.4]), (DEPTH_EXITS, [0.3] * 3)])
def test_runs_give_the_host_s_bytes_and_no_race(specs, thresholds, layout, lanes, parallel, on_double):
    rows = batch(29)
    placing = {"layout": layout, "lanes": lanes, "parallel": parallel}
    host, _ = executor(specs, thresholds, **placing)
    want = host.run(rows[PRESENCE], Rows(rows))
    outcomes, double, device = on_double(specs, thresholds, rows, **placing)
    for outcome in outcomes:
        same(outcome, want)
        if not parallel:
            assert torch.equal(outcome.embedded_NM, want.embedded_NM)
            assert {span.step for span in outcome.spans} == {span.step for span in want.spans}
        assert all(span.start <= span.end for span in outcome.spans)
    assert device.notes == []
    assert (double.replays > 0) is not parallel  # both ways ran: the first run of each work is plain
    assert races(double.trace) == []


def races(trace):
    pytest.importorskip("torch.cuda._sanitizer", reason="torch's race detector is private and may go")
    return driver.races(trace)


def without(trace, index):
    return [*trace[:index], *trace[index + 1 :]]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_each_wait_of_a_plan_is_missed_when_it_is_gone(layout, on_double):
    rows = batch(8)
    rows[PRESENCE][:] = True
    _, double, _ = on_double(MODALITY_EXITS, [2.0, 2.0], rows, runs=1, layout=layout, parallel=True)
    first = next(i for i, item in enumerate(double.trace) if isinstance(item, driver.Launch) and item.stream > 0)
    waits = [i for i, item in enumerate(double.trace) if i > first and getattr(item, "does", "") == "wait"]
    assert len(waits) >= 3
    for index in waits:
        assert races(without(double.trace, index)), double.trace[index]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_graph_is_ordered_against_what_comes_before_and_after_it(layout, on_double):
    """Without the waits of its fork, of its join, or of the launch, there is a race."""
    rows = batch(8)
    rows[PRESENCE][:] = True
    _, double, device = on_double([], [], rows, runs=3, layout=layout)
    assert double.replays == 2
    launch = device._launch.cuda.id
    for stream in {item.stream for item in double.trace if getattr(item, "does", "") == "wait"}:
        kept = [i for i in double.trace if not (getattr(i, "does", "") == "wait" and i.stream == stream)]
        if stream == launch or stream in double.forked:
            assert races(kept), stream


def test_a_run_in_which_a_segment_has_no_rows_goes_the_plain_way(on_double):
    rows = batch(8)
    rows[PRESENCE][:, 1] = False
    _, double, _ = on_double([], [], rows, runs=3)
    assert double.replays == 0


def test_a_capture_that_fails_says_why_and_the_plain_way_stays(on_double, monkeypatch):
    def peeks(self, work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda.Captured, "_fork_and_join", peeks)
    rows = batch(16)
    rows[PRESENCE][:] = True
    outcomes, double, device = on_double([], [], rows, lanes=2, runs=3)
    assert double.replays == 0
    assert device.notes == [
        "stage 0, 8 rows: no CUDA graph: RuntimeError: operation not permitted when stream is capturing"
    ]
    same(outcomes[2], outcomes[0])


def test_a_step_that_fails_while_it_is_captured_leaves_nothing_half_done(monkeypatch):
    captured(PARTS)
    rows = batch(8)
    rows[PRESENCE][:] = True
    with driver.double(monkeypatch) as double:
        device = CudaDevice(0)
        runner, _ = executor([], [], device=device, layout="branches")
        good = runner.works[0][0].steps["text@0"]

        def breaks():
            if double.capturing is not None:
                raise MemoryError("none left")
            good()

        runner.works[0][0].steps["text@0"] = breaks
        want = runner.run(rows[PRESENCE], Rows(rows))
        same(runner.run(rows[PRESENCE], Rows(rows)), want)
        runner.close()
    assert double.capturing is None
    assert device.notes == ["stage 0, 8 rows: no CUDA graph: MemoryError: none left"]
    assert cuda._failed == []  # all streams had joined: the capture itself ended well
    assert gc.isenabled()


def test_torch_s_allocator_is_told_when_a_capture_can_t_be_ended(monkeypatch):
    told = []
    with driver.double(monkeypatch):
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda index, pool: told.append((index, pool)))
        graph, stream, other = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.Stream()
        with pytest.raises(RuntimeError, match="not ended"), cuda.capturing(graph, (0, 7), stream):
            other.wait_event(stream.record_event())
    assert told == [(0, (0, 7))]
    assert cuda._failed.pop() is graph
    assert gc.isenabled()


def test_a_watched_segment_is_in_no_graph(monkeypatch):
    captured(PARTS)
    seen = []
    rows = batch(8)
    rows[PRESENCE][:] = True
    with driver.double(monkeypatch) as double:
        device = CudaDevice(0)
        watch = lanes.Watch((), lambda rows, values: seen.append(list(rows)))
        runner, _ = executor([], [], device=device, watches={"image@0": watch})
        for _ in range(3):
            runner.run(rows[PRESENCE], Rows(rows))
        runner.close()
    assert (double.replays, len(seen)) == (0, 3)
    assert "image@0 watched" in device.notes[0]


def test_a_step_that_fails_fails_its_run_by_name_and_the_next_run_is_whole(on_double, monkeypatch):
    captured(PARTS)
    rows = batch(8)
    rows[PRESENCE][:] = True
    with driver.double(monkeypatch):
        runner, _ = executor([], [], device=CudaDevice(0))
        good = runner.works[0][0].steps["text@0"]

        def breaks():
            raise MemoryError

        runner.works[0][0].steps["text@0"] = breaks
        with pytest.raises(MmpipeError, match="segment text@0 failed: MemoryError: no memory left"):
            runner.run(rows[PRESENCE], Rows(rows))
        runner.works[0][0].steps["text@0"] = good
        assert torch.isfinite(runner.run(rows[PRESENCE], Rows(rows)).confidence_N).all()
        runner.close()


def test_a_stopped_run_gets_no_more_work_and_a_closed_stream_none_at_all(monkeypatch):
    with driver.double(monkeypatch):
        stream, run, did = CudaDevice(0).stream("s", 1), Run(), []
        stream.submit(lambda: did.append(1), run, "a")
        run.cancel()
        stream.submit(lambda: did.append(2), run, "b")
        run.settle()
        assert (did, [span[0] for span in run.spans]) == ([1], ["a"])
        stream.close()
        stream.close()
        with pytest.raises(RuntimeError, match="stream s is closed"):
            stream.submit(lambda: None, Run(), "c")


# Pure parts


@pytest.mark.parametrize(
    ("numbers", "ranges"),
    [([], []), ([4], [(0, 1)]), ([7, 8, 2], [(0, 2), (2, 3)]), ([3, 2, 1], [(0, 1), (1, 2), (2, 3)])],
)
def test_rows_that_follow_one_another_are_one_copy(numbers, ranges):
    assert list(consecutive(numbers)) == ranges


@pytest.mark.parametrize("rows", [[5, 6, 7, 0], [5, 6, 5, 5], [2, 2, 2, 2], [7, 0, 7, 7]])
def test_uploading_is_the_host_s_gathering(rows, monkeypatch):
    table, numbers = torch.randn(8, 3), torch.tensor(rows)
    want, got = torch.empty(4, 3), torch.empty(4, 3)
    HostDevice().upload(want, table, numbers)
    with driver.double(monkeypatch):
        CudaDevice(0).upload(got, table, numbers)
    assert torch.equal(got, want)


def test_the_prologue_is_what_reads_media_and_what_comes_before_it():
    runner, _ = executor([], [], layout="staged")
    assert prologue(runner.plan.stage_plans[0]) == {"in:image@0", "in:text@0", "in:audio@0"}


def test_free_memory_is_the_driver_s_word(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (5, 9) if device == torch.device("cuda", 0) else None
    )
    with driver.double(monkeypatch):
        assert CudaDevice(0).memory_bytes() == 5


@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_without_a_gpu_the_error_says_what_torch_sees(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    index = name.partition(":")[2] or "0"
    with pytest.raises(RuntimeError, match=rf"cuda:{index}: torch 2.*, built .*, sees no CUDA devices"):
        device_for(name)


@pytest.mark.parametrize("name", ["", "tpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0"])
def test_an_unknown_device_is_refused_and_the_known_are_listed(name):
    with pytest.raises(RuntimeError, match="one of cpu, cuda, cuda:N"):
        device_for(name)
    assert device_for("cpu").kind == "cpu"


# Fake tensors of a GPU


@pytest.mark.parametrize("specs", [[], MODALITY_EXITS, DEPTH_EXITS], ids=["none", "modalities", "depths"])
def test_placed_segments_run_on_a_fake_gpu(specs):
    graph = fused(PARTS, specs)
    optimise(graph)
    made, gpu = cut(graph), torch.device("cuda", 0)
    for segment in made.plan.segments:
        module = made.modules[segment.name]
        before = module.code
        targets = [node.target for node in module.graph.nodes if node.op == "get_attr"]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.inference_mode():
            hosts = [attrgetter(target)(module) for target in targets]
            weights = {weight: mode.from_tensor(weight).to(gpu) for weight in hosts}
            values = map(made.plan.value, (*segment.inputs, *segment.reads))
            results = placed(module, gpu, weights)(
                *(torch.empty(8, *v.shape, dtype=v.dtype, device=gpu) for v in values)
            )
        for value, result in zip(map(made.plan.value, segment.writes), results, strict=True):
            assert (result.device, tuple(result.shape), result.dtype) == (gpu, (8, *value.shape), value.dtype)
        assert module.code == before


def test_weights_are_on_the_device_once(monkeypatch):
    graph = fused(PARTS, MODALITY_EXITS)
    optimise(graph)
    module, weights = cut(graph).modules["image@0"], {}
    here = torch.device("cpu")
    one, two = placed(module, here, weights), placed(module, here, weights)
    assert [b.data_ptr() for b in one.buffers()] == [b.data_ptr() for b in two.buffers()]
    pixels = batch(4)["image.pixels"]
    assert torch.equal(one(pixels)[0], module(pixels)[0])


def test_copies_take_tensors_of_a_gpu():
    gpu = torch.device("cuda", 0)
    with FakeTensorMode(), torch.inference_mode():
        table, rows = torch.empty(9, 4, device=gpu), torch.empty(3, dtype=torch.int64, device=gpu)
        bucket, host = torch.empty(3, 4, device=gpu), torch.empty(3, 4)
        lanes.gather(bucket, table, rows)
        lanes.scatter(table, rows, bucket)
        bucket[1:].copy_(bucket[:1].expand_as(bucket[1:]))
        host.copy_(bucket, non_blocking=True)
        bucket.copy_(host, non_blocking=True)
        assert (bucket.device, host.device) == (gpu, torch.device("cpu"))
