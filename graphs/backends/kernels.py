"""Code of our own for the processor: C++ that is compiled once on a machine, kept, and loaded; operations.py calls it.

layer_norm.cpp is for processors with AVX-512 for bfloat16, attention.cpp and mlp.cpp for those that have AMX too:
written for AVX-512 alone attention was no faster than PyTorch's. All need Linux and, the first time, GCC.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import threading
from pathlib import Path
from typing import Any

from mmpipe.graphs.artefacts import kept
from mmpipe.graphs.backends import Unlowerable
from mmpipe.graphs.backends.compiler import compiled, loaded, named

SECONDS = 2.5  # that compiling takes, about

_VECTORS = ("fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16")  # as /proc/cpuinfo has them
_TILES = ("amx_tile", "amx_bf16")
_SOURCES = {  # what each needs
    "layer_norm.cpp": _VECTORS,
    "attention.cpp": (*_VECTORS, *_TILES),
    "mlp.cpp": (*_VECTORS, *_TILES),
}
_SHARED = ("tiles.h",)
_WITHOUT_TILES = ("AVX512_CORE_BF16", "AVX512_CORE_FP16")  # of oneDNN's limits, those that leave bfloat16
_OPTIONS = {"avx512_bf16": "-mavx512bf16", "amx_tile": "-mamx-tile", "amx_bf16": "-mamx-bf16"}  # GCC's names
# no contraction: last bits would be the compiler's choice
_FLAGS = ("-O3", "-ffp-contract=off", "-fopenmp")

_lock = threading.Lock()
library: Any = None  # the functions, once `load` has been called
_failed: dict[str, str] = {}  # artefact → why it can't be had in this process; tried once


def why_not() -> str:
    """Why this machine can't run any of it, or ""."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "native code is for Linux on x86-64"
    return "" if sources() else "this processor has no AVX-512 for bfloat16, or is told to hide it"


@functools.cache
def sources() -> tuple[str, ...]:
    """Those files whose instructions this processor has. oneDNN's limit holds for them too."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    hidden: tuple[str, ...] = ()
    if limit in _WITHOUT_TILES:
        hidden = _TILES
    elif limit not in ("", "DEFAULT", "ALL") and "AMX" not in limit:
        hidden = (*_VECTORS, *_TILES)
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("flags"):
                flags = set(line.partition(":")[2].split())
                break
    return tuple(name for name, needed in _SOURCES.items() if flags.difference(hidden).issuperset(needed))


def ready(folder: Path | None) -> bool:
    """Whether `folder` keeps it, so that no compiler is waited for."""
    return folder is not None and (folder / _name()).is_file()


def load(folder: Path | None) -> None:
    """Compile it, or take what `folder` keeps, and load it; once a process, also where it fails. Raises Unlowerable."""
    with _lock:
        if library is not None:
            return
        if why := why_not() or _failed.get(_name(), ""):
            raise Unlowerable(why)
        try:
            _load(folder)
        except Unlowerable as error:
            _failed[_name()] = str(error)
            raise


def _load(folder: Path | None) -> None:
    global library
    made = loaded(kept(folder, _name(), _compiled))
    pointer, number = ctypes.c_void_p, ctypes.c_long
    made.layer_norm.argtypes = [pointer] * 5 + [number] * 4 + [ctypes.c_float, number]
    made.layer_norm.restype = None
    if "attention.cpp" in sources():
        made.attention.argtypes = [pointer] * 6 + [number] * 3
        made.mlp.argtypes = [pointer] * 4 + [number] * 2
        if made.attention_begin():
            raise Unlowerable("the system does not lend this process AMX's tiles")
    library = made


def _name() -> str:
    """By what it is made of: another source, or other flags, is another artefact."""
    return named("native", [_path(name) for name in (*_SHARED, *sources())], [*_FLAGS, *_options()])


def _path(name: str) -> Path:
    return Path(__file__).with_name(name)


def _options() -> list[str]:
    """What the compiler is told of the processor."""
    needed = dict.fromkeys(feature for name in sources() for feature in _SOURCES[name])
    return [_OPTIONS.get(feature, f"-m{feature}") for feature in needed]


def _compiled() -> bytes:
    return compiled([_path(name) for name in sources()], [*_FLAGS, *_options()])
