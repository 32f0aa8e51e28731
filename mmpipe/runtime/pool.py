"""The pool: one allocation for every tensor that crosses a segment's boundary, and the account of its rows.

    [slots …][lane 0: scratch][lane 1: scratch] …      the device's
    [media …][lane 0: host buffers][lane 1: …] …       the host's; on a CPU both are one allocation

`Pool.view` gives a buffer as a tensor; `SlotRows` and `MediaRows` say which rows are whose. A row goes to another
sample only after the host has seen that the run which read it has ended: that keeps runs apart where order does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from mmpipe.graphs.memory import aligned
from mmpipe.graphs.plan import Buffer, Plan
from mmpipe.runtime.device import Device
from mmpipe.runtime.streams import Event

State = Literal["free", "filling", "ready", "reading"]


class PoolSizes:
    """Bytes of a plan's pool, by home, before anything is allocated."""

    def __init__(self, plan: Plan) -> None:
        shared: dict[str, Buffer] = {}
        host: dict[str, Buffer] = {}
        for stage_plan in plan.stage_plans:
            for buffer in stage_plan.buffers:
                if buffer.home in ("slots", "media"):
                    shared[buffer.name] = buffer
                elif buffer.home == "host":
                    host[buffer.name] = buffer
        self.slot_buffers = [b for b in shared.values() if b.home == "slots"]
        self.media_buffers = [b for b in shared.values() if b.home == "media"]
        self.host_buffers = list(host.values())
        self.lanes = plan.lanes
        self.scratch = aligned(max((s.scratch_bytes for s in plan.stage_plans), default=0))  # of one lane
        # one row more than there are samples: where the rows that fill up a bucket are scattered to
        self.slots = sum(aligned(b.bytes + b.row_bytes) for b in self.slot_buffers)
        self.media = sum(aligned(b.bytes) for b in self.media_buffers)
        self.host = sum(aligned(b.bytes) for b in self.host_buffers)  # of one lane

    @property
    def total(self) -> int:
        return self.slots + self.media + self.lanes * (self.scratch + self.host)


class Pool:
    """The memory of a plan, allocated once. Views are tensors of the pool's own memory: never hand them to users."""

    def __init__(self, plan: Plan, device: Device) -> None:
        sizes = self.sizes = PoolSizes(plan)
        self.device = device
        near, far = sizes.slots + sizes.lanes * sizes.scratch, sizes.media + sizes.lanes * sizes.host
        if device.kind == "cpu":
            memory = device.allocate(near + far)
            self._near, self._far = memory[:near], memory[near:]
        else:
            self._near, self._far = device.allocate(near), device.allocate_host(far)
        self._tables: dict[str, Tensor] = {}
        start = 0
        for buffer in sizes.slot_buffers:
            self._tables[buffer.name] = _view(self._near, start, buffer, buffer.rows + 1).zero_()
            start += aligned(buffer.bytes + buffer.row_bytes)
        self._scratch_start = start
        start = 0
        for buffer in sizes.media_buffers:
            self._tables[buffer.name] = _view(self._far, start, buffer, buffer.rows)
            start += aligned(buffer.bytes)
        self._lane_views: dict[tuple[int, str], Tensor] = {}
        for lane in range(sizes.lanes):
            for buffer in sizes.host_buffers:
                self._lane_views[lane, buffer.name] = _view(self._far, start, buffer, buffer.rows)
                start += aligned(buffer.bytes)

    def view(self, lane: int, buffer: Buffer) -> Tensor:
        """A buffer as a tensor [rows, …]; slots have one row more, for what fills up a bucket."""
        if buffer.home in ("slots", "media"):
            return self._tables[buffer.name]
        if buffer.home == "host":
            return self._lane_views[lane, buffer.name]
        return _view(self._near, self._scratch_start + lane * self.sizes.scratch + buffer.offset, buffer, buffer.rows)

    def media(self, names: Sequence[str]) -> MediaRows:
        """The media slots of one branch: its inputs' tables and the account of their rows."""
        return MediaRows({name: self._tables[f"media/{name}"] for name in names})


def _view(memory: Tensor, start: int, buffer: Buffer, rows: int) -> Tensor:
    size = rows * buffer.row_bytes
    return memory[start : start + size].view(buffer.dtype).reshape(rows, *buffer.shape)


class SlotRows:
    """Which row of the slots belongs to which live sample. A sample has one from when it is taken up to its answer, so
    that it never waits for one while it holds what others need: there is no deadlock to run into."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> int:
        return self._free.pop()

    def give_back(self, row: int) -> None:
        self._free.append(row)


class MediaRows:
    """Media slots of one branch: free → filling → ready → reading → free.

    `take` is the consumer's: it waits, when none is free, for the run that reads the oldest. `fill` is a decoder's,
    from any thread. Rows are taken in the order in which they will be read: a full pool never waits for itself.
    """

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        self.tables = {name.partition(".")[2]: table for name, table in tables.items()}
        count = next(iter(self.tables.values())).shape[0]
        self.states: list[State] = ["free"] * count
        self._free = deque(range(count))
        self._reading: deque[tuple[Event, list[int]]] = deque()

    def has_free(self) -> bool:
        """Whether `take` would not wait."""
        self.reclaim()
        return bool(self._free)

    def take(self) -> int:
        """A free row, now filling; back-pressure is here."""
        self.reclaim()
        while not self._free:
            if not self._reading:
                raise AssertionError("media slots: all rows are held by the consumer itself")
            self._end_oldest()
        row = self._free.popleft()
        self.states[row] = "filling"
        return row

    def fill(self, row: int, inputs: Mapping[str, Tensor]) -> None:
        """Copy one prepared medium into a row that is filling."""
        assert self.states[row] == "filling", self.states[row]
        for name, table in self.tables.items():
            table[row] = inputs[name]
        self.states[row] = "ready"

    def read(self, rows: Sequence[int], event: Event) -> None:
        """A run reads these rows; they are free when its event is there."""
        for row in rows:
            assert self.states[row] == "ready", self.states[row]
            self.states[row] = "reading"
        self._reading.append((event, list(rows)))

    def release(self, row: int) -> None:
        """A row that will not be read: its medium failed, or nobody needs it any more."""
        assert self.states[row] in ("filling", "ready"), self.states[row]
        self._set_free(row)

    def reclaim(self) -> None:
        """Free the rows of runs that have ended."""
        while self._reading and self._reading[0][0].done():
            self._end_oldest()

    def reset(self) -> None:
        """Every row is free. Only when no run and no decoder is at work."""
        self.states = ["free"] * len(self.states)
        self._free = deque(range(len(self.states)))
        self._reading.clear()

    def _end_oldest(self) -> None:
        event, rows = self._reading.popleft()
        event.wait()
        for row in rows:
            self._set_free(row)

    def _set_free(self, row: int) -> None:
        self.states[row] = "free"
        self._free.append(row)
