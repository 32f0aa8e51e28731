"""What a chain of views, transpositions and copies does: nothing is computed, numbers are only moved.

Each dimension of a value is read as digits, as in a number with several bases: so many steps of so many places of the
value that the chain began with. Reshaping regroups digits, permuting moves them, selecting drops them; what is no such
thing (rolling, joining neighbours) is run over an arange, to see whether it moves whole rows.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mmpipe.graphs.fuse import mark_of

aten = torch.ops.aten

Shape = tuple[int | str, ...]

_SPLITS = {aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
VIEWS = {aten.view.default, aten._unsafe_view.default}
_RESHAPES = {
    *VIEWS,
    *(aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims),
}
COPIES = {aten.contiguous.default, aten.clone.default}
_OTHERS = {
    *(aten.transpose.int, aten.permute.default, aten.t.default, aten.select.int, aten.slice.Tensor),
    *(aten.roll.default, aten.cat.default, operator.getitem),
}
_MOVES = {*_RESHAPES, *COPIES, *_OTHERS, *_SPLITS}
_PADS = {aten.pad.default, aten.constant_pad_nd.default}  # moves, where they pad nothing
_MOST_NUMBERS = 1 << 22  # of one sample's value: more are not looked at
_SAMPLES = 2  # of the arange: where one sample's numbers go is where every sample's go
_LEAST_ROW = 16  # numbers: below it, picking rows is slower than copying them


def moves(node: fx.Node) -> bool:
    """Whether an operation only moves numbers."""
    if node.op != "call_function":
        return False
    if node.target in _PADS:
        return isinstance(node.args[1], (list, tuple)) and not any(node.args[1])
    return node.target in _MOVES


@dataclass(frozen=True)
class Digit:
    """`size` steps of `stride` places of the root. `batch`: the size is that many times the batch, -1 stands for it."""

    size: int
    stride: int
    batch: int = 0

    @property
    def shape(self) -> int | str:
        return self.size if not self.batch else ("B" if self.batch == 1 else f"{self.batch}*B")

    @property
    def count(self) -> int:
        """Steps for each sample, or for all."""
        return self.batch or self.size


Line = tuple[Digit, ...]  # a dimension's digits, the slowest first; none: its size is 1


@dataclass(frozen=True)
class Read:
    """Where each number of a value comes from: base + Σ digit · stride."""

    base: int
    lines: tuple[Line, ...]


class Chains:
    """Where what moves comes from, and how it was moved."""

    def __init__(self) -> None:
        self._roots: dict[fx.Node, fx.Node | None] = {}
        self._reads: dict[fx.Node, Read | None] = {}

    def root(self, node: fx.Node) -> fx.Node | None:
        """The one value that a chain begins with, [k · batch, …]; None: there are several, or its shape is unknown."""
        if node not in self._roots:
            if moves(node):
                found = {self.root(n) for n in node.all_input_nodes if mark_of(n).batch_multiple is None}
                self._roots[node] = found.pop() if len(found) == 1 else None
            else:
                known = node.op != "get_attr" and 0 < per_sample(mark_of(node).shape) <= _MOST_NUMBERS
                self._roots[node] = node if known else None
        return self._roots[node]

    def read(self, node: fx.Node) -> Read | None:
        """None where the chain is no regrouping of digits."""
        if node not in self._reads:
            self._reads[node] = self._read(node)
        return self._reads[node]

    def _read(self, node: fx.Node) -> Read | None:
        shape = mark_of(node).shape
        if not moves(node):
            return None if shape is None or not per_sample(shape) else _whole(shape)
        source: Any = node.args[0]
        if node.target is operator.getitem:
            return self._part(node, source, node.args[1])
        before = self.read(source) if isinstance(source, fx.Node) else None
        if before is None:
            return None
        if node.target in _RESHAPES:
            lines = None if shape is None else _regrouped(before.lines, shape)
            return None if lines is None else Read(before.base, lines)
        if node.target in COPIES or node.target in _PADS:
            return before
        if node.target in (aten.permute.default, aten.transpose.int, aten.t.default):
            order = _order(node, len(before.lines))
            return Read(before.base, tuple(before.lines[dim] for dim in order))
        if node.target is aten.select.int:
            return _selected(before, node.args[1], node.args[2])
        if node.target is aten.slice.Tensor:
            return _sliced(before, *node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
        return None

    def _part(self, node: fx.Node, several: Any, place: Any) -> Read | None:
        """One of the parts that a value was split into."""
        if not isinstance(several, fx.Node) or several.target not in _SPLITS:
            return None
        before = self.read(several.args[0])  # type: ignore[arg-type]
        given = several.args[1:]
        if before is None or several.kwargs:
            return None
        if several.target is aten.unbind.int:
            return _selected(before, given[0] if given else 0, place)
        dim: Any = given[1] if len(given) > 1 else 0
        whole = _size(before.lines[dim])
        if not isinstance(whole, int) or not isinstance(place, int) or place < 0:
            return None
        if several.target is aten.split_with_sizes.default:
            sizes: Any = given[0]
            return _sliced(before, dim, sum(sizes[:place]), sum(sizes[: place + 1]), 1)
        size: Any = given[0] if several.target is aten.split.Tensor else -(-whole // given[0])  # type: ignore[operator]
        return _sliced(before, dim, place * size, min(whole, (place + 1) * size), 1)

    def rows(self, node: fx.Node) -> tuple[Tensor, int] | None:
        """The chain as a choice of rows, the same for every sample: (which, numbers of a row); None where it is none.

        Every number is looked at: this is how chains are read that are no regrouping of digits.
        """
        root = self.root(node)
        shape, of = mark_of(node).shape, mark_of(root).shape if root is not None else None
        if not shape or not of or not isinstance(shape[0], str) or not isinstance(of[-1], int):
            return None
        places = self._places(node, {})
        each = per_sample(of)
        for width in dict.fromkeys((int(places.shape[-1]), of[-1])):
            chosen = _rows_of(places, each, width)
            if chosen is not None:
                return chosen, width
        return None

    def _places(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """For each number of the value of _SAMPLES samples, its place among those of the root."""
        if node not in known:
            if moves(node):

                def argument(given: fx.Node) -> Any:
                    multiple = mark_of(given).batch_multiple
                    return self._places(given, known) if multiple is None else multiple * _SAMPLES

                args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            else:
                shape: Any = mark_of(node).shape
                count = _SAMPLES * per_sample(shape)
                known[node] = torch.arange(count, dtype=torch.int32).reshape(-1, *shape[1:])
        return known[node]

    def between(self, node: fx.Node) -> set[fx.Node]:
        """Operations between the root and the value, its own among them."""
        seen: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            one = waiting.pop()
            if one not in seen and moves(one):
                seen.add(one)
                waiting.extend(one.all_input_nodes)
        return seen


# --- digits -----------------------------------------------------------------------------------------------------------


def _whole(shape: Shape) -> Read:
    lines: list[Line] = []
    stride = 1
    for size in reversed(shape):
        digit = _digit(size, stride)
        assert digit is not None
        lines.append((digit,) if digit.batch or digit.size > 1 else ())
        stride *= digit.count
    return Read(0, tuple(reversed(lines)))


def _digit(size: int | str, stride: int) -> Digit | None:
    """None where a size is no number, and none times the batch."""
    if isinstance(size, int):
        return Digit(size, stride)
    times = "1" if size == "B" else size.removesuffix("*B")
    return Digit(-1, stride, int(times)) if times.isdigit() else None


def _size(line: Line) -> int | str:
    return merged(line)


def merged(line: Sequence[Digit]) -> int | str:
    """The size of a dimension."""
    times = product([digit.count for digit in line])
    if not any(digit.batch for digit in line):
        return times
    return "B" if times == 1 else f"{times}*B"


def _regrouped(lines: Sequence[Line], shape: Shape) -> tuple[Line, ...] | None:
    """The same digits in other dimensions; None where one would have to be cut unevenly."""
    left = [digit for line in lines for digit in line][::-1]  # the slowest last
    found: list[Line] = []
    for size in shape:
        wanted = _digit(size, 0)
        if wanted is None:
            return None
        count, batch = wanted.count, bool(wanted.batch)
        line: list[Digit] = []
        while count > 1 or batch:
            if not left:
                return None
            digit = left.pop()
            if digit.batch and not batch:
                return None
            if count % digit.count == 0:
                taken = digit
            elif digit.count % count == 0 and batch == bool(digit.batch):  # its slower part
                rest = digit.count // count
                taken = Digit(-1 if batch else count, digit.stride * rest, count if batch else 0)
                left.append(Digit(rest, digit.stride))
            else:
                return None
            line.append(taken)
            count //= taken.count
            batch = batch and not taken.batch
        found.append(_joined(line))
    return tuple(found) if not left else None


def _joined(line: Sequence[Digit]) -> Line:
    """Digits that follow one another in the root are one."""
    made: list[Digit] = []
    for digit in line:
        before = made[-1] if made else None
        if before is None or digit.batch or before.stride != digit.stride * digit.size:
            made.append(digit)
        elif before.batch:
            made[-1] = Digit(-1, digit.stride, before.batch * digit.size)
        else:
            made[-1] = Digit(before.size * digit.size, digit.stride)
    return tuple(made)


def _order(node: fx.Node, count: int) -> list[int]:
    if node.target is aten.permute.default:
        given: Any = node.args[1]
        return [dim % count for dim in given]
    order = list(range(count))
    one, other = (0, count - 1) if node.target is aten.t.default else node.args[1:3]
    order[one], order[other] = order[other], order[one]  # type: ignore[index]
    return order


def _selected(read: Read, dim: Any, place: Any) -> Read | None:
    dim %= len(read.lines)
    size = _size(read.lines[dim])
    if not isinstance(size, int) or not isinstance(place, int):
        return None
    place, base = place % size, read.base
    for digit in reversed(read.lines[dim]):
        base += place % digit.size * digit.stride
        place //= digit.size
    return Read(base, (*read.lines[:dim], *read.lines[dim + 1 :]))


def _sliced(read: Read, dim: Any, start: Any, end: Any, step: Any) -> Read | None:
    dim %= len(read.lines)
    line = read.lines[dim]
    size = _size(line)
    if not isinstance(size, int):
        whole = start in (0, None) and (end is None or (isinstance(end, int) and end > 1 << 40)) and step == 1
        return read if whole else None
    if not all(bound is None or isinstance(bound, int) for bound in (start, end, step)):
        return None
    start, end, step = slice(start, end, step).indices(size)
    count = len(range(start, end, step))
    if (start, count, step) == (0, size, 1):
        return read
    if len(line) != 1 or count < 1:
        return None
    (digit,) = line
    kept = (Digit(count, digit.stride * step),) if count > 1 else ()
    return Read(read.base + start * digit.stride, (*read.lines[:dim], kept, *read.lines[dim + 1 :]))


def _rows_of(places: Tensor, each: int, width: int) -> Tensor | None:
    if width < _LEAST_ROW or each % width or places.numel() % (_SAMPLES * width):
        return None
    flat = places.reshape(_SAMPLES, -1, width)
    starts = flat[0, :, 0]
    lines = starts[:, None] + torch.arange(width, dtype=places.dtype)
    samples = lines + each * torch.arange(_SAMPLES, dtype=places.dtype)[:, None, None]
    whole = bool((starts % width == 0).all()) and int(starts.max()) < each
    return starts.long() // width if whole and torch.equal(flat, samples) else None


def per_sample(shape: Shape | None) -> int:
    """Numbers of a value for each sample; 0 where the batch does not lead, or is not alone symbolic."""
    if not shape or not isinstance(shape[0], str) or not all(isinstance(size, int) for size in shape[1:]):
        return 0
    lead = _digit(shape[0], 0)
    return 0 if lead is None else product([lead.count, *shape[1:]])


def product(sizes: Sequence[Any]) -> int:
    """Of whole numbers."""
    found = 1
    for size in sizes:
        found *= int(size)
    return found
