"""The output folder: who may write into it, and what may be replaced."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mmpipe.errors import MmpipeError, OutputError
from mmpipe.jobs.shards import FOLDER

_LOCK = ".mmpipe.lock"
_FILES = ("run.json", "report.html")


@contextlib.contextmanager
def claimed(folder: Path, mode: str) -> Iterator[None]:
    """Hold the folder for one run. OutputError (exit code 4) where it is in use, or not empty and `mode` is "new".

    "overwrite" removes what mmpipe writes (predictions/part-*.parquet, run.json, report.html), and nothing else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"{folder} is a file; the output is a folder") from error
    except OSError as error:
        raise OutputError(f"{folder} can't be made: {error.strerror}") from error
    with _locked(folder):
        found = sorted(entry.name for entry in folder.iterdir() if entry.name != _LOCK)
        if found and mode != "overwrite":
            raise OutputError(
                f"{folder} is not empty ({', '.join(found[:3])}{', …' if len(found) > 3 else ''}): "
                "give another folder, or --mode overwrite to replace what mmpipe wrote there"
            )
        for path in _ours(folder):
            path.unlink()
        yield


def _ours(folder: Path) -> list[Path]:
    parts = folder / FOLDER
    found = [*parts.glob("part-*.parquet"), *parts.glob(".part-*.tmp")] if parts.is_dir() else []
    return [*found, *(folder / name for name in _FILES if (folder / name).is_file())]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """An advisory lock that ends with the process, however it ends."""
    path = folder / _LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"{folder} can't be written to: {error.strerror}") from error
    try:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks here: two runs into one folder are then the user's to avoid
            pass
        except BlockingIOError as error:
            raise OutputError(f"{folder} is in use by another run") from error
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A disk that is full or gone → one clear error."""
    try:
        yield
    except OSError as error:
        raise MmpipeError(
            f"writing to {folder} failed: {error.strerror or error}. What was committed before is complete"
        ) from error
