"""CUDA: the same names as the host's, over the driver's. Thin: order comes from the plan, memory from the pool.

    CudaStream, CudaEvent   torch.cuda's; work is enqueued as it is submitted, on the thread that submits it
    CudaDevice              memory, copies, and a graph for each (stage plan, lane) where one can be captured
    Captured                such a graph: all steps but those that read media, whose rows the host chooses

**A CUDA error is sticky**: after one, every call fails, and what is in flight is lost. It leaves `CudaEvent.wait`, or
whatever meets it first, as torch's RuntimeError; the process ends, and a resumed job goes on from what was committed.
Memory that ran out and Python's errors are not: they fail their run alone, as on the host.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils.weak import WeakTensorKeyDictionary

from mmpipe.graphs.order import before, members
from mmpipe.graphs.plan import StagePlan
from mmpipe.runtime.device import TIMES
from mmpipe.runtime.streams import Event, Run, Stream
from mmpipe.runtime.streams import Work as Job

if TYPE_CHECKING:
    from mmpipe.runtime.lanes import Work


_HAS_BFLOAT16 = (8, 0)  # compute capability
_PRODUCT = 2048  # rows and columns
_CALLS = 10  # that are timed as one graph


class CudaEvent:
    """See streams.Event. A host that waits sleeps: the core is the decoders'."""

    def __init__(self, run: Run, stream: torch.cuda.Stream) -> None:
        self.run = run
        self.cuda = torch.cuda.Event(blocking=True)
        self.cuda.record(stream)

    def done(self) -> bool:
        return bool(self.cuda.query())

    def wait(self) -> None:
        """The host waits. StepFailed as on the host; RuntimeError, torch's own, once the driver has given up."""
        self.cuda.synchronize()
        if self.run.failed is not None:
            raise self.run.failed


class CudaStream:
    """See streams.Stream. `submit` runs its work at once, which enqueues kernels: `cancel` stops what isn't submitted.

    Spans are the device's own times: a pair of timing events around each step, read when the run has ended. Their zero
    is taken whenever the host has waited for the stream.
    """

    def __init__(self, name: str, cuda: torch.cuda.Stream) -> None:
        self.name, self.cuda, self.at_work = name, cuda, 0
        self._closed = False
        self.synchronize()

    def submit(self, work: Job, run: Run, step: str) -> None:
        self._open()
        if run.stopped:
            return
        began, ended = timing(), timing()
        try:
            with torch.inference_mode(), torch.autocast("cuda", enabled=False), torch.cuda.stream(self.cuda):
                began.record(self.cuda)
                work()
                ended.record(self.cuda)
        except Exception as error:  # noqa: BLE001 - the waiter raises it
            run.fail(step, error)
        else:
            run.timers.append(partial(self.span, step, self.name, began, ended))

    def record(self, run: Run) -> CudaEvent:
        self._open()
        return CudaEvent(run, self.cuda)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._open()
        self.cuda.wait_event(event.cuda)

    def synchronize(self) -> None:
        self._zero = timing()
        self._zero.record(self.cuda)
        self.cuda.synchronize()
        self._zero_at = time.perf_counter()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.cuda.synchronize()

    def span(
        self, step: str, stream: str, began: torch.cuda.Event, ended: torch.cuda.Event
    ) -> tuple[str, str, float, float]:
        """(step, stream, start, end) of two timing events that are there, in seconds of time.perf_counter."""
        start = self._zero_at + self._zero.elapsed_time(began) / 1000
        return step, stream, start, start + began.elapsed_time(ended) / 1000

    def _open(self) -> None:
        if self._closed:
            raise RuntimeError(f"stream {self.name} is closed")


def timing(*, external: bool = False) -> torch.cuda.Event:
    """An event that says when. `external`: recorded anew by each replay of the graph that it was captured into."""
    return torch.cuda.Event(enable_timing=True, external=external)


class CudaDevice:
    """One NVIDIA GPU. RuntimeError where torch sees no such."""

    kind = "cuda"

    def __init__(self, index: int = 0) -> None:
        if not index < torch.cuda.device_count():
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            seen = torch.cuda.device_count() or "no"
            raise RuntimeError(f"cuda:{index}: torch {torch.__version__}, {built}, sees {seen} CUDA devices")
        self.device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(index)
        self.notes: list[str] = []
        self._gain: float | None = None
        # the host's → the device's: segments, and plans of other buckets, share them
        self._weights: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
        # Replays go one after the other: a run's head may read slots that the run before it wrote.
        self._launch = CudaStream("graph", torch.cuda.Stream(self.device))
        self._graph_memory: dict[int, torch.cuda._POOL_HANDLE] = {}  # lane → that of its graphs alone
        self._warm: WeakSet[Work] = WeakSet()
        self._graphs: WeakKeyDictionary[Work, Captured | None] = WeakKeyDictionary()

    def stream(self, name: str, threads: int) -> CudaStream:
        """`threads` are the host's matter. What the current stream holds, such as weights, comes before all of it."""
        cuda = torch.cuda.Stream(self.device)
        cuda.wait_stream(torch.cuda.current_stream(self.device))
        return CudaStream(name, cuda)

    def allocate(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def allocate_host(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def memory_bytes(self) -> int:
        """Bytes that are free now, whoever else uses the device."""
        return torch.cuda.mem_get_info(self.device)[0]

    def place(self, module: fx.GraphModule) -> fx.GraphModule:
        return placed(module, self.device, self._weights)

    def held(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def bfloat16_gain(self) -> float:
        """Float32 is as it is set up: with TF32 where somebody has allowed it."""
        if self._gain is None:
            self._gain = 0.0
            if torch.cuda.get_device_capability(self.device) >= _HAS_BFLOAT16:
                seconds = []
                for dtype in (torch.float32, torch.bfloat16):
                    one, other = (self.held(torch.randn(_PRODUCT, _PRODUCT).to(dtype)) for _ in range(2))
                    seconds.append(self.seconds(partial(torch.mm, one, other)))
                self._gain = seconds[0] / seconds[1]
        return self._gain

    def seconds(self, call: Callable[[], Tensor]) -> float:
        graph, (began, ended) = torch.cuda.CUDAGraph(), (timing(), timing())
        with torch.inference_mode():
            call()
            with capturing(graph, torch.cuda.graph_pool_handle(), self._launch.cuda):
                for _ in range(_CALLS):
                    call()
            taken: list[float] = []
            for _ in range(TIMES // _CALLS):
                with torch.cuda.stream(self._launch.cuda):
                    began.record(self._launch.cuda)
                    graph.replay()
                    ended.record(self._launch.cuda)
                ended.synchronize()
                taken.append(began.elapsed_time(ended) / 1e3 / _CALLS)
        return min(taken)

    def near(self, numbers: Tensor) -> Tensor:
        return self.allocate(numbers.nbytes).view(numbers.dtype).reshape(numbers.shape)

    def upload(self, bucket: Tensor, table: Tensor, rows: Tensor) -> None:
        """Rows that follow one another in the table go in one copy; those that fill the bucket up, on the device."""
        numbers = rows.tolist()
        count = next((i for i in range(1, len(numbers)) if numbers[i] == numbers[0]), len(numbers))
        for start, stop in consecutive(numbers[:count]):
            source = table[numbers[start] : numbers[start] + stop - start]
            bucket[start:stop].copy_(source, non_blocking=True)
        if count < len(numbers):
            bucket[count:].copy_(bucket[:1].expand_as(bucket[count:]))

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def graph_of(self, work: Work, streams: Mapping[str, Stream]) -> Captured | None:
        """Asked before each run of a work that could be one graph. The first run warms up (libraries load, workspaces
        are made: no capture allows that), the second captures. Where that fails, `notes` say why."""
        if work not in self._warm:
            self._warm.add(work)
        elif work not in self._graphs:
            self._graphs[work] = self._capture(work, streams)
        return self._graphs.get(work)

    def _capture(self, work: Work, streams: Mapping[str, Stream]) -> Captured | None:
        try:
            if work.watches:
                raise ValueError(f"{', '.join(work.watches)} watched: each run delivers tensors of its own")
            pool = self._graph_memory.setdefault(work.lane, torch.cuda.graph_pool_handle())
            return Captured(work, streams, self._launch, pool)
        except Exception as error:  # noqa: BLE001 - whatever it is, the plain way is there
            note = f"{work.stage_plan.name}: no CUDA graph: {first_cause(error)}"
            if note not in self.notes:  # of another lane
                self.notes.append(note)
            return None


class Captured:
    """The steps of one stage plan in one lane as one CUDA graph, but for its prologue.

    Captured by fork and join: the launching stream begins, each stream of the plan joins by waiting for it, steps wait
    for one another as planned, and the end waits for all. `replay` puts it where the steps would have been: after all
    that the plan's streams hold, and before what they get next. Only a stream that holds copies in and nothing else of
    the graph goes on at once, so that the next run's media are uploaded while this one computes.
    """

    def __init__(
        self, work: Work, streams: Mapping[str, Stream], launch: CudaStream, pool: torch.cuda._POOL_HANDLE
    ) -> None:
        self.prologue = prologue(work.stage_plan)
        self._streams = {name: _cuda(streams[name]) for name in work.stage_plan.streams}
        self._launch = launch
        self._steps = [step for step in work.stage_plan.steps if step.name not in self.prologue]
        self._after = dict.fromkeys(step.stream for step in self._steps if step.does != "in")
        self._timers = {step.name: (timing(external=True), timing(external=True)) for step in self._steps}
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.autocast("cuda", enabled=False), capturing(self._graph, pool, launch.cuda):
            self._fork_and_join(work.steps)

    def replay(self, run: Run) -> dict[str, Event]:
        """Launch it: the events of its steps, all of them there when it has ended."""
        for stream in self._streams.values():
            self._launch.wait(stream.record(run))
        if not run.stopped:  # by its prologue
            with torch.cuda.stream(self._launch.cuda):
                self._graph.replay()
            for step in self._steps:
                run.timers.append(partial(self._launch.span, step.name, step.stream, *self._timers[step.name]))
        ended = self._launch.record(run)
        for name in self._after:
            self._streams[name].wait(ended)
        return {step.name: ended for step in self._steps if step.records}

    def _fork_and_join(self, work: Mapping[str, Callable[[], None]]) -> None:
        root = self._launch.cuda
        fork = root.record_event()
        joined: dict[str, torch.cuda.Stream] = {}
        ended: dict[str, torch.cuda.Event] = {}
        try:
            for step in self._steps:
                stream = self._streams[step.stream].cuda
                if step.stream not in joined:
                    joined[step.stream] = stream
                    stream.wait_event(fork)
                for name in step.waits:
                    if name in ended:  # else the prologue's, which the launch waits for
                        stream.wait_event(ended[name])
                began_at, ended_at = self._timers[step.name]
                with torch.cuda.stream(stream):
                    began_at.record(stream)
                    work[step.name]()
                    ended_at.record(stream)
                if step.records:
                    ended[step.name] = stream.record_event()
        finally:  # with a stream that has not joined, no capture ends
            for stream in joined.values():
                root.wait_event(stream.record_event())


_one_capture = threading.Lock()
_failed: list[torch.cuda.CUDAGraph] = []  # torch's allocators may still ask them whether they are being captured


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: torch.cuda._POOL_HANDLE, stream: torch.cuda.Stream) -> Iterator[None]:
    """What is enqueued on `stream`, and on what forks from it, becomes the graph; other threads go on.

    As torch.cuda.graph, which does not clean up after a capture that an operation has ended which none allows: torch's
    allocator would believe in it for ever, and the first attempt to give memory back would end the process. Nor does
    Python collect garbage meanwhile: what that may free, no capture allows.
    """
    with _one_capture:
        torch.cuda.synchronize(stream.device)
        torch.cuda.empty_cache()  # the graph's memory is its own
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    yield
                finally:
                    _end(graph, pool, stream)
        finally:
            if collects:
                gc.enable()


def _end(graph: torch.cuda.CUDAGraph, pool: torch.cuda._POOL_HANDLE, stream: torch.cuda.Stream) -> None:
    try:
        graph.capture_end()
    except RuntimeError:
        _failed.append(graph)
        with contextlib.suppress(RuntimeError):  # where torch has done it
            torch._C._cuda_endAllocateToPool(stream.device.index, pool)
        raise


def prologue(stage_plan: StagePlan) -> frozenset[str]:
    """Steps that stay outside a graph: those that read media, and what the plan puts before them."""
    steps = stage_plan.steps
    earlier = before(steps)
    outside = 0
    for index, step in enumerate(steps):
        if any(stage_plan.buffer(name).home == "media" for name in step.reads):
            outside |= earlier[index] | 1 << index
    return frozenset(steps[index].name for index in members(outside))


def consecutive(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[7, 8, 2] → (0, 2), (2, 3): ranges of places whose numbers follow one another."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield start, place
            start = place


def placed(module: fx.GraphModule, device: torch.device, weights: MutableMapping[Tensor, Tensor]) -> fx.GraphModule:
    """The module's graph over weights on the device; what it makes out of nothing is made there too."""
    graph = copy.deepcopy(module.graph)
    mine: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            weight = attrgetter(node.target)(module)
            if weight not in weights:
                weights[weight] = weight.detach().to(device)
            mine[node.target] = weights[weight]
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda value: device if isinstance(value, torch.device) else value
        )
    return fx.GraphModule(mine, graph)


def first_cause(error: BaseException) -> str:
    """What ended a capture: the driver's complaint that a capture was ended comes after it."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _cuda(stream: Stream) -> CudaStream:
    assert isinstance(stream, CudaStream)
    return stream
