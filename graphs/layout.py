"""Layout: chains of views, transpositions and copies, each written the shortest way.

Whatever it was written with, most of what a chain does (moves.py) is

    view (split dimensions) → select → permute → reshape (merge dimensions)

and the rest, if it moves whole rows (windows that are rolled, neighbours that are joined), one index_select. A learned
product behind a chain that put the batch second comes before the chain: such a product would be taken apart into one
per sample, each with its own copy of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from mmpipe.graphs.fuse import FusedGraph, mark_of, set_tensor
from mmpipe.graphs.moves import COPIES, VIEWS, Chains, Digit, Read, Shape, merged, moves, per_sample, product
from mmpipe.graphs.plan import Mark

aten = torch.ops.aten

Step = tuple[Any, tuple[Any, ...], Shape]  # operation, what follows its tensor, shape of the result


def straighten(graph: FusedGraph) -> int:
    """Returns how many nodes this removed."""
    before = len(graph.graph.nodes)
    for node in graph.graph.nodes:
        if node.target in VIEWS:  # what it views may get other strides
            node.target = aten.reshape.default
    chains = Chains()
    for node in list(graph.graph.nodes):
        if node.target is aten.linear.default:
            _batch_first(graph, node, chains)
    chains = Chains()
    for node in list(graph.graph.nodes):
        users = [user for user in node.users if not moves(user) or chains.root(user) is None]
        if users and moves(node) and mark_of(node).shape is not None:
            _shorten(graph, node, users, chains)
    graph.graph.eliminate_dead_code()
    return before - len(graph.graph.nodes)


# --- the shortest way -----------------------------------------------------------------------------------------------


def _views(root: Shape, read: Read) -> list[Step] | None:
    """The chain as view, select, permute, reshape; None where it takes a part of a dimension, or repeats one."""
    base, digits = read.base, read.lines
    order = sorted((digit.stride, dim, place) for dim, line in enumerate(digits) for place, digit in enumerate(line))
    per_row = per_sample(root)
    # the fastest first; with its place in the result, or what is picked of it
    view: list[tuple[Digit, tuple[int, int] | int]] = []
    reached = 1
    for stride, dim, place in order:
        digit = digits[dim][place]
        if stride % reached:
            return None
        if stride > reached:
            view.append((Digit(stride // reached, reached), base // reached % (stride // reached)))
        if base // stride % digit.size and not digit.batch:
            return None  # begins within
        view.append((digit, (dim, place)))
        reached = stride * (digit.batch or digit.size)
        if digit.batch and reached != per_row * (1 if stride < per_row else digit.batch):
            return None
    batched = [digit for digit, _ in view if digit.batch]
    if len(batched) != 1 or not view[-1][0].batch or base >= per_row:
        return None
    view.reverse()
    steps: list[Step] = []
    shape: list[int | str] = [digit.shape for digit, _ in view]
    if tuple(shape) != root:
        steps.append((aten.reshape.default, ([digit.size for digit, _ in view],), tuple(shape)))
    for number in reversed(range(len(view))):
        picked = view[number][1]
        if isinstance(picked, int):
            shape.pop(number)
            steps.append((aten.select.int, (number, picked), tuple(shape)))
    kept = [where for _, where in view if not isinstance(where, int)]
    wanted = sorted(kept)
    permuted = [kept.index(where) for where in wanted]
    if permuted != list(range(len(kept))):
        shape = [digits[dim][place].shape for dim, place in wanted]
        steps.append((aten.permute.default, (permuted,), tuple(shape)))
    result = tuple(merged(line) for line in digits)
    if result != tuple(shape):
        sizes = [size if isinstance(size, int) else -1 for size in result]
        steps.append((aten.reshape.default, (sizes,), result))
    return steps


# --- writing it down --------------------------------------------------------------------------------------------------


def _shorten(graph: FusedGraph, node: fx.Node, users: list[fx.Node], chains: Chains) -> None:
    root = chains.root(node)
    if root is None:
        return
    between = chains.between(node)
    length = len(between)
    from_, to = mark_of(root).shape, mark_of(node).shape
    assert from_ is not None
    assert to is not None
    read = chains.read(node)
    steps = None if read is None else _views(from_, read)
    if steps is None or (_copies(steps) and root.target not in _TURNED):
        chosen = chains.rows(node)
        if chosen is not None and chosen[0].numel() * chosen[1] == per_sample(from_):
            steps = _gather(graph, node, chosen, from_, to)
    if steps is None:
        return
    if len(steps) > length or (len(steps) == length and node.target not in COPIES):
        return
    if not steps and root.op == "placeholder":  # an encoder that hands on its input still needs something to run
        users = [user for user in users if user.op != "output"]
    made = _write(graph, node, root, steps)
    # Dense where it was: sums over what lies otherwise round otherwise, and a value that is carried lies dense.
    copied = any(one.target in COPIES for one in between)
    if node.target in COPIES or any(user.target in _STRICT or (copied and user.target not in _TAKES) for user in users):
        made = _dense(graph, node, made, steps)
    for user in users:
        user.replace_input_with(node, made)


# whose result lies in another order than its shape tells
_TURNED = {aten.scaled_dot_product_attention.default, aten.conv1d.default, aten.conv2d.default}
_TAKES = {aten.scaled_dot_product_attention.default}  # an operand however it lies
# what would take a transposed operand apart
_STRICT = {aten.linear.default, aten.matmul.default, aten.bmm.default, aten.conv1d.default, aten.conv2d.default}


def _copies(steps: Sequence[Step]) -> bool:
    """Whether dimensions are joined that were moved."""
    return len(steps) > 1 and steps[-1][0] is aten.reshape.default and steps[-2][0] is aten.permute.default


def _gather(graph: FusedGraph, node: fx.Node, chosen: tuple[Tensor, int], root: Shape, to: Shape) -> list[Step]:
    rows, width = chosen
    name = f"{mark_of(node).branch}.folded.rows_of_{node.name}"
    set_tensor(graph, name, rows)
    table = ("B", per_sample(root) // width, width)
    picked = ("B", rows.numel(), width)
    steps: list[Step] = [] if table == root else [(aten.reshape.default, ([-1, *table[1:]],), table)]
    steps.append((aten.index_select.default, (1, name), picked))
    if picked != to:
        steps.append((aten.reshape.default, ([size if isinstance(size, int) else -1 for size in to],), to))
    return steps


def _write(graph: FusedGraph, before: fx.Node, root: fx.Node, steps: Sequence[Step]) -> fx.Node:
    mark, made = mark_of(before), root
    with graph.graph.inserting_before(before):
        for target, arguments, shape in steps:
            if target is aten.index_select.default:
                rows = graph.graph.get_attr(arguments[1])
                rows.meta["mmpipe"] = Mark(mark.branch, mark.layer, mark.copy, (shape[1],), torch.int64)
                arguments = (arguments[0], rows)
            made = graph.graph.call_function(target, (made, *arguments))
            made.meta["mmpipe"] = replace(mark, shape=shape, batch_multiple=None)
    return made


def _dense(graph: FusedGraph, before: fx.Node, made: fx.Node, steps: Sequence[Step]) -> fx.Node:
    moved = [target for target, *_ in steps if target in (aten.permute.default, aten.select.int)]
    if not moved or steps[-1][0] is aten.index_select.default:
        return made
    return _write(graph, before, made, [(aten.contiguous.default, (), steps[-1][2])])


def _batch_first(graph: FusedGraph, linear: fx.Node, chains: Chains) -> None:
    """linear(moved) → moved(linear), where what is moved does not have the batch first."""
    moved = linear.args[0]
    if not isinstance(moved, fx.Node) or not moves(moved) or (root := chains.root(moved)) is None:
        return
    from_, to = mark_of(root).shape, mark_of(moved).shape
    if from_ is None or to is None or len(to) < 2:
        return
    read = chains.read(moved)
    if read is None or _views(from_, read) is None:
        return
    base, digits = read.base, read.lines
    *rows, _ = digits
    flat = [(dim, place) for dim, line in enumerate(rows) for place in range(len(line))]
    leads = [where for where in flat if digits[where[0]][where[1]].batch]
    if base or len(leads) != 1 or leads[0] == flat[0]:
        return
    (dim, place) = leads[0]
    others = [where for where in flat if where != leads[0]]
    ordered = ((digits[dim][place],), tuple(digits[d][p] for d, p in others), digits[-1])
    steps = _views(from_, Read(0, ordered))
    if steps is None or product([digit.count for line in ordered for digit in line]) != per_sample(from_):
        return
    # the product of rows with the batch first …
    first = _dense(graph, linear, _write(graph, linear, root, steps), steps) if steps else root
    shape = tuple(merged(line) for line in ordered)
    width = mark_of(linear).shape[-1]  # type: ignore[index]
    with graph.graph.inserting_before(linear):
        made = graph.graph.call_function(aten.linear.default, (first, *linear.args[1:]))
    made.meta["mmpipe"] = replace(mark_of(linear), shape=(*shape[:-1], width))
    # … and its result as the chain had put them
    result: dict[tuple[int, int], Digit] = {}
    stride = int(width)
    for where in reversed(others):
        digit = digits[where[0]][where[1]]
        result[where] = replace(digit, stride=stride)
        stride *= digit.size
    result[leads[0]] = replace(digits[dim][place], stride=stride)
    back = [tuple(result[d, p] for p in range(len(line))) for d, line in enumerate(rows)]
    steps = _views((*shape[:-1], width), Read(0, (*back, (Digit(int(width), 1),))))
    assert steps is not None
    linear.replace_all_uses_with(_write(graph, linear, made, steps))
    graph.graph.erase_node(linear)
