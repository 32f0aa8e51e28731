"""C++ → a library that this process has loaded, by the compiler that a machine has."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmpipe.graphs.backends import Unlowerable

_FLAGS = ("-std=c++17", "-w", "-shared", "-fPIC")
_LIMIT_S = 120.0


def named(kind: str, made_of: Sequence[Path], flags: Sequence[str]) -> str:
    """A file's name by what it is made of: another source, or other flags, is another artefact."""
    content = b"".join(path.read_bytes() for path in made_of)
    content += repr([_FLAGS, tuple(flags), os.environ.get("CXX", "")]).encode()
    return f"{kind}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def compiled(sources: Sequence[Path], flags: Sequence[str]) -> bytes:
    """The library's bytes. Raises Unlowerable."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0] if compiler.split() else "") is None:
        raise Unlowerable(f"native code needs GCC once, and there is no {compiler} here: install one, or set CXX")
    try:
        with tempfile.TemporaryDirectory() as place:
            made = Path(place) / "native.so"
            command = [*compiler.split(), *_FLAGS, *flags, "-o", str(made), *map(str, sources)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
            if done.returncode == 0:
                return made.read_bytes()
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unlowerable(f"{compiler} could not compile native code: {error}") from error
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
    raise Unlowerable(f"{compiler} could not compile native code: {lines[0]}")


def loaded(content: bytes) -> ctypes.CDLL:
    """From memory: what is loaded is what was verified, whatever happens to a file. Raises Unlowerable."""
    handle = -1
    try:
        handle = os.memfd_create("mmpipe-native")
        with open(handle, "wb", closefd=False) as file:
            file.write(content)
        return ctypes.CDLL(f"/proc/self/fd/{handle}")  # stays open: a path that was seen is what was loaded then
    except OSError as error:
        if handle >= 0:
            os.close(handle)
        raise Unlowerable(f"native code can't be loaded: {error}") from error
