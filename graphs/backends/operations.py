"""Tensors through the functions that kernels.py has loaded: attention, layer norm, a transformer's MLP.

What is the same in every call of one place in a graph (strides, weights) is put together once: of a row alone, calls
from Python take as long as what they compute.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmpipe.graphs.backends import kernels

MOST_KEYS = 1024  # a block's scores stay in the second cache
MOST_WIDTH = 256
MOST_NORMED = 4096  # width of a layer norm
COLUMNS = 32  # the widths of an MLP are multiples of it
ACTIVATIONS = {"relu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4}  # as mlp.cpp counts them

Strides = tuple[int, ...]  # from one batch, head and token to the next, in numbers
Norm = tuple[Tensor, Tensor, float]  # weight and bias, float32, and eps

_LOG2E = 1.4426950408889634
_LOWEST = -2e38  # times that it is still a number
_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.bool: 3}  # of masks, as attention.cpp counts them


class _Strides(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_long) for name in ("batch", "head", "token"))


class _Attention(ctypes.Structure):
    """As attention.cpp has it."""

    _fields_ = (
        *((name, _Strides) for name in ("query", "key", "value", "out", "mask")),
        *((name, ctypes.c_long) for name in ("heads", "queries", "keys", "width", "kind")),
        ("scale", ctypes.c_float),
    )


class _Mlp(ctypes.Structure):
    """As mlp.cpp has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("first", "second", "first_bias", "second_bias")),
        *((name, ctypes.c_void_p) for name in ("norm_weight", "norm_bias", "then_weight", "then_bias")),
        *((name, ctypes.c_long) for name in ("width", "between", "columns", "activation", "residual")),
        *((name, ctypes.c_float) for name in ("norm_eps", "then_eps")),
    )


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
    batch, heads, queries, width = query.shape
    parts = [part.to(torch.bfloat16) for part in (query, key, value)]  # mostly they are
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in parts]
    out = parts[0].new_empty(batch, queries, heads, width)  # as what follows reads it
    sizes = (heads, queries, key.shape[2], width)
    _attend(
        [part.data_ptr() for part in parts],
        out,
        (*(part.stride()[:3] for part in parts), out.transpose(1, 2).stride()[:3]),
        sizes,
        mask,
        scale,
        in_base2,
    )
    return out.transpose(1, 2)


def attention_within(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begins: tuple[int, ...],
    strides: tuple[Strides, ...],
    sizes: tuple[int, ...],
    result: tuple[int, ...],
    mask: Tensor | None,
    scale: float,
    in_base2: bool = False,
) -> Tensor:
    """`attention` of heads inside wider rows, [batch, …]: read where they lie, without a view of each.

    begins, strides: of queries, keys and values: where in a row the first head is, and the steps from there. sizes:
    heads, queries, keys, width. Result: [batch, *result], its numbers as [query, head, width]. Raises RuntimeError for
    rows of another size.
    """
    q = _dense(query)
    k = q if key is query else _dense(key)
    v = q if value is query else k if value is key else _dense(value)
    held = (q, k, v)
    if any(part.numel() != len(query) * steps[0] for part, steps in zip(held, strides, strict=True)):
        raise RuntimeError("attention: what holds the heads is not of the size that the graph says")
    out = q.new_empty(len(q), *result)
    heads, queries, _, width = sizes
    pointers = [part.data_ptr() + 2 * begin for part, begin in zip(held, begins, strict=True)]
    step = heads * width
    _attend(pointers, out, (*strides, (queries * step, width, step)), sizes, mask, scale, in_base2)
    return out


def _dense(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).contiguous()  # mostly it is


def _attend(
    pointers: Sequence[int],
    out: Tensor,
    strides: tuple[Strides, ...],
    sizes: tuple[int, ...],
    mask: Tensor | None,
    scale: float,
    in_base2: bool,
) -> None:
    """strides: of batch, head and token of queries, keys, values and out. sizes: heads, queries, keys, width."""
    mask_at, period, kind = None, 1, 0
    mask_strides: Strides = (0, 0, 0)
    if mask is not None:
        if not in_base2 and mask.dtype not in (torch.bfloat16, torch.bool):
            mask = base2(mask)
        if mask.stride(-1) != 1:
            mask = mask.contiguous()
        steps = zip(mask.shape[:3], mask.stride()[:3], strict=True)
        mask_strides = tuple(0 if size == 1 else step for size, step in steps)
        mask_at, period, kind = mask.data_ptr(), len(mask), _KINDS[mask.dtype]
    shape = _shape_of(strides, mask_strides, sizes, kind, scale)
    threads = torch.get_num_threads()
    if kernels.library.attention(shape, *pointers, out.data_ptr(), mask_at, len(out), period, threads):
        raise MemoryError("attention's buffers")


@functools.lru_cache(maxsize=1024)
def _shape_of(strides: tuple[Strides, ...], mask: Strides, sizes: tuple[int, ...], kind: int, scale: float) -> Any:
    return ctypes.byref(_Attention(*(_Strides(*steps) for steps in (*strides, mask)), *sizes, kind, scale))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, order: Tensor | None = None) -> Tensor:
    """torch.layer_norm over the last dimension, its statistics in float32.

    x: bfloat16 […, width], at most MOST_NORMED; weight, bias: float32 [width]. order: int64 [count], for x of three
    dimensions: which of a sample's rows stands where in the result, [batch, count, width].
    """
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
    kernels.library.layer_norm(*pointers, at, *sizes, width, eps, torch.get_num_threads())
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
    norm: Norm | None = None,
    then: Norm | None = None,
    residual: bool = False,
) -> Tensor:
    """second · activation(first · x + first_bias) + second_bias + other, what is between them rounded to bfloat16.

    x, other: bfloat16 […, width], […, columns]. first, second: `tiled` weights [between, width], [columns, between];
    biases: float32. activation: one of ACTIVATIONS'. norm, then: of a layer norm that x goes through first, and of one
    that the result goes through. residual: what x becomes is added too, instead of `other`. Raises MemoryError.
    """
    x = _dense(x)
    if other is not None:
        other = _dense(other)
    (between, width), columns = first.shape, len(second)
    out = x.new_empty(*x.shape[:-1], columns)
    weights = (first.data_ptr(), second.data_ptr(), first_bias.data_ptr(), second_bias.data_ptr())
    norms, eps = _norm_of(norm), (0.0 if norm is None else norm[2], 0.0 if then is None else then[2])
    shape = _mlp_of(*weights, *norms, *_norm_of(then), width, between, columns, activation, residual, *eps)
    to_add = None if other is None else other.data_ptr()
    rows = x.numel() // width
    if kernels.library.mlp(shape, x.data_ptr(), to_add, out.data_ptr(), rows, torch.get_num_threads()):
        raise MemoryError("an MLP's buffers")
    return out


def _norm_of(norm: Norm | None) -> tuple[int | None, int | None]:
    return (None, None) if norm is None else (norm[0].data_ptr(), norm[1].data_ptr())


@functools.lru_cache(maxsize=1024)
def _mlp_of(*fields: Any) -> Any:
    """Of addresses and numbers: what lies there is no part of it."""
    return ctypes.byref(_Mlp(*fields))
