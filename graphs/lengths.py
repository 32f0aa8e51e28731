"""A segment for texts of several lengths: the same encoder, captured once for each, sharing its weights.

    rows of a bucket ─► by the length that holds a row ─► a few rows at a time ─► where they came from

Padding costs as much as words do. Which length a row is computed at depends on the row alone, and every length has one
number of rows: a row's bits do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from mmpipe.graphs.backends import Lowered
from mmpipe.graphs.fuse import get_tensor, set_tensor
from mmpipe.graphs.passes import same_bits
from mmpipe.graphs.plan import Segment

_LEAST = 16  # tokens: below it a segment is mostly calls
_TOKENS = 512  # computed at a time, about
_ROWS = 8  # … in no more rows: what is left over of a bucket is filled up


def lengths_of(longest: int) -> tuple[int, ...]:
    """The lengths that texts of up to `longest` tokens are padded to, the shortest first: halves of it."""
    found = [longest]
    while len(found) < 5 and found[-1] % 2 == 0 and found[-1] // 2 >= _LEAST:
        found.append(found[-1] // 2)
    return tuple(reversed(found))


def rows_at(length: int, bucket: int) -> int:
    """How many rows of a length are computed at a time."""
    return max(1, min(bucket, _ROWS, max(2, _TOKENS // length)))


class ByLength:
    """[rows, longest] → as the segment for the longest would, a row within its own length.

    `parts`: length → that segment, lowered for `rows_at` rows. `mask`: which argument is 0 at padding. `cut`: the
    arguments that have tokens in dimension 1.
    """

    def __init__(self, parts: Mapping[int, Lowered], mask: int, cut: Sequence[int]) -> None:
        self.parts, self.mask, self.cut = dict(sorted(parts.items())), mask, frozenset(cut)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        mask_RT = tensors[self.mask]
        places_T = torch.arange(1, mask_RT.shape[1] + 1)
        used_R = ((mask_RT != 0) * places_T).amax(dim=1).tolist()
        results: list[Tensor] = []
        begin = 0
        for length, run in self.parts.items():
            chosen = [row for row, used in enumerate(used_R) if begin < used <= length or (not begin and not used)]
            begin = length
            step = rows_at(length, len(used_R))
            for first in range(0, len(chosen), step):
                rows = chosen[first : first + step]
                picked_K = torch.tensor([*rows, *[rows[0]] * (step - len(rows))])
                given = [t[picked_K, :length] if n in self.cut else t[picked_K] for n, t in enumerate(tensors)]
                found = run(*given)
                if not results:
                    results = [torch.empty((len(used_R), *one.shape[1:]), dtype=one.dtype) for one in found]
                for whole, one in zip(results, found, strict=True):
                    whole[picked_K[: len(rows)]] = one[: len(rows)]
        return tuple(results)


def in_order(segment: Segment, other: Segment, run: Lowered) -> Lowered:
    """`run` of `other`, called with the arguments of `segment`, which has the same in another order."""
    places = [segment.inputs.index(name) for name in other.inputs]
    if places == list(range(len(places))):
        return run
    return lambda *tensors: run(*(tensors[place] for place in places))


def share_with(module: fx.GraphModule, other: fx.GraphModule) -> None:
    """Let `module` hold the tensors of `other` where its own have the same bytes."""
    known: dict[tuple[object, ...], list[Tensor]] = {}
    for name in {str(node.target) for node in other.graph.nodes if node.op == "get_attr"}:
        tensor = get_tensor(other, name)
        known.setdefault((tuple(tensor.shape), tensor.dtype, tensor.stride()), []).append(tensor)
    for name in {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}:
        tensor = get_tensor(module, name)
        for twin in known.get((tuple(tensor.shape), tensor.dtype, tensor.stride()), []):
            if same_bits(tensor, twin):
                set_tensor(module, name, twin)
                break
