"""Attention that reads its heads where a product left them, and writes them where the next one reads them.

    product → slice, reshape, transpose (three times) → attention → permute, reshape, contiguous → product
    product → attention_within → product

The views cost no copy, but an operation each: of a row alone, together as long as the attention itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mmpipe.graphs.backends.norms import put
from mmpipe.graphs.backends.operations import attention, attention_within
from mmpipe.graphs.fuse import mark_of

aten = torch.ops.aten

_SHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_MOVES = (aten.slice.Tensor, aten.select.int, aten.transpose.int, aten.permute.default, aten.contiguous.default)
_BATCH = 3  # how large it is while views are tried out


def read_within(made: fx.GraphModule) -> None:
    """In place, every attention whose views are known."""
    for node in list(made.graph.nodes):
        if node.target is attention:
            _replace(made.graph, node)


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    query, key, value, *rest = cast("tuple[Any, ...]", node.args)
    batch = (mark_of(query).shape or ("",))[0]
    found = [_held(part, batch) for part in (query, key, value)]
    if any(one is None for one in found):
        return
    (q, seen_q), (k, seen_k), (v, seen_v) = cast("list[tuple[fx.Node, Tensor]]", found)
    _, heads, queries, width = seen_q.shape
    keys = seen_k.shape[2]
    if not seen_k.shape == seen_v.shape == (_BATCH, heads, keys, width):
        return
    last, result = _followed(node, batch, (queries, heads, width))
    if last is None:
        return
    begins = tuple(int(seen.storage_offset()) for seen in (seen_q, seen_k, seen_v))
    strides = tuple(seen.stride()[:3] for seen in (seen_q, seen_k, seen_v))
    put(graph, last, attention_within, (q, k, v, begins, strides, (heads, queries, keys, width), result, *rest))


def _held(node: fx.Node, batch: int | str) -> tuple[fx.Node, Tensor] | None:
    """What a view is of, and the view of as much; None: it is none, or one that strides do not say."""
    views = []
    while node.target in (*_SHAPES, *_MOVES):
        if node.target is not aten.contiguous.default:  # a copy of the same numbers: they are read where they were
            views.append(node)
        node = cast("fx.Node", node.args[0])
    shape = mark_of(node).shape
    if not views or mark_of(node).dtype != torch.bfloat16 or not _one_batch(shape, batch):
        return None
    base = torch.empty([_BATCH, *cast("tuple[int, ...]", shape)[1:]], dtype=torch.uint8)
    seen = _seen(base, views[::-1], batch)
    if seen is None or seen.ndim != 4 or len(seen) != _BATCH or seen.stride(3) != 1 or not _same(seen, base):
        return None
    # a sample's own numbers: a step of the batch is its row's
    return (node, seen) if seen.stride(0) == base[0].numel() > seen.storage_offset() else None


def _followed(node: fx.Node, batch: int | str, shape: Sequence[int]) -> tuple[fx.Node | None, tuple[int, ...]]:
    """The last of the views of an attention after which its numbers lie as it writes them, [query, head, width], and
    the shape of a sample there."""
    base = torch.empty([_BATCH, *shape], dtype=torch.uint8)
    seen: Tensor | None = base.transpose(1, 2)
    best: tuple[fx.Node | None, tuple[int, ...]] = None, ()
    while len(node.users) == 1:
        (node,) = node.users
        if node.target not in (*_SHAPES, *_MOVES) or seen is None:
            break
        seen = _seen(seen, [node], batch)
        if seen is None or not _same(seen, base) or seen.storage_offset():
            break
        if len(seen) == _BATCH and seen.is_contiguous() and seen.numel() == base.numel():
            best = node, tuple(seen.shape[1:])
    return best


def _seen(x: Tensor, views: Sequence[fx.Node], batch: int | str) -> Tensor | None:
    """x through views, its batch being _BATCH; None where one is not what its mark says: somebody edited it."""
    for view in views:
        shape = mark_of(view).shape
        if view.kwargs or not _one_batch(shape, batch):
            return None
        arguments = list(view.args[1:])
        if view.target in _SHAPES:
            sizes = list(cast("Sequence[Any]", arguments[0]))
            arguments = [[_BATCH if isinstance(sizes[0], fx.Node) else sizes[0], *sizes[1:]]]
        if any(isinstance(one, fx.Node) for one in pytree.tree_leaves(arguments)):
            return None
        try:
            x = cast("Any", view.target)(x, *arguments)
        except RuntimeError:
            return None
        if x.shape != (_BATCH, *cast("tuple[int, ...]", shape)[1:]):
            return None
    return x


def _one_batch(shape: Sequence[int | str] | None, batch: int | str) -> bool:
    """Whether the first dimension alone is of the batch, and is the heads'."""
    first = shape[0] if shape else None
    return first == batch and all(isinstance(size, int) for size in (shape or ())[1:])


def _same(x: Tensor, base: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
