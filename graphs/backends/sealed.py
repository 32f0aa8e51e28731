"""Folders of compiled artefacts. Loading one runs it, so only what this user wrote, unchanged since, is loaded.

    with Sealed(folder, key) as place:      # None where nothing may be kept
        … a compiler reads and writes in `place` …

Each artefact has a folder of its own, named by what it was compiled from. When it is closed, a list of its files and
their SHA-256 is written beside it; when it is opened again, whatever does not match the list is deleted, all of it, and
compiled anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self


class Sealed:
    """One artefact's folder. Raises OSError where the folder can't be written, or belongs to somebody else."""

    def __init__(self, folder: Path, key: str) -> None:
        self.place = folder / key
        self._list = folder / f"{key}.json"
        self._held = contextlib.ExitStack()

    @property
    def known(self) -> bool:
        """Whether there is something, and nobody has touched it. What somebody has is deleted."""
        if not self.place.is_dir():
            return False
        try:
            listed = json.loads(self._list.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            listed = None
        if listed == _hashes(self.place) and _ours(self._list):
            return True
        shutil.rmtree(self.place)
        return False

    def __enter__(self) -> Self:
        parent = self.place.parent
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _ours(parent):
            raise PermissionError(f"{parent} belongs to, or can be written by, somebody else: nothing there is loaded")
        with contextlib.ExitStack() as stack:
            stack.enter_context(_locked(self._list.with_suffix(".lock")))
            if not self.known:
                self.place.mkdir(mode=0o700)
            self._held = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Seal what was written; what an error left half done is deleted."""
        with self._held:
            self._seal(kind)

    def _seal(self, kind: type[BaseException] | None) -> None:
        if kind is not None:
            shutil.rmtree(self.place, ignore_errors=True)
            return
        # beside it first: a list half written would only cost a compilation, but another process may be reading
        half = self._list.with_suffix(f".{os.getpid()}")
        try:
            half.write_text(json.dumps(_hashes(self.place), sort_keys=True), encoding="utf-8")
            os.replace(half, self._list)
        except OSError:  # a full disk: what was compiled is there, and is compiled again next time
            with contextlib.suppress(OSError):
                half.unlink(missing_ok=True)
            shutil.rmtree(self.place, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time: another that compiles the same waits, and finds it. None is held where none can be had."""
    with path.open("ab") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def _hashes(folder: Path) -> dict[str, str]:
    """Every file below `folder` → its SHA-256; locks, which hold nothing, left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"a link to {os.readlink(path)}"
        elif path.is_file() and path.suffix != ".lock":
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _ours(path: Path) -> bool:
    """Whether this user owns it and nobody else may write it; true where there are no such owners."""
    if not hasattr(os, "getuid"):
        return True
    about = path.stat()
    return about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
