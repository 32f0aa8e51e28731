"""Where a plan's bytes are and how rows are moved: what differs between a CPU and a CUDA device.

HostDevice is here; `mmpipe.runtime.cuda` has the other. Index tensors hold row numbers, one for each row of a bucket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, fx

from mmpipe import machine
from mmpipe.runtime.streams import CallerStream, Event, HostStream, Run, Stream

if TYPE_CHECKING:
    from mmpipe.runtime.lanes import Work


TIMES = 50  # that a call is timed at most
_TIMING_S = 0.25  # for one call


class Graph(Protocol):
    """Most steps of a work in one go. `prologue` names the others, which are submitted before."""

    @property
    def prologue(self) -> Collection[str]: ...

    def replay(self, run: Run) -> Mapping[str, Event]:
        """Put its steps on the device: step → event, for those that record one."""


class Device(Protocol):
    """Streams, memory and copies of one device. `name`: what it is, for people and for keys of what is compiled for it.
    `notes`: what it could not do the fast way, and why."""

    kind: str
    name: str
    notes: list[str]

    def stream(self, name: str, threads: int) -> Stream: ...

    def allocate(self, size_bytes: int) -> Tensor:
        """uint8 memory of the device."""

    def allocate_host(self, size_bytes: int) -> Tensor:
        """uint8 memory of the host, which the device can copy from and to without the host's help."""

    def memory_bytes(self) -> int:
        """Bytes that may still be taken."""

    def place(self, module: fx.GraphModule) -> fx.GraphModule:
        """A module with its weights on the device."""

    def held(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; the same one where the host is the device."""

    def bfloat16_gain(self) -> float:
        """How many times faster than float32 a large product is in bfloat16; 0: it is none of the device's types."""

    def seconds(self, call: Callable[[], Tensor]) -> float:
        """How long a call takes, the least of several times; on a GPU without its launch."""

    def near(self, numbers: Tensor) -> Tensor:
        """Room on the device for row numbers that the host writes; the same tensor where the host is the device."""

    def upload(self, bucket: Tensor, table: Tensor, rows: Tensor) -> None:
        """bucket[i] = table[rows[i]]; the table and `rows` are the host's."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """target = source, from host to device or back, in the current stream's order."""

    def graph_of(self, work: Work, streams: Mapping[str, Stream]) -> Graph | None:
        """The steps of a work as one launch, if the device has such; asked when every segment has rows."""


class HostDevice:
    """The CPU."""

    kind = "cpu"
    name = "CPU"

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stream(self, name: str, threads: int) -> Stream:
        return CallerStream(name) if name == "caller" else HostStream(name, threads)

    def allocate(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def allocate_host(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def memory_bytes(self) -> int:
        return available_bytes()

    def place(self, module: fx.GraphModule) -> fx.GraphModule:
        return module

    def held(self, tensor: Tensor) -> Tensor:
        return tensor

    def bfloat16_gain(self) -> float:
        return machine.bfloat16_gain()

    def seconds(self, call: Callable[[], Tensor]) -> float:
        with torch.inference_mode():
            call()
            taken: list[float] = []
            while len(taken) < 3 or (sum(taken) < _TIMING_S and len(taken) < TIMES):
                began = time.perf_counter()
                call()
                taken.append(time.perf_counter() - began)
        return min(taken)

    def near(self, numbers: Tensor) -> Tensor:
        return numbers

    def upload(self, bucket: Tensor, table: Tensor, rows: Tensor) -> None:
        torch.index_select(table, 0, rows, out=bucket)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def graph_of(self, work: Work, streams: Mapping[str, Stream]) -> None:
        return None


def device_for(name: str) -> Device:
    """The device of a name: "cpu", "cuda" or "cuda:1". RuntimeError where this machine has no such."""
    kind, _, index = name.partition(":")
    if name == "cpu":
        return HostDevice()
    if kind == "cuda" and name != "cuda:" and (not index or index.isdecimal()):
        from mmpipe.runtime.cuda import CudaDevice

        return CudaDevice(int(index or 0))
    raise RuntimeError(f"unknown device {name!r}: one of cpu, cuda, cuda:N")


def device_name(name: str) -> str:
    """What a device of that name is, without taking it: "NVIDIA H200"."""
    return HostDevice.name if name == "cpu" else torch.cuda.get_device_name(name)


def cuda_devices() -> int:
    """How many CUDA devices torch sees."""
    return torch.cuda.device_count()


def available_bytes() -> int:
    """Memory that this process may still take: the machine's, or its control group's."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        pass
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return max(1 << 30, min(found)) if found else 4 << 30
