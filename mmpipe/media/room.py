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
            share.take(bytes_that_the_header_tells)  # waits for others to end; in order
            decode()

    Who holds a share waits for nothing but a core, so that every share comes to its end.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise ValueError(f"limit_bytes={limit_bytes}: < 1")
        self.limit_bytes, self.used_bytes = limit_bytes, 0
        self._waiting: deque[object] = deque()
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

    def _take(self, count: int, must: bool) -> None:
        turn = object()
        with self._changed:
            if not must:
                self._waiting.append(turn)
                self._changed.wait_for(lambda: self._waiting[0] is turn and self._fits(count))
                self._waiting.popleft()
            self.used_bytes += count
            self._changed.notify_all()  # the next may fit too

    def _fits(self, count: int) -> bool:
        return not self.used_bytes or self.used_bytes + count <= self.limit_bytes

    def _give_back(self, count: int) -> None:
        with self._changed:
            self.used_bytes -= count
            if self._waiting:
                self._changed.notify_all()


class Share:
    """What one thread has of a Room."""

    def __init__(self, room: Room) -> None:
        self._room, self.bytes = room, 0

    def take(self, count: int) -> None:
        """Waits until there are so many bytes, and holds them. Who has some has more at once: it must not wait."""
        if count > 0:
            self._room._take(count, must=bool(self.bytes))
            self.bytes += count
