"""A bound on what media take while they are decoded, kept by the threads that decode them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Room:
    """`limit_bytes` for all that is being decoded at once. What needs more than that has it for itself alone.

        room = Room(limit_bytes)
        with room.share() as share:
            share.take(bytes_that_opening_it_takes)
            share.take(bytes_that_the_header_tells)  # waits for others to end; in order
            decode()

    Who holds a share waits for nothing but a core, or for more. More goes before what has none yet; where all that hold
    a share wait for more, the first of them has it, within the bound or not: so that every share comes to its end.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise ValueError(f"limit_bytes={limit_bytes}: < 1")
        self.limit_bytes, self.used_bytes = limit_bytes, 0
        self._waiting: deque[object] = deque()
        self._holders = 0  # shares that hold something
        self._growing: deque[object] = deque()  # of these, who wait for more
        self._changed = threading.Condition()

    @contextmanager
    def share(self) -> Iterator[Share]:
        """What one thread takes, until it leaves."""
        share = Share(self)
        try:
            yield share
        finally:
            if share.bytes:
                self._give_back(share.bytes)

    def _take(self, count: int, more: bool) -> None:
        turn, line = object(), self._growing if more else self._waiting
        with self._changed:
            line.append(turn)
            if more:
                self._changed.notify_all()  # it may be the last that others wait for
            self._changed.wait_for(lambda: line[0] is turn and (self._grows(count) if more else self._begins(count)))
            line.popleft()
            self._holders += not more
            self.used_bytes += count
            self._changed.notify_all()  # the next may fit too

    def _begins(self, count: int) -> bool:
        return not self._growing and (not self.used_bytes or self._fits(count))

    def _grows(self, count: int) -> bool:
        return self._fits(count) or len(self._growing) == self._holders

    def _fits(self, count: int) -> bool:
        return self.used_bytes + count <= self.limit_bytes

    def _give_back(self, count: int) -> None:
        with self._changed:
            self._holders -= 1
            self.used_bytes -= count
            if self._waiting or self._growing:
                self._changed.notify_all()


class Share:
    """What one thread has of a Room."""

    def __init__(self, room: Room) -> None:
        self._room, self.bytes = room, 0

    def take(self, count: int) -> None:
        """Waits until there are so many bytes more, and holds them."""
        if count > 0:
            self._room._take(count, more=bool(self.bytes))
            self.bytes += count
