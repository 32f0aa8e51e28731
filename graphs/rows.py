"""Rows in the order in which most of what reads them wants them.

A transformer over windows puts its rows into windows before each attention, and back after it. What stands between
(normalisations, products with weights, activations, additions) treats each row by itself and does not care where it
is. So the order of a whole stretch of such operations is chosen once: that in which the most of the choices of rows at
its borders have nothing left to do.

    x' = x[order]        a stretch's values, put in another order
    x[rows]  = x'[back[rows]]                  where one leaves it
    y[rows]' = y[rows[order]]                  where one comes in
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from mmpipe.graphs.fuse import FusedGraph, get_tensor, mark_of, set_tensor
from mmpipe.graphs.plan import Mark

aten = torch.ops.aten

_ALONE = {
    *(aten.gelu.default, aten.relu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default),
    *(aten.hardtanh.default, aten.hardswish.default, aten.leaky_relu.default),
}
_PAIRS = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


def reorder(graph: FusedGraph) -> int:
    """Returns how many choices of rows were left out."""
    before = _choices(graph)
    constants: dict[bytes, str] = {}
    for stretch in _stretches(graph):
        order = _best(graph, stretch)
        if order is not None:
            _apply(graph, stretch, order, constants)
            graph.graph.eliminate_dead_code()
    return before - _choices(graph)


def _choices(graph: FusedGraph) -> int:
    return sum(node.target is aten.index_select.default for node in graph.graph.nodes)


# --- stretches --------------------------------------------------------------------------------------------------------


@dataclass
class _Stretch:
    """Operations that are joined by values of the same rows [batch, rows, …]."""

    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return int(_shape(self.nodes[0])[1])


def _stretches(graph: FusedGraph) -> list[_Stretch]:
    """Found before any is changed; a stretch's own nodes stay."""
    of: dict[fx.Node, _Stretch] = {}
    for node in graph.graph.nodes:
        sources = _sources(node)
        if sources is None:
            continue
        mine = of[node] = _Stretch([node])
        for source in sources:
            other = of.get(source)
            if other is None or other is mine:
                continue
            larger, smaller = (other, mine) if len(other.nodes) >= len(mine.nodes) else (mine, other)
            larger.nodes += smaller.nodes
            of.update(dict.fromkeys(smaller.nodes, larger))
            mine = larger
    return list({id(stretch): stretch for stretch in of.values()}.values())


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return mark_of(node).shape or ()


def _in_rows(node: Any) -> bool:
    """[batch, rows, features]"""
    return isinstance(node, fx.Node) and mark_of(node).batch_leads and len(_shape(node)) == 3


def _sources(node: fx.Node) -> list[fx.Node] | None:
    """The values whose rows it takes one by one; None: it does more than that, or other things."""
    if node.op != "call_function" or not _in_rows(node):
        return None
    first, others = node.args[0], [n for n in node.all_input_nodes if n is not node.args[0]]
    if node.target is aten.layer_norm.default:
        alone = list(node.args[1]) == [_shape(node)[-1]]  # type: ignore[arg-type]
    elif node.target is aten.linear.default:
        alone = all(n.op == "get_attr" for n in others)
    elif node.target in _ALONE:
        alone = not others
    elif node.target in _PAIRS:
        found = [n for n in node.all_input_nodes if not _of_features(n)]
        same = all(_in_rows(n) and _shape(n) == _shape(node) for n in found)
        return found if same and found else None
    else:
        return None
    fits = _in_rows(first) and _shape(first)[:2] == _shape(node)[:2]  # type: ignore[arg-type]
    return [first] if alone and fits else None  # type: ignore[list-item]


def _of_features(node: fx.Node) -> bool:
    """A constant that is the same for every row."""
    return node.op == "get_attr" and all(size == 1 for size in _shape(node)[:-1])


# --- its borders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A value that comes in. `rows`: chosen of `source`, `width` of which make one row here; None: it is as it is."""

    value: fx.Node
    source: fx.Node
    rows: Tensor | None = None
    width: int = 1


def _entries(graph: FusedGraph, stretch: _Stretch) -> list[_Entry]:
    inside, found = set(stretch.nodes), {}
    for node in stretch.nodes:
        for value in _sources(node) or ():
            if value not in inside and value not in found:
                found[value] = _entry(graph, value)
    return list(found.values())


def _entry(graph: FusedGraph, value: fx.Node) -> _Entry:
    choice, width = value, 1
    if value.target is aten.reshape.default and isinstance(value.args[0], fx.Node):
        choice = value.args[0]
        joined = _in_rows(choice) and _shape(choice)[1] % _shape(value)[1] == 0
        width = _shape(choice)[1] // _shape(value)[1] if joined else 1
        if not joined or _shape(choice)[2] * width != _shape(value)[2]:
            return _Entry(value, value)
    rows = _chosen(graph, choice)
    return _Entry(value, value) if rows is None else _Entry(value, choice.args[0], rows, width)  # type: ignore[arg-type]


def _chosen(graph: FusedGraph, node: fx.Node) -> Tensor | None:
    if node.target is not aten.index_select.default or node.args[1] != 1 or not _in_rows(node.args[0]):
        return None
    rows = node.args[2]
    return get_tensor(graph, str(rows.target)) if isinstance(rows, fx.Node) and rows.op == "get_attr" else None


def _exits(graph: FusedGraph, stretch: _Stretch) -> Iterator[tuple[fx.Node, fx.Node, Tensor | None]]:
    """(value, who reads it outside, the rows that it chooses; None: it wants them as they are)"""
    inside = set(stretch.nodes)
    for node in stretch.nodes:
        for user in node.users:
            if user not in inside:
                yield node, user, _chosen(graph, user)


# --- the order --------------------------------------------------------------------------------------------------------


def _best(graph: FusedGraph, stretch: _Stretch) -> Tensor | None:
    """The order that leaves out the most choices; None where none leaves out any."""
    entries, exits = _entries(graph, stretch), list(_exits(graph, stretch))
    tried = [rows for _, _, rows in exits if rows is not None]
    tried += [_back(entry.rows) for entry in entries if entry.rows is not None and entry.width == 1]
    best, most = None, 0
    for order in tried:
        if not _is_order(order, stretch.rows):
            continue
        left_out = sum(rows is not None and _same(order, rows) for _, _, rows in exits)
        left_out -= len({value for value, _, rows in exits if rows is None})
        for entry in entries:
            if entry.rows is None:
                left_out -= 1
            elif entry.width == 1:
                left_out += _same(entry.rows[order], torch.arange(stretch.rows))
        if left_out > most:
            best, most = order, left_out
    return best


def _is_order(rows: Tensor, count: int) -> bool:
    return rows.shape == (count,) and _same(rows.sort().values, torch.arange(count))


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other))


def _back(rows: Tensor) -> Tensor:
    """The order that undoes an order; nonsense, and no order, for what is none."""
    return rows.argsort()


def _apply(graph: FusedGraph, stretch: _Stretch, order: Tensor, constants: dict[bytes, str]) -> None:
    inside, back = set(stretch.nodes), _back(order)
    leaving: dict[fx.Node, fx.Node] = {}
    for value, user, rows in list(_exits(graph, stretch)):
        if rows is not None:
            user.replace_all_uses_with(_choose(graph, user, value, back[rows], constants))
        else:
            if value not in leaving:
                leaving[value] = _choose(graph, value, value, back, constants, after=True)
            user.replace_input_with(value, leaving[value])
    for entry in _entries(graph, stretch):
        if entry.value in leaving.values():
            continue
        rows = order
        if entry.rows is not None:
            rows = entry.rows.reshape(-1, entry.width)[order].flatten()
        made = _choose(graph, entry.value, entry.source, rows, constants, after=True)
        if entry.width > 1:
            with graph.graph.inserting_after(made):
                joined = graph.graph.call_function(aten.reshape.default, (made, [-1, *_shape(entry.value)[1:]]))
            joined.meta["mmpipe"] = mark_of(entry.value)
            made = joined
        for user in list(entry.value.users):
            if user in inside and user is not made:
                user.replace_input_with(entry.value, made)


def _choose(
    graph: FusedGraph,
    place: fx.Node,
    source: fx.Node,
    rows: Tensor,
    constants: dict[bytes, str],
    *,
    after: bool = False,
) -> fx.Node:
    """source[rows], before or after `place`; the source itself where these are all its rows in their order."""
    if _same(rows, torch.arange(_shape(source)[1])):
        return source
    mark = mark_of(source)
    key = rows.numpy().tobytes() + mark.branch.encode()
    if key not in constants:
        constants[key] = f"{mark.branch}.folded.rows_of_{place.name}_{len(constants)}"
        set_tensor(graph, constants[key], rows.contiguous())
    assert mark.shape is not None
    with graph.graph.inserting_after(place) if after else graph.graph.inserting_before(place):
        picked = graph.graph.get_attr(constants[key])
        picked.meta["mmpipe"] = Mark(mark.branch, mark.layer, mark.copy, (rows.numel(),), torch.int64)
    with graph.graph.inserting_after(picked):
        made = graph.graph.call_function(aten.index_select.default, (source, 1, picked))
    made.meta["mmpipe"] = replace(mark, shape=(mark.shape[0], rows.numel(), *mark.shape[2:]))
    return made
