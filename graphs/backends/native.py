"""The plain backend with attention, MLPs and layer norms in code of our own (operations.py), in bfloat16.

PyTorch's attention is made for long sequences: of the few dozen patches, words or frames that an encoder sees, most of
its time goes into calls of small products. Ours keeps a head of a sample in the first cache from its scores to its
result, and reads it where a product left it (within.py). oneDNN writes what is between an MLP's two products to memory,
and takes a GELU three times as slowly as ours does (mlps.py). PyTorch's norm takes three to four times as long as
reading and writing the rows does; ours up to twice, and puts them in the order of the next windows on their way
(norms.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mmpipe.graphs.backends import Lowered, Target, Unlowerable
from mmpipe.graphs.backends.eager import joined, written
from mmpipe.graphs.backends.kernels import load, sources
from mmpipe.graphs.backends.mlps import found, join_mlps
from mmpipe.graphs.backends.norms import norms, plain_factors, put, replace_norm
from mmpipe.graphs.backends.operations import MOST_KEYS, MOST_WIDTH, attention, base2
from mmpipe.graphs.backends.within import read_within
from mmpipe.graphs.cost import size_of
from mmpipe.graphs.fuse import drop_unread_tensors, get_tensor, mark_of, set_tensor
from mmpipe.graphs.late import LateModule
from mmpipe.graphs.plan import Segment

aten = torch.ops.aten

# Saved for each pair of a query and a key, each number that is normed, each between an MLP's products: at least, on two
# cores of a Xeon.
_SCORE_S, _NORMED_S, _BETWEEN_S = 0.7e-9, 0.3e-9, 0.15e-9


def lower(segment: Segment, module: fx.GraphModule, target: Target, examples: Sequence[Tensor]) -> Lowered:
    """The function. Raises Unlowerable where the machine can't, or the segment has nothing for it."""
    if target.dtype != torch.bfloat16:
        raise Unlowerable("native is for bfloat16: runtime.dtype says otherwise, or this machine gains nothing by it")
    if target.device != "CPU":
        raise Unlowerable(f"native computes on the CPU, and this is {target.device}")
    load(target.folder)
    if not saved_seconds(module):
        raise Unlowerable(f"native has nothing to compute in {segment.name}")
    return written(segment, with_kernels(module, target), examples)


def with_kernels(module: fx.GraphModule, target: Target) -> fx.GraphModule:
    """A segment's module in bfloat16, with these operations."""
    return replaced(joined(module, target, join_mlps), module)


def saved_seconds(module: fx.GraphModule) -> float:
    """A row of the batch takes less by about so much; 0: there is nothing for it here."""
    total = 0.0
    for node in module.graph.nodes:
        if _attends(node):
            query, key = (mark_of(part).shape or () for part in node.args[:2])
            total += _SCORE_S * _numbers((*query[:3], key[2]))
        elif (one := found(module, node)) is not None:
            total += _BETWEEN_S * _numbers(mark_of(one.first).shape or ())
        elif norms(node):
            total += _NORMED_S * _numbers(mark_of(node).shape or ())
    return total


def _numbers(shape: Sequence[int | str]) -> int:
    """For one row of the batch."""
    return math.prod(size_of(dimension, 1) for dimension in shape)


def replaced(short: fx.GraphModule, module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a lowered module, sharing its weights; constant masks are those of `module`, in float32."""
    made = LateModule(short, copy.deepcopy(short.graph))
    for node in list(made.graph.nodes):
        if any(mark_of(part).dtype != torch.bfloat16 for part in (node, *node.all_input_nodes[:1])):
            continue
        if _attends(node):
            _attend(made, module, node)
        elif norms(node) and plain_factors(made, node):
            replace_norm(made, node)
    read_within(made)
    made.graph.eliminate_dead_code()
    drop_unread_tensors(made)
    made.recompile()
    return made


# --- attention --------------------------------------------------------------------------------------------------------


def _attends(node: fx.Node) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default or "attention.cpp" not in sources():
        return False
    if len(node.args) > 4 or set(node.kwargs) - {"scale"}:
        return False  # dropout, a causal mask that is not written out, heads that share keys
    query, key, value = (mark_of(part).shape or () for part in node.args[:3])  # type: ignore[arg-type]
    mask = node.args[3] if len(node.args) > 3 else None
    if mask is not None and not _repeats(mark_of(mask).shape, query, key):  # type: ignore[arg-type]
        return False
    alike = len(query) == len(key) == 4 and key == value and query[:2] == key[:2] and query[3] == key[3]
    known = all(isinstance(size, int) for size in (*query[1:], *key[1:]))
    return alike and known and 0 < int(key[2]) <= MOST_KEYS and 0 < int(key[3]) <= MOST_WIDTH and bool(int(query[2]))


def _repeats(mask: Sequence[int | str] | None, query: Sequence[int | str], key: Sequence[int | str]) -> bool:
    """Whether a mask is one for all, or one for each of the batch, written out over keys."""
    if mask is None or len(mask) != 4 or len(query) != 4 or len(key) != 4:
        return False
    return mask[0] in (1, query[0]) and mask[1] in (1, query[1]) and mask[2] in (1, query[2]) and mask[3] == key[2]


def _attend(made: fx.GraphModule, module: fx.GraphModule, node: fx.Node) -> None:
    width = (mark_of(node.args[0]).shape or ())[3]  # type: ignore[arg-type]
    scale: Any = node.kwargs.get("scale")
    scale = 1 / math.sqrt(int(width)) if scale is None else float(scale)
    mask: Any = node.args[3] if len(node.args) > 3 else None
    if mask is not None:
        with made.graph.inserting_before(node):
            known = _constant(made, module, mask)
        if known is not None:
            put(made.graph, node, attention, (*node.args[:3], known, scale, True))
            return
    put(made.graph, node, attention, (*node.args[:3], mask, scale))


def _many(count: int | str) -> str:
    return "B" if count == 1 else f"{count}*B"


def _constant(made: fx.GraphModule, module: fx.GraphModule, mask: Any) -> fx.Node | None:
    """A mask that no input reaches, once for each window of a sample: repeated for none. None: an input reaches it."""
    source = mask
    if source.target is aten.reshape.default and source.args[0].target is aten.expand.default:
        source = source.args[0].args[0]
        shape, seen = mark_of(source).shape or (), mark_of(mask.args[0]).shape
        # as graphs/attention.py repeats them: the batch before the windows, then both in one
        if len(shape) != 4 or seen != ("B", *shape) or mark_of(mask).shape != (_many(shape[0]), *shape[1:]):
            return None
    if source.op != "get_attr" or mark_of(source).dtype == torch.bool:
        return None
    name = str(source.target)
    target = f"{name}_base2"
    try:
        get_tensor(made, target)
    except AttributeError:
        try:
            plain = get_tensor(module, name.removesuffix("_short"))
        except AttributeError:
            plain = get_tensor(made, name)
        if plain.ndim != 4:
            return None
        set_tensor(made, target, base2(plain))
    constant = made.graph.get_attr(target)
    constant.meta = dict(source.meta)
    return constant
