"""Where a plan's bytes are and how rows are moved: what differs between a CPU and a CUDA device.

HostDevice is here; `mmpipe.runtime.cuda` has the other. Index tensors hold row numbers, one for each row of a bucket.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, fx

from mmpipe.runtime.streams import HostStream, Stream


class Device(Protocol):
    """Streams, memory and copies of one device."""

    kind: str

    def stream(self, name: str, threads: int) -> Stream: ...

    def allocate(self, size_bytes: int) -> Tensor:
        """uint8 memory of the device."""

    def allocate_host(self, size_bytes: int) -> Tensor:
        """uint8 memory of the host, which the device can copy from and to without the host's help."""

    def place(self, module: fx.GraphModule) -> fx.GraphModule:
        """A module with its weights on the device."""

    def near(self, numbers: Tensor) -> Tensor:
        """Room on the device for row numbers that the host writes; the same tensor where the host is the device."""

    def upload(self, bucket: Tensor, table: Tensor, rows: Tensor) -> None:
        """bucket[i] = table[rows[i]]; the table and `rows` are the host's."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """target = source, from host to device or back, in the current stream's order."""


class HostDevice:
    """The CPU."""

    kind = "cpu"

    def stream(self, name: str, threads: int) -> HostStream:
        return HostStream(name, threads)

    def allocate(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def allocate_host(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def place(self, module: fx.GraphModule) -> fx.GraphModule:
        return module

    def near(self, numbers: Tensor) -> Tensor:
        return numbers

    def upload(self, bucket: Tensor, table: Tensor, rows: Tensor) -> None:
        torch.index_select(table, 0, rows, out=bucket)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)
