"""Code of our own for the processor: C++ that is compiled once on a machine, kept, and loaded.

layer_norm.cpp is for processors with AVX-512 for bfloat16, attention.cpp and mlp.cpp for those that have AMX too:
written for AVX-512 alone attention was no faster than PyTorch's. All need Linux and, the first time, GCC.
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

SECONDS = 2.5  # that compiling takes, about
MOST_KEYS = 1024  # a block's scores stay in the second cache
MOST_WIDTH = 256

MOST_NORMED = 4096  # width of a layer norm
COLUMNS = 32  # the widths of an MLP are multiples of it

ACTIVATIONS = {"relu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4}  # as mlp.cpp counts them

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
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-w", "-fopenmp", "-shared", "-fPIC")
_LOG2E = 1.4426950408889634
_LOWEST = -2e38  # times that it is still a number
_LIMIT_S = 120.0
_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.bool: 3}  # of masks, as attention.cpp counts them

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_failed: dict[str, str] = {}  # artefact → why it can't be had in this process; tried once


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


class _MlpCall(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "other", "to", "first", "second")),
        *((name, ctypes.c_void_p) for name in ("first_bias", "second_bias", "norm_weight", "norm_bias")),
        *((name, ctypes.c_long) for name in ("rows", "width", "between", "columns", "activation", "threads")),
        ("eps", ctypes.c_float),
    )


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
        if _library is not None:
            return
        if why := why_not() or _failed.get(_name(), ""):
            raise Unlowerable(why)
        try:
            _load(folder)
        except Unlowerable as error:
            _failed[_name()] = str(error)
            raise


def _load(folder: Path | None) -> None:
    global _library
    made = _loaded(kept(folder, _name(), _compiled))
    made.layer_norm.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_long] * 4 + [ctypes.c_float, ctypes.c_long]
    made.layer_norm.restype = None
    if "attention.cpp" in sources():
        made.attention.argtypes = [ctypes.POINTER(_Call)]
        made.mlp.argtypes = [ctypes.POINTER(_MlpCall)]
        if made.attention_begin():
            raise Unlowerable("the system does not lend this process AMX's tiles")
    _library = made


def base2(mask: Tensor) -> Tensor:
    """A constant mask as the kernel adds it: float32, times log2(e), so that exponentials are powers of two."""
    mask = mask.to(torch.float32)
    # what hides a key goes on hiding it; the lowest number, times log2(e), is to stay a number
    return torch.where(torch.isneginf(mask), mask, mask.clamp_min(_LOWEST).mul(_LOG2E)).contiguous()


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, in_base2: bool = False
) -> Tensor:
    """softmax(query · keyᵀ · scale + mask) · value, the softmax in float32.

    query, result: [batch, head, query, width]; key, value: [batch, head, key, width]; computed in bfloat16, at most
    MOST_KEYS and MOST_WIDTH. mask: [period, head or 1, query or 1, key], bool (which keys are looked at) or numbers;
    the batch is a multiple of its period; `in_base2`: it is `base2`'s. A query that is left no key gets zeros. Raises
    MemoryError.
    """
    assert _library is not None
    query, key, value = (part.to(torch.bfloat16) for part in (query, key, value))  # mostly they are
    if mask is not None and not in_base2 and mask.dtype not in (torch.bfloat16, torch.bool):
        mask = base2(mask)
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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, order: Tensor | None = None) -> Tensor:
    """torch.layer_norm over the last dimension, its statistics in float32.

    x: bfloat16 […, width], at most MOST_NORMED; weight, bias: float32 [width]. order: int64 [count], for x of three
    dimensions: which of a sample's rows stands where in the result, [batch, count, width].
    """
    assert _library is not None
    if x.dtype != torch.bfloat16:  # a graph may say so of what is not
        found = torch.layer_norm(x, [x.shape[-1]], weight, bias, eps)
        return found if order is None else found.index_select(1, order)
    x = x.contiguous()
    width = x.shape[-1]
    if order is None:
        out, sizes = torch.empty_like(x), (1, x.numel() // width, x.numel() // width)
    else:
        out = x.new_empty(len(x), len(order), width)
        sizes = (len(x), x.shape[1], len(order))
    pointers = (x.data_ptr(), out.data_ptr(), weight.data_ptr(), bias.data_ptr())
    at = None if order is None else order.data_ptr()
    _library.layer_norm(*pointers, at, *sizes, width, eps, torch.get_num_threads())
    return out


def tiled(matrix: Tensor) -> Tensor:
    """A product's bfloat16 weight [columns, depth], multiples of COLUMNS, as mlp.cpp reads it: the same numbers."""
    columns, depth = matrix.shape
    parts = matrix.view(columns // 32, 2, 16, depth // 32, 16, 2)
    return parts.permute(0, 3, 1, 4, 2, 5).contiguous().view(columns, depth)


def mlp(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
    activation: int,
    other: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """second · activation(first · x + first_bias) + second_bias + other, what is between them rounded to bfloat16.

    x, other: bfloat16 […, width], […, columns]. first, second: `tiled` weights [between, width], [columns, between];
    biases: float32. activation: one of ACTIVATIONS'. norm: weight, bias (float32) and eps of a layer norm that x goes
    through first. Raises MemoryError.
    """
    assert _library is not None
    x = x.to(torch.bfloat16).contiguous()
    (between, width), columns = first.shape, len(second)
    if other is not None:
        other = other.to(torch.bfloat16).contiguous()
    out = x.new_empty(*x.shape[:-1], columns)
    call = _MlpCall(
        *(x.data_ptr(), None if other is None else other.data_ptr(), out.data_ptr()),
        *(part.data_ptr() for part in (first, second, first_bias, second_bias)),
        rows=x.numel() // width,
        width=width,
        between=between,
        columns=columns,
        activation=activation,
        threads=torch.get_num_threads(),
    )
    if norm is not None:
        weight, bias, call.eps = norm
        call.norm_weight, call.norm_bias = weight.data_ptr(), bias.data_ptr()
    if _library.mlp(call):
        raise MemoryError("an MLP's buffers")
    return out


def _name() -> str:
    """By what it is made of: another source, or other flags, is another artefact."""
    made_of = b"".join(_path(name).read_bytes() for name in (*_SHARED, *sources()))
    made_of += repr([_FLAGS, _options(), os.environ.get("CXX", "")]).encode()
    return f"native-{hashlib.sha256(made_of).hexdigest()[:32]}.so"


def _path(name: str) -> Path:
    return Path(__file__).with_name(name)


def _options() -> list[str]:
    """What the compiler is told of the processor."""
    needed = dict.fromkeys(feature for name in sources() for feature in _SOURCES[name])
    return [_OPTIONS.get(feature, f"-m{feature}") for feature in needed]


def _compiled() -> bytes:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0] if compiler.split() else "") is None:
        raise Unlowerable(f"native needs GCC once, and there is no {compiler} here: install one, or set CXX")
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "native.so"
        files = [str(_path(name)) for name in sources()]
        command = [*compiler.split(), *_FLAGS, *_options(), "-o", str(made), *files]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unlowerable(f"{compiler} could not compile native code: {error}") from error
        if done.returncode or not made.is_file():
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
            raise Unlowerable(f"{compiler} could not compile native code: {lines[0]}")
        return made.read_bytes()


def _loaded(content: bytes) -> ctypes.CDLL:
    """From memory: what is loaded is what was verified, whatever happens to a file."""
    handle = os.memfd_create("mmpipe-native")
    try:
        with open(handle, "wb", closefd=False) as file:
            file.write(content)
        return ctypes.CDLL(f"/proc/self/fd/{handle}")
    except OSError as error:
        raise Unlowerable(f"native code can't be loaded: {error}") from error
    finally:
        os.close(handle)
