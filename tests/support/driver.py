"""A double of CUDA's driver: torch.cuda's names over CPU tensors, which write down what was put on which stream.

    launch   one ATen operation: what it reads and writes of device and pinned memory, in cells of a few bytes
    record, wait, synchronize   events

Work runs when it is launched, so that answers can be compared; the trace is then judged by torch's own race detector
(`races`). Rows are seen through: gathering rows 1 and 2 of the slots reads their cells alone. An operation captured
into a graph runs at each replay, in place, on streams that only the graph's own edges and its launch order.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mmpipe.runtime import cuda

CELL_BYTES = 8  # no two buffers share one, nor two rows of the slots
DEFAULT = 0  # the stream that is there
HOST = -1  # in a trace: what the host itself does to pinned memory, in the order of its program


@dataclass(frozen=True)
class Launch:
    stream: int
    reads: frozenset[int]
    writes: frozenset[int]
    what: str


@dataclass(frozen=True)
class Mark:
    """`does`: "record" or "wait" an event on a stream, or the host's "synchronize" with one (no stream)."""

    does: str
    event: int
    stream: int = DEFAULT


Trace = list[Launch | Mark]


class Driver(TorchDispatchMode):
    """While it is entered every operation is seen; those on memory of the device are written down."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: Trace = []
        self.current = DEFAULT
        self.capturing: Graph | None = None
        self.replaying = False
        self.replays = 0
        self.forked: set[int] = set()  # streams of a replay
        self.spare: set[int] = set()  # cells of the row that fills buckets up: written by anyone, read by nobody
        self._memory: dict[int, Tensor] = {}  # by address
        self._pinned: set[int] = set()
        self._numbers = itertools.count(1)

    def number(self) -> int:
        return next(self._numbers)

    def own(self, tensor: Tensor, *, pinned: bool) -> Tensor:
        self._memory[tensor.data_ptr()] = tensor
        if pinned:
            self._pinned.add(tensor.data_ptr())
        return tensor

    def put(self, item: Mark) -> None:
        (self.trace if self.capturing is None else self.capturing.items).append(item)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.replaying:
            return func(*args, **kwargs)
        if self.capturing is None:
            call = Call(func, args, kwargs, func(*args, **kwargs))
            self.launched(self.current, call)
        else:
            call = Call(func, args, kwargs, captured(func, args, kwargs))
            self.capturing.items.append((self.current, call))
        return call.results

    def launched(self, stream: int, call: Call) -> None:
        reads, writes = call.cells(self)
        if stream == DEFAULT and call.touches(self._pinned):
            stream = HOST
        if reads or writes:
            self.trace.append(Launch(stream, frozenset(reads - writes), frozenset(writes), str(call.func)))

    def cells_of(self, tensor: Tensor, rows: list[int] | None = None) -> set[int]:
        if tensor.untyped_storage().data_ptr() not in self._memory:
            return set()
        if rows is not None:
            return set().union(*(self.cells_of(tensor[row]) for row in set(rows)))
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        last = tensor.data_ptr() + (1 + sum((size - 1) * stride for size, stride in sizes)) * tensor.itemsize
        return set(range(tensor.data_ptr() // CELL_BYTES, -(-last // CELL_BYTES)))


@dataclass
class Call:
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: Any

    def touches(self, addresses: set[int]) -> bool:
        tensors = (value for value in tree_leaves((self.args, self.kwargs)) if isinstance(value, Tensor))
        return any(tensor.untyped_storage().data_ptr() in addresses for tensor in tensors)

    def cells(self, driver: Driver) -> tuple[set[int], set[int]]:
        reads: set[int] = set()
        writes: set[int] = set()
        schema = self.func._schema
        if schema.name in ("aten::set_", "aten::empty") or self._is_view():
            return reads, writes
        by_row = {"aten::index_select": 2, "aten::index_copy_": 2}.get(schema.name)  # the place of the row numbers
        rows = None if by_row is None else self.args[by_row].tolist()
        given = dict(zip((a.name for a in schema.arguments), self.args, strict=False)) | self.kwargs
        for argument in schema.arguments:
            write = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(given.get(argument.name)):
                if isinstance(tensor, Tensor):
                    seen = driver.cells_of(tensor, rows if argument.name == "self" else None)
                    (writes if write else reads).update(seen)
        return reads, writes - driver.spare

    def _is_view(self) -> bool:
        """A cast may be one and copies: what has been returned tells."""
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in self.func._schema.returns):
            return False
        given, returned = (
            {value.untyped_storage().data_ptr() for value in tree_leaves(values) if isinstance(value, Tensor)}
            for values in ((self.args, self.kwargs), self.results)
        )
        return returned <= given

    def again(self) -> None:
        """As a replay would: the same operands where they are, results into the same places."""
        for before, now in zip(
            tree_leaves(self.results), tree_leaves(self.func(*self.args, **self.kwargs)), strict=True
        ):
            if isinstance(now, Tensor) and before.data_ptr() != now.data_ptr():
                before.copy_(now)


def captured(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Room for what a captured operation returns: it doesn't run, and what is in memory may be nonsense still."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if written:
        return given[written[0]]
    if any(result.alias_info is not None for result in func._schema.returns):
        return func(*args, **kwargs)
    return func(*tree_map_only(Tensor, torch.zeros_like, args), **tree_map_only(Tensor, torch.zeros_like, kwargs))


class Stream:
    device = torch.device("cuda", 0)

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.id = _driver().number()

    def wait_event(self, event: Event) -> None:
        assert event.id is not None, "a wait for an event that nobody recorded orders nothing"
        _driver().put(Mark("wait", event.id, self.id))

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        event = self.record_event()
        event.synchronize()


class Event:
    clock = itertools.count()

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        self.timing, self.external, self.id, self.there = enable_timing, external, None, False

    def record(self, stream: Stream) -> None:
        self.id, self.there, self.at = _driver().number(), False, next(Event.clock)
        if not self.external:  # in a graph, a node that orders nothing
            _driver().put(Mark("record", self.id, stream.id))

    def query(self) -> bool:
        """The latest moment that CUDA allows: when the host has waited."""
        return self.there

    def synchronize(self) -> None:
        assert _driver().capturing is None, "operation not permitted when stream is capturing"
        self.there = True
        _driver().put(Mark("synchronize", self.id))

    def elapsed_time(self, end_event: Event) -> float:
        assert self.timing
        assert end_event.timing
        return float(end_event.at - self.at)


class Graph:
    def __init__(self, keep_graph: bool = False) -> None:
        self.items: list[Mark | tuple[int, Call]] = []

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        driver = _driver()
        assert driver.capturing is None
        driver.capturing, self.launch = self, driver.current

    def capture_end(self) -> None:
        assert _driver().capturing is self
        _driver().capturing = None
        if self._unjoined():
            raise RuntimeError("capture was not ended in the same stream as it began")

    def _unjoined(self) -> set[int]:
        """Streams with work that the launching stream has not waited for in the end."""
        last: dict[int, int] = {}  # stream → the last event that it recorded after its last work
        waited = {i.event for i in self.items if isinstance(i, Mark) and (i.does, i.stream) == ("wait", self.launch)}
        for item in self.items:
            if isinstance(item, Mark) and item.does == "record":
                last[item.stream] = item.event
            elif (stream := item.stream if isinstance(item, Mark) else item[0]) != self.launch:
                last[stream] = -1
        return {stream for stream, event in last.items() if stream != self.launch and event not in waited}

    def replay(self) -> None:
        driver = _driver()
        driver.replays += 1
        numbers: dict[int, int] = {self.launch: driver.current}

        def anew(number: int) -> int:
            return numbers.setdefault(number, driver.number())

        streams = {item.stream if isinstance(item, Mark) else item[0] for item in self.items} - {self.launch}
        driver.forked |= {anew(stream) for stream in streams}

        for item in self.items:
            if isinstance(item, Mark):
                driver.put(Mark(item.does, anew(-item.event), anew(item.stream)))
            else:
                stream, call = item
                driver.replaying = True
                call.again()
                driver.replaying = False
                driver.launched(anew(stream), call)


@contextlib.contextmanager
def on(stream: Stream) -> Any:
    before, _driver().current = _driver().current, stream.id
    try:
        yield
    finally:
        _driver().current = before


_current: list[Driver] = []


def _driver() -> Driver:
    return _current[-1]


@contextlib.contextmanager
def double(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch.cuda is the double while this is entered, and "cuda:0" is the CPU's memory."""
    driver = Driver()
    empty = torch.empty
    default = Stream.__new__(Stream)
    default.id = DEFAULT

    def owned(*size: int, device: Any = None, pin_memory: bool = False, **options: Any) -> Tensor:
        made = empty(*size, **options)
        here = pin_memory or torch.device(device or "cpu").type == "cuda"
        return driver.own(made, pinned=pin_memory) if here else made

    with monkeypatch.context() as patch:
        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
            "stream": on,
            "empty_cache": lambda: None,
            "synchronize": lambda device: None,
            "graph_pool_handle": driver.number,
            "current_stream": lambda device: default,
            "device_count": lambda: 1,
            "get_device_name": lambda index: "a double",
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "empty", owned)
        patch.setattr(cuda, "placed", lambda module, device, weights: module)
        _current.append(driver)
        try:
            with driver:
                yield driver
        finally:
            _current.remove(driver)


def races(trace: Trace) -> list[str]:
    """What torch's race detector says of a trace."""
    from torch.cuda._sanitizer import EventHandler

    handler = EventHandler()
    found: list[str] = []
    for item in trace:
        if isinstance(item, Launch):
            if item.stream != HOST:  # what is launched comes after what the host did before it
                now = handler.syncs.current_sync_states
                handler.syncs._ensure_stream_exists(HOST)
                handler.syncs._ensure_stream_exists(item.stream)
                handler.syncs._state_wait_for_other(now[item.stream], now[HOST])
            aliases = {cell: [] for cell in item.reads | item.writes}
            errors = handler._handle_kernel_launch(
                item.stream, set(item.reads), set(item.writes), set(), item.what, aliases
            )
            found += [f"{e.previous_access.operator} then {e.current_access.operator}" for e in errors]
        elif item.does == "record":
            handler._handle_event_record(item.event, item.stream)
        elif item.does == "wait":
            handler._handle_event_wait(item.event, item.stream)
        else:
            handler._handle_event_synchronization(item.event)
    return found
