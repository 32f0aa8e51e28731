"""The plain backend with attention in code of our own (kernels.py), for processors with AMX and in bfloat16.

PyTorch's kernel is made for long sequences: of the few dozen patches, words or frames that an encoder sees, most of its
time goes into calls of small products. Ours keeps a head of a sample in the first cache from its scores to its result.
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
from mmpipe.graphs.backends.kernels import MOST_KEYS, MOST_WIDTH, attention, base2, load
from mmpipe.graphs.fuse import drop_unread_tensors, get_tensor, mark_of, set_tensor
from mmpipe.graphs.plan import Segment

aten = torch.ops.aten


def lower(segment: Segment, module: fx.GraphModule, target: Target, examples: Sequence[Tensor]) -> Lowered:
    """The function. Raises Unlowerable where the machine can't, or the segment has nothing for it."""
    if target.dtype != torch.bfloat16:
        raise Unlowerable("native is for bfloat16: runtime.dtype says otherwise, or this machine gains nothing by it")
    if target.device != "CPU":
        raise Unlowerable(f"native computes on the CPU, and this is {target.device}")
    if not scores_per_row(module):
        raise Unlowerable(f"native has no attention to compute in {segment.name}")
    load(target.folder)
    return written(segment, _replaced(joined(module, target), module), examples)


def scores_per_row(module: fx.GraphModule) -> int:
    """Pairs of a query and a key in a row of the batch, over all attention that would be computed here; 0: none."""
    return sum(_scores(node) for node in module.graph.nodes if _fits(node))


def _fits(node: fx.Node) -> bool:
    if (
        node.target is not aten.scaled_dot_product_attention.default
        or len(node.args) > 4
        or set(node.kwargs) - {"scale"}
    ):
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


def _scores(node: fx.Node) -> int:
    batch, heads, queries, _ = mark_of(node.args[0]).shape or ()  # type: ignore[arg-type]
    keys = (mark_of(node.args[1]).shape or ())[2]  # type: ignore[arg-type]
    times = int(batch.partition("*")[0]) if isinstance(batch, str) and "*" in batch else 1
    return times * int(heads) * int(queries) * int(keys)


def _replaced(short: fx.GraphModule, module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a lowered module, sharing its weights; constant masks are those of `module`, in float32."""
    made = fx.GraphModule(short, copy.deepcopy(short.graph))
    for node in list(made.graph.nodes):
        if not _fits(node) or any(mark_of(part).dtype != torch.bfloat16 for part in node.args[:3]):
            continue
        width = (mark_of(node.args[0]).shape or ())[3]
        scale: Any = node.kwargs.get("scale")
        scale = 1 / math.sqrt(int(width)) if scale is None else float(scale)
        mask = node.args[3] if len(node.args) > 3 else None
        with made.graph.inserting_before(node):
            known = None if mask is None else _constant(made, module, mask)
            arguments = (*node.args[:3], mask if known is None else known)
            new = made.graph.call_function(attention, (*arguments, scale))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        made.graph.erase_node(node)
    made.graph.eliminate_dead_code()
    drop_unread_tensors(made)
    made.recompile()
    return made


def _constant(made: fx.GraphModule, module: fx.GraphModule, mask: Any) -> fx.Node | None:
    """A mask that no input reaches, once for each window of a sample: repeated for none. None: an input reaches it."""
    source = mask
    if source.target is aten.reshape.default and source.args[0].target is aten.expand.default:  # graphs/attention.py
        source = source.args[0].args[0]
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
