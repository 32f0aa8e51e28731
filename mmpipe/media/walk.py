"""Every file below a folder, by os.scandir: nothing is opened, links can't make it run in circles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mmpipe.errors import InputError

_HIDDEN = frozenset({"__macosx", "thumbs.db", "desktop.ini"})


def walk(root: Path, unmatched: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(parent relative to root, "" for root itself; name) of each file that isn't hidden, in no promised order.

    Anything that isn't a folder is a file here: what it really is, is found out when it is loaded. Hidden things,
    folders that can't be read and links to folders walked already go to `unmatched`. Real folders come before linked
    ones and linked ones by their path, so which of two ways to a folder counts doesn't depend on the disk's order.
    """
    visited: set[tuple[int, int]] = set()
    folders, linked = [""], list[str]()
    while folders or linked:
        if not folders:
            linked.sort(key=os.fsencode, reverse=True)
            folders.append(linked.pop())
        folder = folders.pop()
        where = os.path.join(root, folder) if folder else os.fspath(root)
        try:
            status = os.stat(where)
            if (status.st_dev, status.st_ino) in visited:
                unmatched.append((f"{printable(folder)}/", "a link to a folder that is read already"))
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(where) as entries:
                for entry in entries:
                    name = entry.name
                    is_folder = _is_folder(entry)
                    if name.startswith(".") or name.lower() in _HIDDEN:
                        path = f"{folder}/{name}" if folder else name
                        unmatched.append((printable(path) + "/" * is_folder, "hidden"))
                    elif is_folder:
                        (linked if entry.is_symlink() else folders).append(f"{folder}/{name}" if folder else name)
                    else:
                        yield folder, name
        except OSError as error:
            if not folder:
                raise InputError(f"{printable(root.name)}: the folder can't be read: {error.strerror}") from error
            unmatched.append((f"{printable(folder)}/", f"the folder can't be read: {error.strerror}"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def printable(path: str) -> str:
    """The path as text that can be encoded: bytes of a name that are no UTF-8 become \\xff."""
    if path.isascii():
        return path
    return os.fsencode(path).decode("utf-8", "backslashreplace")
