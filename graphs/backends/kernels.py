"""Code of our own for the processor: C++ that is compiled once on a machine, kept, and loaded.

attention.cpp is all there is of it. It needs Linux, a processor with AMX, and, the first time, GCC. Written for AVX-512
alone it was no faster than PyTorch's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

from mmpipe.graphs.artefacts import kept
from mmpipe.graphs.backends import Unlowerable

SECONDS = 2.0  # that compiling takes, about
MOST_KEYS = 1024  # a block's scores stay in the second cache
MOST_WIDTH = 256

_SOURCE = Path(__file__).with_name("attention.cpp")
_FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_tile", "amx_bf16", "fma")
_OPTIONS = {"avx512_bf16": "-mavx512bf16", "amx_tile": "-mamx-tile", "amx_bf16": "-mamx-bf16"}  # GCC's names
# no contraction: last bits would be the compiler's choice
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-w", "-fopenmp", "-shared", "-fPIC")
_LOG2E = 1.4426950408889634
_LOWEST = -2e38  # times that it is still a number
_LIMIT_S = 120.0
_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.bool: 3}  # of masks, as attention.cpp counts them

_lock = threading.Lock()
_library: ctypes.CDLL | None = None


class _Matrix(ctypes.Structure):
    """As attention.cpp has it: strides in numbers, of all dimensions but the last, which is dense."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("batch", "head", "token")))


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("query", "key", "value", "out", "mask")),
        *(
            (name, ctypes.c_long)
            for name in ("batch", "heads", "queries", "keys", "width", "period", "kind", "threads")
        ),
        ("scale", ctypes.c_float),
    )


@functools.cache
def why_not() -> str:
    """Why this machine can't run it, or ""."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "native code is for Linux on x86-64"
    hidden = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if hidden and hidden not in ("DEFAULT", "ALL") and "AMX" not in hidden:
        return f"ONEDNN_MAX_CPU_ISA={hidden} hides AMX"
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("flags"):
                flags = set(line.partition(":")[2].split())
                break
    return "" if flags.issuperset(_FEATURES) else "this processor has no AMX"


def ready(folder: Path | None) -> bool:
    """Whether `folder` keeps it, so that no compiler is waited for."""
    return folder is not None and (folder / _name()).is_file()


def load(folder: Path | None) -> None:
    """Compile it, or take what `folder` keeps, and load it; once a process. Raises Unlowerable."""
    global _library
    with _lock:
        if _library is not None:
            return
        if why := why_not():
            raise Unlowerable(why)
        made = _loaded(kept(folder, _name(), _compiled))
        made.attention.argtypes = [ctypes.POINTER(_Call)]
        if made.attention_begin():
            raise Unlowerable("the system does not lend this process AMX's tiles")
        _library = made


def base2(mask: Tensor) -> Tensor:
    """A constant mask as the kernel adds it: float32, times log2(e), so that exponentials are powers of two."""
    return mask.to(torch.float32).clamp_min(_LOWEST).mul(_LOG2E).contiguous()


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(query · keyᵀ · scale + mask) · value, the softmax in float32.

    query, result: [batch, head, query, width]; key, value: [batch, head, key, width]; all bfloat16, at most MOST_KEYS
    and MOST_WIDTH. mask: [period, head or 1, query or 1, key], bool (which keys are looked at), bfloat16, or float32
    from `base2`; the batch is a multiple of its period. A query that is left no key looks at all alike. Raises
    MemoryError.
    """
    assert _library is not None
    batch, heads, queries, width = query.shape
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    out = query.new_empty(batch, queries, heads, width).transpose(1, 2)  # as what follows reads it
    call = _Call(
        *(_Matrix(part.data_ptr(), *part.stride()[:3]) for part in (query, key, value, out)),
        batch=batch,
        heads=heads,
        queries=queries,
        keys=key.shape[2],
        width=width,
        period=1,
        threads=torch.get_num_threads(),
        scale=scale,
    )
    if mask is not None:
        if mask.stride(-1) != 1:
            mask = mask.contiguous()
        steps = [0 if size == 1 else step for size, step in zip(mask.shape[:3], mask.stride()[:3], strict=True)]
        call.mask = _Matrix(mask.data_ptr(), *steps)
        call.period, call.kind = len(mask), _KINDS[mask.dtype]
    if _library.attention(call):
        raise MemoryError("attention's buffers")
    return out


def _name() -> str:
    """By what it is made of: another source, or other flags, is another artefact."""
    made_of = _SOURCE.read_bytes() + repr([_FLAGS, _FEATURES, os.environ.get("CXX", "")]).encode()
    return f"attention-{hashlib.sha256(made_of).hexdigest()[:32]}.so"


def _compiled() -> bytes:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0] if compiler.split() else "") is None:
        raise Unlowerable(f"it needs GCC once, and there is no {compiler} here: install one, or set CXX")
    features = [_OPTIONS.get(name, f"-m{name}") for name in _FEATURES]
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "attention.so"
        command = [*compiler.split(), *_FLAGS, *features, "-o", str(made), str(_SOURCE)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unlowerable(f"{compiler} could not compile it: {error}") from error
        if done.returncode or not made.is_file():
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
            raise Unlowerable(f"{compiler} could not compile it: {lines[0]}")
        return made.read_bytes()


def _loaded(content: bytes) -> ctypes.CDLL:
    """From memory: what is loaded is what was verified, whatever happens to a file."""
    handle = os.memfd_create("mmpipe-attention")
    try:
        with open(handle, "wb", closefd=False) as file:
            file.write(content)
        return ctypes.CDLL(f"/proc/self/fd/{handle}")
    except OSError as error:
        raise Unlowerable(f"it can't be loaded: {error}") from error
    finally:
        os.close(handle)
