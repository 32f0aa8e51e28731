"""Streams and events: work in order on each stream, order between streams only where it waits.

    Run          one lane's run: what fails or is cancelled stops its own later work, and no other run's
    HostStream   a worker thread with a FIFO, with CUDA's semantics: a wait stops the stream, not the host
    CallerStream the same without a thread, for plans of one stream
    HostEvent    a mark in a stream

`mmpipe.runtime.cuda` has the same three names over the driver's. Nothing else in mmpipe orders or synchronises device
work. A CPU run goes through host streams, so that the order of every plan is exercised for real on any machine.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], object]
Took = tuple[str, str, float, float]  # step, stream, start, end


class StepFailed(Exception):
    """A step of a run failed; `step` names it, `__cause__` is why."""

    def __init__(self, step: str, cause: BaseException) -> None:
        self.step = step
        super().__init__(f"{step} failed: {type(cause).__name__}: {cause}")
        self.__cause__ = cause


class StreamClosed(RuntimeError):
    """Work was given to a stream that has been closed."""


class Run:
    """One run in one lane. Streams ask it before each step; the first failure is kept.

    `spans`: (step, stream, start, end) of what ran, seconds of time.perf_counter. `timers`: spans that a device with a
    clock of its own can tell once the run has ended; `settle` asks them.
    """

    def __init__(self, lane: int = 0) -> None:
        self.lane = lane
        self.failed: StepFailed | None = None
        self.cancelled = False
        self.spans: list[Took] = []
        self.timers: list[Callable[[], Took]] = []

    @property
    def stopped(self) -> bool:
        """Whether what has not begun is to be skipped."""
        return self.cancelled or self.failed is not None

    def cancel(self) -> None:
        """Drop the work that has not begun. What runs, ends."""
        self.cancelled = True

    def settle(self) -> None:
        """The run has ended: its spans are complete, in the order of their end."""
        if self.timers:
            self.spans = sorted((timer() for timer in self.timers), key=lambda span: span[3])

    def fail(self, step: str, cause: BaseException) -> None:
        if self.failed is None:
            self.failed = StepFailed(step, cause)


class Event(Protocol):
    """A mark in a stream: there when all that was submitted before it has ended or been dropped."""

    def done(self) -> bool: ...

    def wait(self) -> None:
        """The host waits. Raises StepFailed where a step of the event's run failed."""


class Stream(Protocol):
    """A FIFO of work. Everything but `synchronize` and `close` returns at once."""

    name: str
    at_work: int  # of the host's cores, which it computes on now, beside whoever submits

    def submit(self, work: Work, run: Run, step: str) -> None: ...

    def record(self, run: Run) -> Event: ...

    def wait(self, event: Event) -> None:
        """What is submitted after this begins when the event is there. The host goes on."""

    def synchronize(self) -> None:
        """The host waits until the stream is empty."""

    def close(self) -> None:
        """End what is there, then the stream. May be called again."""


class HostEvent:
    """See Event."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._there = threading.Event()

    def done(self) -> bool:
        return self._there.is_set()

    def wait(self) -> None:
        self._there.wait()
        if self.run.failed is not None:
            raise self.run.failed

    def pause(self, seconds: float) -> None:
        """The host waits, but no longer than this."""
        self._there.wait(seconds)

    def mark(self) -> None:
        self._there.set()

    def block(self) -> None:
        """A stream's wait: a failure is the run's matter, and its own steps will see it."""
        self._there.wait()


class HostStream:
    """A worker thread with a FIFO. It computes with `threads` threads, in inference mode, autocast off: a new thread
    begins with gradients on and another's number of threads."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self.name, self.threads, self.at_work = name, threads, 0
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._closed = False
        self._worker = threading.Thread(
            target=_work, args=(self._queue, threads), name=f"mmpipe-stream-{name}", daemon=True
        )
        self._worker.start()

    def submit(self, work: Work, run: Run, step: str) -> None:
        def do() -> None:
            if not run.stopped:
                self.at_work = self.threads
                _do(work, run, step, self.name)
                self.at_work = 0

        self._put(do)

    def record(self, run: Run) -> HostEvent:
        event = HostEvent(run)
        self._put(event.mark)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, HostEvent)
        self._put(event.block)

    def synchronize(self) -> None:
        if not self._closed:
            self.record(Run()).wait()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        if self._worker is not threading.current_thread():
            self._worker.join()

    def _put(self, work: Work) -> None:
        if self._closed:
            raise StreamClosed(f"stream {self.name} is closed")
        self._queue.put(work)


class CallerStream:
    """No thread: work is done as it is submitted, by whoever submits it. For plans of one stream, where a thread of its
    own would only add the handing over; threads and inference mode are the caller's."""

    def __init__(self, name: str) -> None:
        self.name, self.at_work = name, 0
        self._closed = False

    def submit(self, work: Work, run: Run, step: str) -> None:
        if self._closed:
            raise StreamClosed(f"stream {self.name} is closed")
        if not run.stopped:
            _do(work, run, step, self.name)

    def record(self, run: Run) -> HostEvent:
        event = HostEvent(run)
        event.mark()
        return event

    def wait(self, event: Event) -> None:
        assert event.done(), "one stream: what comes before has been done"

    def synchronize(self) -> None:
        return

    def close(self) -> None:
        self._closed = True


def _do(work: Work, run: Run, step: str, stream: str) -> None:
    start = time.perf_counter()
    try:
        work()
    except Exception as error:  # noqa: BLE001 - the waiter raises it
        run.fail(step, error)
    run.spans.append((step, stream, start, time.perf_counter()))


def _work(tasks: queue.SimpleQueue[Work | None], threads: int) -> None:
    """The worker's life. It holds the queue alone, so that a stream that nobody holds can be ended."""
    torch.get_num_threads()  # else the first operation would set the number again, to what another thread has
    torch.set_num_threads(threads)
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        while (task := tasks.get()) is not None:
            task()
            del task  # else the last one's tensors live until the next comes
