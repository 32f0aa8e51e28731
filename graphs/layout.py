"""Layout: chains of views, transpositions and copies, each written the shortest way.

Such a chain computes nothing, it only moves. What it does is read off by running it over an arange, for two batch
sizes, whatever it was written with; most are then

    view (split dimensions) → select → permute → reshape (merge dimensions)

and the rest, if it moves whole rows (windows that are rolled, neighbours that are joined), one index_select. A learned
product behind a chain that put the batch second comes before the chain: such a product would be taken apart into one
per sample, each with its own copy of the weights.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from mmpipe.graphs.fuse import FusedGraph, mark_of, set_tensor
from mmpipe.graphs.plan import Mark

aten = torch.ops.aten

_BATCHES = (2, 3)
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_MOVES = {
    *_VIEWS,
    *(aten.reshape.default, aten.transpose.int, aten.permute.default, aten.t.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints, aten.unflatten.int, aten.contiguous.default),
    *(aten.clone.default, aten.select.int, aten.slice.Tensor, aten.roll.default, aten.cat.default),
    *(aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, operator.getitem),
}
_PADS = {aten.pad.default, aten.constant_pad_nd.default}  # moves, where they pad nothing
_COPIES = {aten.contiguous.default, aten.clone.default}
_LEAST_ROW = 16  # numbers: below it, picking rows is slower than copying them
_MOST_NUMBERS = 1 << 22  # of one sample's value: more are not looked at

Step = tuple[Any, tuple[Any, ...], tuple[int | str, ...]]  # operation, what follows its tensor, shape of the result


def straighten(graph: FusedGraph) -> int:
    """Returns how many nodes this removed."""
    before = len(graph.graph.nodes)
    for node in graph.graph.nodes:
        if node.target in _VIEWS:  # what it views may get other strides
            node.target = aten.reshape.default
    chains = _Chains()
    for node in list(graph.graph.nodes):
        if node.target is aten.linear.default:
            _batch_first(graph, node, chains)
    chains = _Chains()
    for node in list(graph.graph.nodes):
        users = [user for user in node.users if not _moves(user) or chains.root(user) is None]
        if users and _moves(node) and mark_of(node).shape is not None:
            _shorten(graph, node, users, chains)
    graph.graph.eliminate_dead_code()
    return before - len(graph.graph.nodes)


def _moves(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in _PADS:
        return isinstance(node.args[1], (list, tuple)) and not any(node.args[1])
    return node.target in _MOVES


class _Chains:
    """Where what moves comes from, and how it was moved."""

    def __init__(self) -> None:
        self._roots: dict[fx.Node, fx.Node | None] = {}
        self._indices: dict[tuple[fx.Node, int], Any] = {}

    def root(self, node: fx.Node) -> fx.Node | None:
        """The one value that a chain begins with: [batch, …]; None: there are several, or its shape is not known."""
        if node not in self._roots:
            if _moves(node):
                found = {self.root(n) for n in node.all_input_nodes if mark_of(n).batch_multiple is None}
                self._roots[node] = found.pop() if len(found) == 1 else None
            else:
                mark = mark_of(node)
                known = node.op != "get_attr" and 0 < _per_sample(mark.shape) <= _MOST_NUMBERS
                self._roots[node] = node if known else None
        return self._roots[node]

    def index(self, node: fx.Node, batch: int) -> Any:
        """For each number of the value, its place among those of the root."""
        key = (node, batch)
        if key not in self._indices:
            if _moves(node):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._argument(n, batch))
                self._indices[key] = node.target(*args, **kwargs)  # type: ignore[operator]
            else:
                shape: Any = mark_of(node).shape
                count = batch * _per_sample(shape)
                self._indices[key] = torch.arange(count, dtype=torch.int32).reshape(-1, *shape[1:])
        return self._indices[key]

    def _argument(self, node: fx.Node, batch: int) -> Any:
        multiple = mark_of(node).batch_multiple
        return self.index(node, batch) if multiple is None else multiple * batch

    def length(self, node: fx.Node) -> int:
        """Operations between the root and the value."""
        seen: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            one = waiting.pop()
            if one not in seen and _moves(one):
                seen.add(one)
                waiting.extend(one.all_input_nodes)
        return len(seen)


# --- what a chain does ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digit:
    """`size` steps of `stride` places of the root. `batch`: the size is that many times the batch, -1 stands for it."""

    size: int
    stride: int
    batch: int = 0

    @property
    def shape(self) -> int | str:
        return self.size if not self.batch else ("B" if self.batch == 1 else f"{self.batch}*B")


def _digits(indices: Sequence[Tensor]) -> tuple[int, list[list[Digit]]] | None:
    """Where the first number comes from; then for each dimension the steps it is made of, the slowest first.

    None where the place is no sum over the dimensions, or is not the same for every batch size.
    """
    found = [_digits_of(index) for index in indices]
    if any(one is None for one in found):
        return None
    (base, small), (other, large) = found  # type: ignore[misc]
    if base != other or [len(d) for d in small] != [len(d) for d in large]:
        return None
    joined: list[list[Digit]] = []
    for ones, others in zip(small, large, strict=True):
        joined.append([])
        for (size, stride), (more, same) in zip(ones, others, strict=True):
            times = size // _BATCHES[0]
            if stride != same or (size != more and (size, more) != tuple(times * b for b in _BATCHES)):
                return None
            joined[-1].append(Digit(size, stride) if size == more else Digit(-1, stride, times))
    return base, joined


def _digits_of(index: Tensor) -> tuple[int, list[list[tuple[int, int]]]] | None:
    base = int(index.flatten()[0]) if index.numel() else -1
    if base < 0:
        return None
    together, digits = torch.tensor(base, dtype=index.dtype), []
    for dim in range(index.ndim):
        line = index
        for other in reversed(range(index.ndim)):
            line = line if other == dim else line.select(other, 0)
        steps = _radix((line - base).tolist())
        if steps is None:
            return None
        digits.append(steps)
        together = together.unsqueeze(-1) + (line - base)
    return (base, digits) if torch.equal(together, index) else None


def _radix(places: list[int]) -> list[tuple[int, int]] | None:
    """A line of places as (size, stride), the slowest first."""
    if len(places) == 1:
        return []
    stride = places[1]
    run = next((n for n, place in enumerate(places) if place != n * stride), len(places))
    if stride <= 0 or len(places) % run:
        return None
    outer = places[::run]
    if any(places[n] != outer[n // run] + (n % run) * stride for n in range(len(places))):
        return None
    slower = _radix(outer)
    return None if slower is None else [*slower, (run, stride)]


def _views(root: tuple[int | str, ...], base: int, digits: Sequence[Sequence[Digit]]) -> list[Step] | None:
    """The chain as view, select, permute, reshape; None where it takes a part of a dimension, or repeats one."""
    order = sorted((digit.stride, dim, place) for dim, line in enumerate(digits) for place, digit in enumerate(line))
    per_row = _per_sample(root)
    view: list[
        tuple[Digit, tuple[int, int] | int]
    ] = []  # the fastest first; with its place in the result, or what is picked
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
    result = tuple(_merged(line) for line in digits)
    if result != tuple(shape):
        sizes = [size if isinstance(size, int) else -1 for size in result]
        steps.append((aten.reshape.default, (sizes,), result))
    return steps


def _merged(line: Sequence[Digit]) -> int | str:
    times = _product([digit.batch or digit.size for digit in line])
    if not any(digit.batch for digit in line):
        return times
    return "B" if times == 1 else f"{times}*B"


def _rows(
    indices: Sequence[Tensor], root: tuple[int | str, ...], shape: tuple[int | str, ...]
) -> tuple[Tensor, int] | None:
    """The chain as a choice of rows, the same for every sample: (which rows, numbers of a row); None where it is none."""
    width, per_row = int(indices[0].shape[-1]), _per_sample(root)
    if not isinstance(shape[0], str) or per_row % width:
        return None
    for _ in range(2):  # rows as wide as the result's last dimension, else as the root's
        chosen = [_rows_of(index, per_row, width) for index in indices]
        if chosen[0] is not None and chosen[1] is not None and torch.equal(chosen[0], chosen[1]):
            return chosen[0], width
        width = int(root[-1])
    return None


def _rows_of(index: Tensor, per_row: int, width: int) -> Tensor | None:
    batch = next((b for b in _BATCHES if index.numel() and index.max() < b * per_row), 0)
    if not batch or width < _LEAST_ROW or index.numel() % (batch * width):
        return None
    flat = index.reshape(batch, -1, width)
    starts = flat[0, :, 0]
    whole = (starts % width == 0).all()
    lines = starts[:, None] + torch.arange(width, dtype=index.dtype)
    samples = lines + per_row * torch.arange(batch, dtype=index.dtype)[:, None, None]
    return starts.long() // width if whole and torch.equal(flat, samples) else None


# --- writing it down --------------------------------------------------------------------------------------------------


def _shorten(graph: FusedGraph, node: fx.Node, users: list[fx.Node], chains: _Chains) -> None:
    root = chains.root(node)
    if root is None:
        return
    length = chains.length(node)
    indices = [chains.index(node, batch) for batch in _BATCHES]
    if not all(isinstance(index, Tensor) for index in indices):
        return
    from_, to = mark_of(root).shape, mark_of(node).shape
    assert from_ is not None and to is not None
    read = _digits(indices)
    steps = None if read is None else _views(from_, *read)
    if steps is None or (_copies(steps) and root.target not in _TURNED):
        chosen = _rows(indices, from_, to)
        if chosen is not None and chosen[0].numel() * chosen[1] == _per_sample(from_):
            steps = _gather(graph, node, chosen, from_, to)
    if steps is None:
        return
    if len(steps) > length or (len(steps) == length and node.target not in _COPIES):
        return
    made = _write(graph, node, root, steps)
    if node.target in _COPIES or any(user.target in _STRICT for user in users):
        made = _dense(graph, node, made, steps)
    for user in users:
        user.replace_input_with(node, made)


# whose result lies in another order than its shape tells
_TURNED = {aten.scaled_dot_product_attention.default, aten.conv1d.default, aten.conv2d.default}
# what would take a transposed operand apart
_STRICT = {aten.linear.default, aten.matmul.default, aten.bmm.default, aten.conv1d.default, aten.conv2d.default}


def _copies(steps: Sequence[Step]) -> bool:
    """Whether dimensions are joined that were moved."""
    return len(steps) > 1 and steps[-1][0] is aten.reshape.default and steps[-2][0] is aten.permute.default


def _gather(
    graph: FusedGraph, node: fx.Node, chosen: tuple[Tensor, int], root: tuple[int | str, ...], to: tuple[int | str, ...]
) -> list[Step]:
    rows, width = chosen
    name = f"{mark_of(node).branch}.folded.rows_of_{node.name}"
    set_tensor(graph, name, rows)
    table = ("B", _per_sample(root) // width, width)
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


def _batch_first(graph: FusedGraph, linear: fx.Node, chains: _Chains) -> None:
    """linear(moved) → moved(linear), where what is moved does not have the batch first."""
    moved = linear.args[0]
    if not isinstance(moved, fx.Node) or not _moves(moved) or (root := chains.root(moved)) is None:
        return
    from_, to = mark_of(root).shape, mark_of(moved).shape
    if from_ is None or to is None or len(to) < 2:
        return
    read = _digits([chains.index(moved, batch) for batch in _BATCHES])
    if read is None or _views(from_, *read) is None:
        return
    base, digits = read
    *rows, _ = digits
    flat = [(dim, place) for dim, line in enumerate(rows) for place in range(len(line))]
    leads = [where for where in flat if digits[where[0]][where[1]].batch]
    if base or len(leads) != 1 or leads[0] == flat[0]:
        return
    (dim, place) = leads[0]
    others = [where for where in flat if where != leads[0]]
    ordered = [[digits[dim][place]], [digits[d][p] for d, p in others], digits[-1]]
    steps = _views(from_, 0, ordered)
    if steps is None or _product([_numbers(line) for line in ordered]) != _per_sample(from_):
        return
    # the product of rows with the batch first …
    first = _dense(graph, linear, _write(graph, linear, root, steps), steps) if steps else root
    shape = tuple(_merged(line) for line in ordered)
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
    back = [[result[d, p] for p in range(len(line))] for d, line in enumerate(rows)]
    steps = _views((*shape[:-1], width), 0, [*back, [Digit(int(width), 1)]])
    assert steps is not None
    linear.replace_all_uses_with(_write(graph, linear, made, steps))
    graph.graph.erase_node(linear)


def _numbers(line: Sequence[Digit]) -> int:
    return _product([digit.batch or digit.size for digit in line])


def _per_sample(shape: tuple[int | str, ...] | None) -> int:
    """Numbers of a value for each sample; 0 where the batch does not lead, or is not alone symbolic."""
    if not shape or not isinstance(shape[0], str) or not all(isinstance(size, int) for size in shape[1:]):
        return 0
    times = "1" if shape[0] == "B" else shape[0].removesuffix("*B")
    return _product([times, *shape[1:]]) if times.isdigit() else 0


def _product(sizes: Sequence[Any]) -> int:
    found = 1
    for size in sizes:
        found *= int(size)
    return found
