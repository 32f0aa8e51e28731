"""Host streams: order, waits that the host does not feel, failures that stay in their run, an end that is clean."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch

from mmpipe.runtime.streams import HostStream, Run, StepFailed, StreamClosed


@pytest.fixture
def streams():
    made = [HostStream("a"), HostStream("b")]
    yield made
    for stream in made:
        stream.close()


def test_work_on_a_stream_keeps_its_order(streams):
    (one, _), run, seen = streams, Run(), []
    for number in range(100):
        one.submit(lambda number=number: seen.append(number), run, str(number))
    one.synchronize()
    assert seen == list(range(100))
    assert [step for step, *_ in run.spans] == [str(number) for number in range(100)]


def test_a_wait_stops_the_stream_and_not_the_host(streams):
    (one, two), run, seen = streams, Run(), []
    gate = threading.Event()
    one.submit(gate.wait, run, "slow")
    one.submit(lambda: seen.append("first"), run, "first")
    event = one.record(run)
    two.wait(event)
    two.submit(lambda: seen.append("second"), run, "second")
    last = two.record(run)
    assert not event.done()
    assert not last.done()
    gate.set()
    last.wait()
    assert seen == ["first", "second"]
    assert event.done()


def test_a_failure_reaches_the_waiter_and_drops_what_depends_on_it(streams):
    (one, two), run, other, seen = streams, Run(0), Run(1), []

    def fails():
        raise ValueError("no such shape")

    one.submit(fails, run, "image@0")
    event = one.record(run)
    two.wait(event)
    two.submit(lambda: seen.append("dependent"), run, "head@0")
    end = two.record(run)
    two.submit(lambda: seen.append("other lane"), other, "head@0")
    two.record(other).wait()
    for mark in (event, end):
        with pytest.raises(StepFailed, match=r"image@0 failed: ValueError: no such shape") as caught:
            mark.wait()
        assert isinstance(caught.value.__cause__, ValueError)
    assert seen == ["other lane"]


def test_cancelling_drops_what_has_not_begun_only(streams):
    (one, _), run, seen = streams, Run(), []
    begun, gate = threading.Event(), threading.Event()

    def slow():
        begun.set()
        gate.wait()
        seen.append("begun")

    one.submit(slow, run, "slow")
    one.submit(lambda: seen.append("not begun"), run, "next")
    event = one.record(run)
    begun.wait()
    run.cancel()
    gate.set()
    event.wait()
    assert seen == ["begun"]


def test_a_worker_infers_without_autocast_on_its_own_number_of_threads():
    before = torch.get_num_threads()
    stream, seen = HostStream("threads", threads=1), []

    def look():
        cast = torch.is_autocast_enabled("cpu")
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), cast, torch.get_num_threads()))

    with torch.autocast("cpu", torch.bfloat16):
        stream.submit(look, Run(), "look")
        stream.synchronize()
    stream.close()
    assert seen == [(True, False, False, 1)]
    assert torch.get_num_threads() == before


def test_closing_ends_what_is_there_and_the_thread():
    stream, seen = HostStream("short"), []
    stream.submit(lambda: time.sleep(0.02), Run(), "slow")
    stream.submit(lambda: seen.append("done"), Run(), "done")
    stream.close()
    stream.close()
    assert seen == ["done"]
    assert not any(thread.name == "mmpipe-stream-short" for thread in threading.enumerate())
    with pytest.raises(StreamClosed, match="stream short is closed"):
        stream.submit(print, Run(), "late")


def test_what_was_worked_on_is_not_kept_alive():
    stream = HostStream("forgetful")
    tensor = torch.zeros(4)
    still_there = weakref.ref(tensor)
    run = Run()
    stream.submit(tensor.sum, run, "sum")
    while not run.spans:  # no other task comes after it
        time.sleep(0.001)
    del tensor
    time.sleep(0.01)
    gc.collect()
    assert still_there() is None
    stream.close()
