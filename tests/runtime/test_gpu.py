"""What only a GPU can show. `make gpu` runs these; without one they are skipped by name."""

from __future__ import annotations

import gc

import pytest
import torch
from support.parts import batch
from support.running import MODALITY_EXITS, Rows, executor

from mmpipe.errors import MmpipeError
from mmpipe.graphs.plan import PRESENCE
from mmpipe.runtime.device import device_for
from mmpipe.runtime.streams import Run

pytestmark = pytest.mark.gpu
LAYOUTS = ["one", "staged", "branches", "parallel"]


def everything(count):
    rows = batch(count)
    rows[PRESENCE][:] = True
    return rows


@pytest.mark.parametrize("parallel", [False, True], ids=["cascade", "at once"])
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpu_answers_as_the_cpu_does(layout, lanes, parallel):
    rows = batch(61)
    placing = {"layout": layout, "lanes": lanes, "parallel": parallel}
    host, _ = executor(MODALITY_EXITS, [2.0, 2.0], **placing)
    want = host.run(rows[PRESENCE], Rows(rows))
    runner, _ = executor(MODALITY_EXITS, [2.0, 2.0], device=device_for("cuda"), **placing)
    for _ in range(3):
        got = runner.run(rows[PRESENCE], Rows(rows))
        assert torch.equal(got.exit_N, want.exit_N)
        assert (got.probabilities_NL - want.probabilities_NL).abs().max() <= 1e-3
        for name, table in want.embeddings.items():
            assert (got.embeddings[name] - table).abs().max() <= 1e-3
    runner.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_graph_replays_to_the_bits_of_the_plain_way(layout):
    rows = everything(64)
    device = device_for("cuda")
    runner, _ = executor([], [], device=device, layout=layout, lanes=2)
    with_graphs = [runner.run(rows[PRESENCE], Rows(rows)) for _ in range(3)][-1]
    assert device.notes == []
    assert all(device.graph_of(work, runner.streams) is not None for works in runner.works for work in works)
    device.graph_of = lambda work, streams: None
    plain = runner.run(rows[PRESENCE], Rows(rows))
    runner.close()
    assert torch.equal(with_graphs.probabilities_NL, plain.probabilities_NL)
    for name, table in plain.embeddings.items():
        assert torch.equal(with_graphs.embeddings[name], table)


def test_streams_overlap():
    """Two kernels that only wait: side by side they take the time of one, and their spans cross."""
    device, run = device_for("cuda"), Run()
    one, two = device.stream("one", 1), device.stream("two", 1)
    for stream in (one, two):
        stream.submit(lambda: torch.cuda._sleep(200_000_000), run, stream.name)
    for stream in (one, two):
        stream.record(run).wait()
    run.settle()
    (_, _, start_1, end_1), (_, _, start_2, end_2) = run.spans
    assert min(end_1, end_2) - max(start_1, start_2) > 0.5 * min(end_1 - start_1, end_2 - start_2)


def test_a_wait_orders_two_streams_and_does_not_hold_the_host():
    device, run = device_for("cuda"), Run()
    first, then = device.stream("first", 1), device.stream("then", 1)
    value = device.allocate(4).zero_()
    torch.cuda.synchronize()
    first.submit(lambda: (torch.cuda._sleep(200_000_000), value.fill_(7)), run, "write")
    written = first.record(run)
    then.wait(written)
    host = device.allocate_host(4)
    then.submit(lambda: device.copy(host, value), run, "read")
    assert not written.done()
    then.record(run).wait()
    assert host.tolist() == [7] * 4


def test_a_failing_segment_ends_its_own_run_alone():
    rows = everything(8)
    runner, _ = executor([], [], device=device_for("cuda"), lanes=2)
    want = runner.run(rows[PRESENCE], Rows(rows))
    good = runner.works[0][0].steps["text@0"]

    def breaks():
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    runner.works[0][0].steps["text@0"] = breaks
    with pytest.raises(MmpipeError, match="segment text@0 failed: OutOfMemoryError"):
        runner.run(rows[PRESENCE], Rows(rows))
    runner.works[0][0].steps["text@0"] = good
    assert torch.equal(runner.run(rows[PRESENCE], Rows(rows)).probabilities_NL, want.probabilities_NL)
    runner.close()
    del runner
    gc.collect()
    torch.cuda.empty_cache()  # fails where torch believes that a capture is underway


def test_an_operation_that_no_capture_allows_leaves_the_plain_way_and_whole_memory():
    rows, device = everything(8), device_for("cuda")
    runner, _ = executor([], [], device=device)
    good = runner.works[0][0].steps["text@0"]

    def peeks():
        good()
        torch.cuda.synchronize()

    runner.works[0][0].steps["text@0"] = peeks
    runs = [runner.run(rows[PRESENCE], Rows(rows)) for _ in range(3)]
    assert "no CUDA graph" in device.notes[0]
    assert torch.equal(runs[0].probabilities_NL, runs[2].probabilities_NL)
    runner.close()
    del runner, device
    gc.collect()
    torch.cuda.empty_cache()  # fails where torch still believes that a capture is underway
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_spans_are_in_the_order_of_the_plan_and_within_the_run():
    rows = everything(32)
    runner, _ = executor([], [], device=device_for("cuda"), layout="branches")
    for _ in range(3):  # plain, captured and replayed
        spans = runner.run(rows[PRESENCE], Rows(rows)).spans
    ends = {(span.run, span.step): span.end for span in spans}
    for span in spans:
        assert 0 <= span.end - span.start < 10
        for name in runner.plan.stage_plans[0].step(span.step).waits:
            assert span.start >= ends[span.run, name] - 1e-3
    runner.close()
