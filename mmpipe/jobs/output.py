"""The output folder: who may write into it, and what may be replaced."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mmpipe.errors import ConfigError, MmpipeError, OutputError
from mmpipe.jobs.shards import FOLDER, is_shard

_LOCK = ".mmpipe.lock"
_RUN, _REPORT = "run.json", "report.html"
_REPLACED = re.compile(r"part-\d{5,}\.parquet")
_UNFINISHED = re.compile(r"\.(part-\d{5,}\.parquet|run\.json|report\.html\.\w+)\.tmp")  # of a run that was killed

EMPTY = "empty"  # the mode of what replaces nothing
_OR_OVERWRITE = ', or --mode overwrite (in Python: mode="overwrite") to replace what mmpipe wrote'


def check_mode(mode: str) -> None:
    """Raises ConfigError (exit code 2) for a mode that there isn't."""
    if mode not in ("new", "overwrite"):
        what = "resume is not implemented yet" if mode == "resume" else f"no such mode: {mode!r}"
        raise ConfigError(what, where="--mode", hint="give --mode overwrite, or a new output folder")


def refuse(folder: Path, mode: str, *, inside: Path | None = None) -> None:
    """Raise what `claimed` would raise, and change nothing: called before models are loaded.

    `inside`: the input folder. An output within it would be listed with the media by the next run: OutputError.
    """
    if inside is not None and _resolved(folder).is_relative_to(_resolved(inside)):
        raise OutputError(
            f"the output {folder} lies inside the input {inside}, where the next run would look for media: "
            "give an --output beside it"
        )
    with contextlib.suppress(OSError):  # whatever can't be looked at is found out by claiming it
        if not os.path.lexists(folder):
            near = next(parent for parent in folder.absolute().parents if parent.exists())
            if not near.is_dir():
                raise OutputError(f"{near} is a file; the output is a folder")
            if not os.access(near, os.W_OK | os.X_OK):
                raise OutputError(f"{folder} can't be made: {near} can't be written to")
            return
    with _held(folder):
        _replaceable(folder, mode)


@contextlib.contextmanager
def claimed(folder: Path, mode: str) -> Iterator[None]:
    """Hold the folder for one run. OutputError (exit code 4) where it is in use, or not empty and `mode` is "new".

    "overwrite" removes what mmpipe wrote (predictions/part-*.parquet, run.json, report.html), and nothing else: files
    of these names that are not mmpipe's are an OutputError.
    """
    with _held(folder):
        before = _replaceable(folder, mode)
        with writing(folder):
            for path in before:
                path.unlink()
        yield


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    _make(folder)
    with _locked(folder):
        yield


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"{folder} is a file, or inside one; the output is a folder") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise OutputError(f"{folder} can't be made: {getattr(error, 'strerror', None) or error}") from error


def _replaceable(folder: Path, mode: str) -> list[Path]:
    """What mmpipe wrote there before. Raises where there is anything and `mode` is not "overwrite"."""
    if mode != EMPTY:
        check_mode(mode)
    parts = folder / FOLDER
    try:
        inside = sorted(parts.iterdir()) if os.path.lexists(parts) else []
        beside = sorted(path for path in folder.iterdir() if path.name not in (_LOCK, FOLDER))
    except NotADirectoryError as error:
        raise OutputError(f"{parts} is a file where a folder has to be") from error
    except OSError as error:
        raise OutputError(f"{folder} can't be read: {error.strerror}") from error
    if parts.exists() and not os.access(parts, os.W_OK | os.X_OK):
        raise OutputError(f"{parts} can't be written to")
    names = [path.name for path in beside] + [f"{FOLDER}/{path.name}" for path in inside]
    if names and mode != "overwrite":
        raise OutputError(
            f"{folder} is not empty ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}): give another folder"
            + (_OR_OVERWRITE if mode != EMPTY else "")
        )
    ours = [path for path in inside if _REPLACED.fullmatch(path.name)]
    ours += [path for path in beside if path.name in (_RUN, _REPORT)]
    for path in ours:
        if not _is_ours(path):
            raise OutputError(f"{path} was not written by mmpipe, and would be replaced: give another folder")
    unfinished = [path for path in (*inside, *beside) if _UNFINISHED.fullmatch(path.name)]
    for path in unfinished:
        if path.is_dir() and not path.is_symlink():
            raise OutputError(f"{path} is a folder, which mmpipe did not make: give another folder")
    return ours + unfinished


def _is_ours(path: Path) -> bool:
    if not path.is_file():  # opening a pipe would wait for ever
        return False
    if path.suffix == ".parquet":
        return is_shard(path)
    try:
        if path.name == _REPORT:
            with path.open("rb") as file:
                return b"mmpipe report</title>" in file.read(4096)
        found = json.loads(path.read_bytes())
        return isinstance(found, dict) and "fingerprints" in found
    except (OSError, ValueError, RecursionError):
        return False


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # a link to itself
        return path.absolute()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """An advisory lock that ends with the process, however it ends."""
    path = folder / _LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"{folder} can't be written to: {error.strerror}") from error
    try:
        _lock(handle, path, folder)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: whoever opened it sees below that it is no longer the lock
    finally:
        os.close(handle)


def _lock(handle: int, path: Path, folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"{folder} is in use by another run") from error
    except (ImportError, OSError):  # no such locks here: two runs into one folder are then the user's to avoid
        return
    try:
        same = os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        same = False
    if not same:
        raise OutputError(f"{folder} was in use by another run until now: try again")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A disk that is full or gone → one clear error."""
    try:
        yield
    except OSError as error:
        raise MmpipeError(
            f"writing to {folder} failed: {error.strerror or error}. What was committed before is complete"
        ) from error
