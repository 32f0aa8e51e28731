"""The layer on disk: one SQLite file, which any number of threads and processes use at once.

SQLite, because what is killed while it writes loses its last transaction and nothing else, because a full disk or a
broken file is an error that can be handled (a memory-mapped store ends the process instead), and because it holds plain
bytes: no pickle, nothing that is executed. A batch is one transaction. It is not asked to wait for the disk
(`synchronous=OFF`): after a power cut the file may be broken, and is then begun anew; each value has a checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

FILE = "embeddings-1.sqlite"  # 1: of the form below
BATCH = 256  # entries that are written at once
_WAIT_SECONDS = 2.0  # for another process that writes; longer, and a batch is dropped
_HOUR = 3600  # how finely last use is known: reading seldom writes
_KEEP = 0.9  # of the limit, once it is reached
_AT_ONCE = 500  # keys in one question
_BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_FORM = """
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = OFF;
PRAGMA trusted_schema = OFF;
CREATE TABLE IF NOT EXISTS entries (
    key BLOB NOT NULL UNIQUE, used INTEGER NOT NULL, sum BLOB NOT NULL, value BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS by_use ON entries (used);
"""


_ALL: weakref.WeakSet[Disk] = weakref.WeakSet()


def let_go() -> None:
    """Close every connection of this process; each opens again when it is next needed. Before a fork: what SQLite knows
    of its files is no other process' knowledge, even of a connection that the other never touches."""
    for disk in list(_ALL):
        disk.close()


class Disk:
    """A Store in `folder`, of at most about `limit_bytes`: those not used for longest go first.

    Where the folder can't be written, or the disk is full, it keeps nothing more, and `notes` says so, once.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.path = folder / FILE
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._waiting: dict[bytes, bytes] = {}
        self._touched: set[bytes] = set()
        self._reads = self._writes = True
        self._notes: list[str] = []
        _ALL.add(self)

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        with self._lock:
            found = {key: self._waiting[key] for key in keys if key in self._waiting}
            left = [key for key in keys if key not in found]
            for start in range(0, len(left) if self._reads else 0, _AT_ONCE):
                found |= self._safely(self._read, left[start : start + _AT_ONCE]) or {}
            return found

    def put_many(self, entries: Mapping[bytes, bytes]) -> None:
        with self._lock:
            if self._writes:
                self._waiting |= entries
                if len(self._waiting) >= BATCH:
                    self._flush()

    def flush(self) -> None:
        with self._lock:
            self._flush()

    def notes(self) -> list[str]:
        return list(self._notes)

    def close(self) -> None:
        with self._lock:
            self._flush()
            self._disconnect()

    # --- under the lock ---------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        touched, self._touched = self._touched, set()
        if self._writes and (waiting or touched):
            self._safely(self._write, waiting, touched)

    def _read(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        marks = ", ".join("?" * len(keys))
        rows = self._connected().execute(f"SELECT key, used, sum, value FROM entries WHERE key IN ({marks})", keys)
        found, now = {}, _now()
        for key, used, total, value in rows:
            if isinstance(value, bytes) and total == _sum(key, value):  # else it is as if it were not there
                found[key] = value
                if used < now:
                    self._touched.add(key)
        return found

    def _write(self, waiting: Mapping[bytes, bytes], touched: set[bytes]) -> None:
        database, now = self._connected(), _now()
        with _transaction(database):
            database.executemany("UPDATE entries SET used = ? WHERE key = ?", [(now, key) for key in touched])
            database.executemany(
                "INSERT OR REPLACE INTO entries (key, used, sum, value) VALUES (?, ?, ?, ?)",
                [(key, now, _sum(key, value), value) for key, value in waiting.items()],
            )
        if self._size() > self._limit:
            self._evict(database)

    def _evict(self, database: sqlite3.Connection) -> None:
        """Until there is room again; the file shrinks."""
        with _transaction(database):
            while self._size() > self._limit * _KEEP:
                (count,) = database.execute("SELECT count(*) FROM entries").fetchone()
                if not count:
                    break
                oldest = "SELECT rowid FROM entries ORDER BY used, rowid LIMIT ?"
                database.execute(f"DELETE FROM entries WHERE rowid IN ({oldest})", (max(1, count // 10),))
        database.executescript("PRAGMA incremental_vacuum;")  # `execute` would end after its first page

    def _size(self) -> int:
        """Bytes of the pages that are in use."""
        ask = self._connected().execute
        names = ("page_count", "freelist_count", "page_size")
        pages, free, size = (ask(f"PRAGMA {name}").fetchone()[0] for name in names)
        return int((pages - free) * size)

    def _connected(self, *, alone: bool = False) -> sqlite3.Connection:
        """`alone`: the lock is held already."""
        if self._database is None:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # threads take turns, by the lock
            made = sqlite3.connect(
                self.path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=16
            )
            try:
                # two that begin a file at once would not wait for each other: SQLite gives up on changes of mode
                with contextlib.nullcontext() if alone else _alone(self.path.with_suffix(".lock")):
                    made.executescript(_FORM)
            except BaseException:
                made.close()
                raise
            self._database = made
        return self._database

    def _disconnect(self) -> None:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def _safely(self, do: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """do(…), or None: whatever a disk may do, a cache only has less."""
        try:
            return do(*args, **kwargs)
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            if code in _BUSY:
                return None
            if code in _BROKEN and self._begun_anew():
                return None
            self._end(code, str(error))
        except OSError as error:
            self._end(sqlite3.SQLITE_CANTOPEN, error.strerror or type(error).__name__)
        return None

    def _end(self, code: int, why: str) -> None:
        """Keep nothing more. What can't be written can often still be read."""
        self._writes = False
        self._waiting.clear()
        if code not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY):
            self._reads = False
            self._disconnect()
        if not self._notes:
            self._notes.append(f"cache: embeddings are kept in memory only: {self.path.parent}: {why}")

    def _begun_anew(self) -> bool:
        """Remove a broken file, unless another process has done so. Whoever has it open goes on with what it has."""
        self._disconnect()
        try:
            with _alone(self.path.with_suffix(".lock")):
                if self._is_whole():
                    return True
                for suffix in ("-wal", "-shm", ""):  # the log first: it belongs to this file and to no other
                    self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            return True
        except OSError:
            return False

    def _is_whole(self) -> bool:
        try:
            return bool(self._connected(alone=True).execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
        except (sqlite3.Error, OSError):
            return False
        finally:
            self._disconnect()


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # a full disk has rolled back already
            database.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time, where the system has such locks."""
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sum(key: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(value, key=key[:64], digest_size=8).digest()


def _now() -> int:
    return int(time.time()) // _HOUR
