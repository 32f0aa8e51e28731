"""Where embeddings are kept: keys and values are bytes, and nothing of them is ever executed.

    Store    what a layer can do; one over the network would be a third
    Memory   the most recent, bounded
    Layers   the nearest first; what a farther one has moves into the nearer ones

A store loses entries when it likes (there is no room, a disk is full, a file is broken): it never raises, and what it
gives is what was put.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mmpipe.cache.disk import Disk

MEMORY_BYTES = 16_000_000  # of the nearest layer, in each process: 7,000 embeddings of 512 numbers
_OVERHEAD = 200  # bytes that Python takes for an entry


class Store(Protocol):
    """Key → value, both bytes. From any thread."""

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Those that are there."""

    def put_many(self, entries: Mapping[bytes, bytes]) -> None:
        """Keep them, for as long as there is room."""

    def flush(self) -> None:
        """What was put is where it outlives this process, if this layer does that."""

    def notes(self) -> list[str]:
        """What a user should know: why it keeps less than it was asked to."""

    def close(self) -> None: ...


class Memory:
    """The entries used last, within a bound on their bytes."""

    def __init__(self, limit_bytes: int = MEMORY_BYTES) -> None:
        self._limit = limit_bytes
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        with self._lock:
            found = {key: self._entries[key] for key in keys if key in self._entries}
            for key in found:
                self._entries.move_to_end(key)
            return found

    def put_many(self, entries: Mapping[bytes, bytes]) -> None:
        with self._lock:
            for key, value in entries.items():
                self._bytes += _size(key, value)
                if (before := self._entries.pop(key, None)) is not None:
                    self._bytes -= _size(key, before)
                self._entries[key] = value
            while self._bytes > self._limit:
                self._bytes -= _size(*self._entries.popitem(last=False))

    def flush(self) -> None:
        return

    def notes(self) -> list[str]:
        return []

    def close(self) -> None:
        with self._lock:
            self._entries.clear()
            self._bytes = 0


def _size(key: bytes, value: bytes) -> int:
    return len(key) + len(value) + _OVERHEAD


class Layers:
    """Several stores, the nearest first."""

    def __init__(self, *layers: Store) -> None:
        self.layers = layers

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for depth, layer in enumerate(self.layers):
            more = layer.get_many([key for key in keys if key not in found])
            for nearer in self.layers[:depth] if more else ():
                nearer.put_many(more)
            found |= more
            if len(found) == len(keys):
                break
        return found

    def put_many(self, entries: Mapping[bytes, bytes]) -> None:
        for layer in self.layers:
            layer.put_many(entries)

    def flush(self) -> None:
        for layer in self.layers:
            layer.flush()

    def notes(self) -> list[str]:
        return [note for layer in self.layers for note in layer.notes()]

    def close(self) -> None:
        for layer in self.layers:
            layer.close()


def folder() -> Path | None:
    """Where embeddings are kept on disk: MMPIPE_CACHE, else the user's cache folder. None: MMPIPE_CACHE is `off`."""
    named = os.environ.get("MMPIPE_CACHE", "")
    if named == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as its specification asks
        base = os.path.join("~", ".cache")
    return Path(os.path.expanduser(named or os.path.join(base, "mmpipe")))


def opened(limit_bytes: int) -> Layers:
    """Memory over the user's disk, where that is wanted."""
    where = folder()
    memory = Memory(min(MEMORY_BYTES, limit_bytes))
    return Layers(memory) if where is None else Layers(memory, Disk(where, limit_bytes))
