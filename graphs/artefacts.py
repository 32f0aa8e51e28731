"""What takes long to make, kept between runs: files that only their owner can have written, each with its own hash.

A graph or a compiled artefact is code. It is loaded only from a folder that is the user's alone, under a name that
says what it was made of, and only where its bytes are still those that were written; in any other case it is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

LIMIT_BYTES = 10 << 30  # of a folder's files; engines hold their weights
_HASH_BYTES = hashlib.sha256().digest_size  # each file begins with the hash of the rest


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def kept(
    folder: Path | None,
    name: str,
    make: Callable[[], bytes],
    tell: Callable[[str], None] = _warn,
    limit_bytes: int = LIMIT_BYTES,
    usable: Callable[[bytes], bool] = lambda content: True,
) -> bytes:
    """The bytes under `name` in `folder`, where they are `usable`; else what `make` gives, which is kept there. None:
    nothing is kept.

    Where the folder's files are more than `limit_bytes` together, those that were not used for longest go.

    The folder is made if need be, with mode 0700. Where it is another's, open to others, or can't be written, nothing
    of it is used, and `tell` (a RuntimeWarning) says so.
    """
    if folder is None:
        return make()
    why = fault(folder)
    if why is not None:
        tell(f"{folder} {why}: what is made is not kept, and will be made again")
        return make()
    found = _read(folder / name)
    if found is None or not usable(found):
        found = make()
        try:
            _write(folder, name, found)
            _make_room(folder, limit_bytes)
        except OSError as error:
            tell(f"{folder}: {name} is not kept, and will be made again: {error.strerror or error}")
    return found


def fault(folder: Path) -> str | None:
    """Why the folder is not to be trusted, or None."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.stat(folder)
    except OSError as error:
        return f"can't be used ({error.strerror or error})"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}"
    if found.st_mode & 0o077:
        return f"is open to others (mode {stat.S_IMODE(found.st_mode):o}; chmod 700 would help)"
    return None


def _read(path: Path) -> bytes | None:
    try:
        # no link: it could lead out of the folder
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                return None
            recorded, content = file.read(_HASH_BYTES), file.read()
        os.utime(path)  # used now
    except OSError:
        return None
    return content if hashlib.sha256(content).digest() == recorded else None


def _write(folder: Path, name: str, content: bytes) -> None:
    """Whole or not at all, however many processes write the same."""
    handle, path = tempfile.mkstemp(dir=folder)  # mode 0600
    try:
        with open(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)
        os.replace(path, folder / name)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _make_room(folder: Path, limit_bytes: int) -> None:
    """Another process may be doing the same, or reading: what is gone is gone, and who has a file open keeps it."""
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                found.append((status.st_mtime_ns, status.st_size, entry.path))
    over = sum(size for _, size, _ in found) - limit_bytes
    for _, size, path in sorted(found)[:-1]:  # the one that was just made stays
        if over <= 0:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        over -= size
