"""Passes: fused graph → an equal graph. Each is one function that edits in place and returns how much it changed.

Every pass keeps every output within rounding (what folds, aligns, or lays out anew) or to the bit (the others), and
`verify` holds after each.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from mmpipe.graphs.attention import join_attention, merge_products
from mmpipe.graphs.convolutions import channels_last, fold_batch_norm, fold_normalisation
from mmpipe.graphs.fuse import FusedGraph, drop_unread_tensors, get_tensor, mark_of, outputs_of, set_tensor, sweep
from mmpipe.graphs.layout import straighten
from mmpipe.graphs.patches import multiply_patches
from mmpipe.graphs.plan import GraphError
from mmpipe.graphs.rows import reorder

aten = torch.ops.aten

# not contiguous, nor a clone into another layout: a view may come after it
_IDENTITIES = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.clone.default}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
_SHAPERS = {aten.view.default, aten.reshape.default, aten.expand.default, aten._unsafe_view.default}
_RANDOM = torch.Tag.nondeterministic_seeded
_INNER = 16  # floats of a vector: see align_products
_QUERIES = 32  # torch's attention on a CPU takes this many queries at a time
_FOLD_GROWTH = 4  # a folded constant may be this much larger than what it was made of, not more (an expand would be)
_FOLD_BYTES = 1 << 20  # … unless it is small anyway


def optimise(graph: FusedGraph) -> dict[str, int]:
    """All passes in their order; returns what each says: nodes removed, bytes saved, products aligned."""
    removed: dict[str, int] = {}
    tidy = (drop_noops, share_weights, fold_constants, fold_batch_norm, fold_normalisation, merge_common)
    for one in (
        *tidy,
        multiply_patches,
        join_attention,
        merge_products,
        straighten,
        reorder,
        merge_common,
        align_products,
        align_attention,
        channels_last,
    ):
        removed[one.__name__] = removed.get(one.__name__, 0) + one(graph)
        verify(graph)
    drop_unread_tensors(graph)
    graph.recompile()
    return removed


def verify(graph: FusedGraph) -> None:
    """What a legal fused graph is. Raises GraphError with the node's name; a failure is a bug of a pass."""
    seen: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            raise GraphError(f"{node.name}: {node.op} is no operation of a fused graph")
        if "mmpipe" not in node.meta:
            raise GraphError(f"{node.name}: has no mark")
        late = [argument.name for argument in node.all_input_nodes if argument not in seen]
        if late:
            raise GraphError(f"{node.name}: reads {late[0]}, which comes later")
        if node.op == "get_attr":
            get_tensor(graph, node.target)
        seen.add(node)


def drop_noops(graph: FusedGraph) -> int:
    """Dropout at inference, casts to the same type, reshapes to the same shape, clones and aliases."""
    count = 0
    embeddings = outputs_of(graph.graph)["embeddings"].values()
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and _is_noop(node, embeddings):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
            count += 1
    return count + sweep(graph)


def _is_noop(node: fx.Node, embeddings: Collection[fx.Node]) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.args[0].op == "placeholder" and node in embeddings:
        return False  # an encoder that only hands on its input still needs a segment to run in
    if node.target in _DROPOUTS:
        return node.args[2] is False
    if node.target in _IDENTITIES:
        return not node.kwargs
    here, before = mark_of(node), mark_of(node.args[0])
    if here.shape is None or here.shape != before.shape or here.dtype != before.dtype:
        return False
    return bool(node.target in {*_SHAPERS, aten.to.dtype, aten.to.dtype_layout})


def share_weights(graph: FusedGraph) -> int:
    """Tensors with the same bytes are stored once; returns the bytes that this saved."""
    first: dict[Hashable, list[tuple[str, Tensor]]] = {}
    saved = 0
    done: dict[str, str] = {}
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        if node.target not in done:
            tensor = get_tensor(graph, node.target)
            known = first.setdefault((tuple(tensor.shape), tensor.dtype, _digest(tensor)), [])
            twin = next((name for name, other in known if same_bits(tensor, other)), None)
            if twin is None:
                known.append((node.target, tensor))
            elif tensor.data_ptr() != get_tensor(graph, twin).data_ptr():
                saved += tensor.nbytes
            done[node.target] = twin or node.target
        node.target = done[node.target]
    drop_unread_tensors(graph)
    return saved


def _digest(tensor: Tensor) -> Hashable:
    return () if tensor.numel() == 0 else (float(tensor.flatten()[0]), float(tensor.flatten()[-1]))


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    left, right = one.contiguous().flatten(), other.contiguous().flatten()
    return one.numel() == 0 or bool(torch.equal(left.view(torch.uint8), right.view(torch.uint8)))


def fold_constants(graph: FusedGraph) -> int:
    """What depends on weights alone is computed once, now, unless the result would be much larger."""
    known: dict[fx.Node, Any] = {}
    sizes: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            known[node] = get_tensor(graph, node.target)
            sizes[node] = known[node].nbytes
        elif node.op == "call_function" and _pure(node) and all(n in known for n in node.all_input_nodes):
            with torch.no_grad():
                value = _call(node, known)
            source = sum(sizes[n] for n in node.all_input_nodes)
            if isinstance(value, Tensor) and value.nbytes > max(_FOLD_BYTES, _FOLD_GROWTH * source):
                continue
            known[node] = value
            sizes[node] = value.nbytes if isinstance(value, Tensor) else source
    count = 0
    for node in list(graph.graph.nodes):
        value = known.get(node)
        if node.op != "call_function" or not isinstance(value, Tensor) or all(user in known for user in node.users):
            continue
        target = f"{mark_of(node).branch}.folded.of_{node.name}"
        set_tensor(graph, target, value.contiguous())
        with graph.graph.inserting_before(node):
            constant = graph.graph.get_attr(target)
        constant.meta["mmpipe"] = replace(mark_of(node), shape=tuple(value.shape), dtype=value.dtype)
        node.replace_all_uses_with(constant)
        graph.graph.erase_node(node)
        count += 1
    count += sweep(graph)
    drop_unread_tensors(graph)
    return count


def _call(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _pure(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return _RANDOM not in node.target.tags and not node.target._schema.is_mutable


def merge_common(graph: FusedGraph) -> int:
    """The same operation on the same arguments is computed once. Copies of the head for different exits stay apart:

    they run for different rows, so that one can't read what the other computed.
    """
    first: dict[Hashable, fx.Node] = {}
    count = 0
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            key: Hashable = ("get_attr", node.target)
        elif node.op == "call_function" and _pure(node):
            try:
                key = (node.target, mark_of(node).copy, _frozen(node.args), _frozen(node.kwargs))
            except TypeError:
                continue
        else:
            continue
        twin = first.setdefault(key, node)
        if twin is not node:
            node.replace_all_uses_with(twin)
            graph.graph.erase_node(node)
            count += 1
    return count


def align_products(graph: FusedGraph) -> int:
    """Products with a constant matrix as linear([out, in]), with zeros up to a multiple of 16 in the inner dimension.

    Otherwise CPU libraries finish the sum by another kernel for the last rows of a matrix than for the others, and a
    row's last bit depends on its place in the batch. Seen with MKL on AVX-512 for most inner sizes that are no multiple
    of 16, and for matrices held as [in, out] with 5, 6, 7, 9 or 10 columns; never for what this makes.
    """
    count = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in (aten.linear.default, aten.matmul.default, aten.mm.default):
            continue
        left, right = node.args[0], node.args[1]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or right.op != "get_attr":
            continue
        matrix = get_tensor(graph, str(right.target))
        if matrix.ndim != 2 or left.op == "get_attr":
            continue
        linear = node.target is aten.linear.default
        matrix_OI = matrix if linear else matrix.T.contiguous()
        missing = -matrix_OI.shape[1] % _INNER
        if linear and missing == 0:
            continue
        target = f"{mark_of(node).branch}.folded.wide_{node.name}"
        set_tensor(graph, target, torch.nn.functional.pad(matrix_OI, (0, missing)))
        with graph.graph.inserting_before(node):
            wide = graph.graph.get_attr(target)
            if missing:
                mark = mark_of(left)
                shape = (*mark.shape[:-1], matrix_OI.shape[1] + missing) if mark.shape else None
                left = graph.graph.call_function(aten.constant_pad_nd.default, (left, [0, missing]))
                left.meta["mmpipe"] = replace(mark_of(node), shape=shape, dtype=mark.dtype)
        wide.meta["mmpipe"] = replace(mark_of(right), shape=tuple(get_tensor(graph, target).shape))
        node.target, node.args = aten.linear.default, (left, wide, *node.args[2:])
        count += 1
    sweep(graph)
    drop_unread_tensors(graph)
    return count


def align_attention(graph: FusedGraph) -> int:
    """Pad fewer than 32 queries to a multiple of 16, and drop what the padding gives.

    Torch's attention gives each thread working memory for 32 queries, or as many as there are: where that is no whole
    number of vectors, the second thread's starts between two, and a row's last bit depends on which thread has it (seen
    for 15, 17, 25 and 31 queries of heads of 8; never once padded).
    """
    count = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target is not aten.scaled_dot_product_attention.default:
            continue
        mark = mark_of(node)
        if mark.shape is None or len(mark.shape) != 4 or not isinstance(mark.shape[2], int):
            continue
        queries, missing = mark.shape[2], -mark.shape[2] % _INNER
        if missing == 0 or queries > _QUERIES:
            continue
        args = list(node.args)
        for place in (0, 3):  # the queries; the mask, where it has a line for each
            given = args[place] if place < len(args) else None
            if not isinstance(given, fx.Node):
                continue
            shape = mark_of(given).shape
            if shape is not None and shape[-2] == queries:
                shape = (*shape[:-2], queries + missing, shape[-1])
                with graph.graph.inserting_before(node):
                    args[place] = graph.graph.call_function(
                        aten.constant_pad_nd.default, (given, [0, 0, 0, missing], 1)
                    )
                args[place].meta["mmpipe"] = replace(mark, shape=shape, dtype=mark_of(given).dtype)
        wide = replace(mark, shape=(*mark.shape[:2], queries + missing, mark.shape[3]))
        swapped = replace(mark, shape=(mark.shape[0], queries, mark.shape[1], mark.shape[3]))
        users = list(node.users)
        node.args, node.meta["mmpipe"] = tuple(args), wide
        with graph.graph.inserting_after(node):
            kept = graph.graph.call_function(aten.slice.Tensor, (node, 2, 0, queries))
        kept.meta["mmpipe"] = mark
        for target, more, of in (  # dense with heads after queries, as attention leaves it: a view may come after it
            (aten.transpose.int, (1, 2), swapped),
            (aten.contiguous.default, (), swapped),
            (aten.transpose.int, (1, 2), mark),
        ):
            with graph.graph.inserting_after(kept):
                kept = graph.graph.call_function(target, (kept, *more))
            kept.meta["mmpipe"] = of
        for user in users:
            user.replace_input_with(node, kept)
        count += 1
    return count


def _frozen(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(item)) for key, item in value.items()))
    hash(value)
    return (type(value).__name__, value)  # 1, 1.0 and True are three arguments
