"""Attention that a model writes out, softmax(q kᵀ · scale + bias) v, as one operation, which never holds the scores.

What is added to the scores (a bias by relative position, a mask of windows, one of padding) is joined into one mask; of
what no input reaches it is a constant, computed here. Products that read the same value become one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from mmpipe.graphs.fuse import FusedGraph, get_tensor, mark_of, set_tensor
from mmpipe.graphs.plan import HEAD, Mark

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def join_attention(graph: FusedGraph) -> int:
    """Returns how many were found. Heads are left as they are: the copies for different exits have different masks, one
    would be joined and another not, and the same sample would get other last bits from each."""
    found = 0
    for node in list(graph.graph.nodes):
        scores = _scores(node) if mark_of(node).branch != HEAD else None
        if scores is not None:
            found += _join(graph, node, scores)
    graph.graph.eliminate_dead_code()
    return found


@dataclass(frozen=True)
class _Scores:
    """`product`: of queries and keys, times `scale`; `added`: additions and reshapes after it, in their order."""

    product: fx.Node
    scale: float
    added: tuple[fx.Node, ...]


def _scores(node: fx.Node) -> _Scores | None:
    """Where `node` is a product of softmax's result and values: what softmax was taken of."""
    if node.target not in _PRODUCTS or not _is(node.args[0], aten.softmax.int):
        return None
    softmax: Any = node.args[0]
    shape = mark_of(softmax).shape
    if len(softmax.users) != 1 or shape is None or len(shape) != 4 or softmax.args[1] not in (-1, 3):
        return None
    if mark_of(softmax).dtype != torch.float32 or not _four(node.args[1]):
        return None
    added: list[fx.Node] = []
    one: Any = softmax.args[0]
    while _is(one, aten.add.Tensor, *_RESHAPES) and len(one.users) == 1 and not one.kwargs:
        added.append(one)
        one = one.args[0] if one.target in _RESHAPES or _leads_to_product(one.args[0]) else one.args[1]
    scale = 1.0
    while _is(one, aten.mul.Tensor, aten.div.Tensor) and len(one.users) == 1 and isinstance(one.args[1], (int, float)):
        scale = scale * one.args[1] if one.target is aten.mul.Tensor else scale / one.args[1]
        one = one.args[0]
    if not _is(one, *_PRODUCTS) or len(one.users) != 1 or mark_of(one).shape != shape:
        return None
    return _Scores(one, scale, tuple(reversed(added))) if all(map(_four, one.args)) else None


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _four(node: Any) -> bool:
    return isinstance(node, fx.Node) and len(mark_of(node).shape or ()) == 4


def _leads_to_product(node: Any) -> bool:
    between = (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, *_RESHAPES)
    while _is(node, *between):
        node = node.args[0]
    return _is(node, *_PRODUCTS)


def _join(graph: FusedGraph, node: fx.Node, scores: _Scores) -> bool:
    queries, keys = scores.product.args
    assert isinstance(keys, fx.Node)
    with graph.graph.inserting_before(node):
        mask = None
        if scores.added:
            mask = _constant_mask(graph, node, scores) or _read_mask(graph, scores)
            if mask is None:
                return False
        of = mark_of(keys)
        assert of.shape is not None
        turned = graph.graph.call_function(aten.transpose.int, (keys, -1, -2))
        turned.meta["mmpipe"] = replace(of, shape=(*of.shape[:2], of.shape[3], of.shape[2]))
        arguments = (queries, turned, node.args[1], mask)
        made = graph.graph.call_function(
            aten.scaled_dot_product_attention.default, arguments, {"scale": scores.scale}
        )  # fmt: skip
    made.meta["mmpipe"] = mark_of(node)
    node.replace_all_uses_with(made)
    return True


def _constant_mask(graph: FusedGraph, node: fx.Node, scores: _Scores) -> fx.Node | None:
    """What is added where no input reaches it; [1, heads, queries, keys], or one for each window of a sample."""
    others = [n for step in scores.added for n in step.all_input_nodes if n not in (scores.product, *scores.added)]
    known = [n for n in others if n.op == "get_attr" or mark_of(n).batch_multiple is not None]
    behind = {n for step in scores.added for n in step.all_input_nodes} - set(known)
    if any(not _behind(n, scores.product) for n in behind):
        return None
    shape = mark_of(scores.product).shape
    assert shape is not None
    times = 1 if shape[0] == "B" else int(str(shape[0]).partition("*")[0]) if isinstance(shape[0], str) else 0
    if not times or not all(isinstance(size, int) for size in shape[1:]):
        return None
    one, two = (_added(graph, scores, batch, times) for batch in (1, 2))
    if not torch.equal(torch.cat([one, one]), two):
        return None
    same = bool((one == one[:1]).all())
    name = f"{mark_of(node).branch}.folded.mask_of_{node.name}"
    set_tensor(graph, name, (one[:1] if same else one).contiguous())
    mask = graph.graph.get_attr(name)
    mark = mark_of(node)
    mask.meta["mmpipe"] = replace(mark, shape=tuple(get_tensor(graph, name).shape))
    return mask if same else _repeated(graph, mask, mark, shape)


def _behind(node: fx.Node, product: fx.Node) -> bool:
    while node is not product and _is(node, aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, *_RESHAPES):
        node = node.args[0] if _leads_to_product(node.args[0]) else node.args[1]  # type: ignore[assignment]
    return node is product


def _added(graph: FusedGraph, scores: _Scores, batch: int, times: int) -> Tensor:
    """The additions and reshapes, run on zeros."""
    shape = mark_of(scores.product).shape
    assert shape is not None
    value = torch.zeros(times * batch, *[int(size) for size in shape[1:]])
    for step in scores.added:
        first = value

        def argument(node: fx.Node, first: Tensor = first) -> Any:
            multiple = mark_of(node).batch_multiple
            if multiple is not None:
                return multiple * batch
            return get_tensor(graph, str(node.target)) if node.op == "get_attr" else first

        value = step.target(*fx.map_arg(step.args, argument))  # type: ignore[operator]
    return value


def _repeated(graph: FusedGraph, mask: fx.Node, mark: Mark, shape: tuple[int | str, ...]) -> fx.Node:
    """[windows, heads, queries, keys] once for each sample."""
    given = next(n for n in graph.graph.nodes if n.op == "placeholder" and mark_of(n).branch == mark.branch)
    windows, *rest = mark_of(mask).shape or ()
    size = graph.graph.call_function(aten.sym_size.int, (given, 0))
    size.meta["mmpipe"] = Mark(mark.branch, mark.layer, mark.copy, batch_multiple=1)
    each = graph.graph.call_function(aten.expand.default, (mask, [size, *[-1] * len(mark_of(mask).shape or ())]))
    each.meta["mmpipe"] = replace(mark, shape=("B", windows, *rest))
    flat = graph.graph.call_function(aten.reshape.default, (each, [-1, *rest]))
    flat.meta["mmpipe"] = replace(mark, shape=(shape[0], *rest))
    return flat


def _read_mask(graph: FusedGraph, scores: _Scores) -> fx.Node | None:
    """What is added where inputs reach it: as it is, [batch or 1, heads or 1, queries or 1, keys]."""
    if any(step.target in _RESHAPES for step in scores.added):
        return None
    masks: list[fx.Node] = []
    for step in scores.added:
        added = [n for n in step.all_input_nodes if not _behind(n, scores.product)]
        if len(added) != 1 or not _four(added[0]) or mark_of(added[0]).dtype != torch.float32:
            return None  # none: a number is added
        masks += added
    joined = masks[0]
    for mask in masks[1:]:
        one, other = mark_of(joined), mark_of(mask)
        shape = tuple(b if a == 1 else a for a, b in zip(one.shape or (), other.shape or (), strict=True))
        joined = graph.graph.call_function(aten.add.Tensor, (joined, mask))
        joined.meta["mmpipe"] = replace(one, shape=shape)
    return joined


# --- products of the same value -------------------------------------------------------------------------------------


def merge_products(graph: FusedGraph) -> int:
    """linear(x, a), linear(x, b), … → parts of linear(x, [a; b; …]); returns how many products fewer there are.

    Those of attention alone (queries, keys, values): parts are views, and what reads them must not want them dense.
    """
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if _is(node, aten.linear.default) and _constant(node):
            mark = mark_of(node)
            groups.setdefault((node.args[0], mark.branch, mark.copy, mark.layer, mark.dtype), []).append(node)
    fewer = 0
    for group in groups.values():
        if len(group) > 1 and all(_read_by_attention(node) for node in group):
            _merge(graph, group)
            fewer += len(group) - 1
    graph.graph.eliminate_dead_code()
    return fewer


def _constant(node: fx.Node) -> bool:
    return all(n.op == "get_attr" for n in node.all_input_nodes[1:]) and mark_of(node).shape is not None


def _read_by_attention(node: fx.Node, depth: int = 8) -> bool:
    """Whether all that reads it is attention, behind operations that move."""
    movers = (*_RESHAPES, aten.transpose.int, aten.permute.default, aten.contiguous.default, aten.unflatten.int)
    return depth > 0 and all(
        _is(user, aten.scaled_dot_product_attention.default)
        or (_is(user, *movers) and _read_by_attention(user, depth - 1))
        for user in node.users
    )


def _merge(graph: FusedGraph, group: list[fx.Node]) -> None:
    first = group[0]
    weights = [get_tensor(graph, str(node.args[1].target)) for node in group]  # type: ignore[union-attr]
    biases = [_bias(graph, node, weight) for node, weight in zip(group, weights, strict=True)]
    tensors = [("weight", torch.cat(weights))]
    if any(bias is not None for bias in biases):
        plain = [weight.new_zeros(len(weight)) if bias is None else bias
                 for bias, weight in zip(biases, weights, strict=True)]  # fmt: skip
        tensors.append(("bias", torch.cat(plain)))
    mark = mark_of(first)
    assert mark.shape is not None
    wide = replace(mark, shape=(*mark.shape[:-1], sum(map(len, weights))))
    with graph.graph.inserting_before(first):
        constants = []
        for name, tensor in tensors:
            target = f"{mark.branch}.folded.{name}s_of_{first.name}"
            set_tensor(graph, target, tensor)
            constants.append(graph.graph.get_attr(target))
            constants[-1].meta["mmpipe"] = replace(mark, shape=tuple(tensor.shape))
        joined = graph.graph.call_function(aten.linear.default, (first.args[0], *constants))
        joined.meta["mmpipe"] = wide
        begin = 0
        for node, weight in zip(group, weights, strict=True):
            part = graph.graph.call_function(aten.slice.Tensor, (joined, -1, begin, begin + len(weight)))
            part.meta["mmpipe"] = mark_of(node)
            begin += len(weight)
            node.replace_all_uses_with(part)


def _bias(graph: FusedGraph, node: fx.Node, weight: Tensor) -> Tensor | None:
    given = node.args[2] if len(node.args) > 2 else None
    return get_tensor(graph, str(given.target)) if isinstance(given, fx.Node) else None
