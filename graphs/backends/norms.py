"""Layer norms that the native backend computes, alone or with the choice of rows that follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mmpipe.graphs.backends.operations import MOST_NORMED, layer_norm
from mmpipe.graphs.fuse import get_tensor, mark_of

aten = torch.ops.aten


def norms(node: fx.Node) -> bool:
    """Whether it is a layer norm of the last dimension, with weight and bias."""
    if node.target is not aten.layer_norm.default or len(node.args) < 4 or None in node.args[2:4]:
        return False
    shape, normed = mark_of(node).shape, node.args[1]
    if shape is None or not isinstance(normed, (list, tuple)) or list(normed) != [shape[-1]]:
        return False
    return all(isinstance(size, int) for size in shape[1:]) and 0 < int(shape[-1]) <= MOST_NORMED


def plain_factors(made: fx.GraphModule, node: fx.Node) -> bool:
    """Whether its weight and bias are float32 numbers side by side."""
    factors: Any = node.args[2:4]
    if any(factor.op != "get_attr" for factor in factors):
        return False
    tensors = [get_tensor(made, str(factor.target)) for factor in factors]
    return all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)


def eps_of(node: fx.Node) -> Any:
    return node.args[4] if len(node.args) > 4 else node.kwargs.get("eps", 1e-5)


def replace_norm(made: fx.GraphModule, node: fx.Node) -> None:
    """With the choice of rows that alone reads it, if one does."""
    x, _, weight, bias = node.args[:4]
    user = picked(made, node)
    if user is None:
        put(made.graph, node, layer_norm, (x, weight, bias, eps_of(node)))
        return
    put(made.graph, user, layer_norm, (x, weight, bias, eps_of(node), user.args[2]))
    made.graph.erase_node(node)


def put(graph: fx.Graph, node: fx.Node, function: Any, arguments: tuple[Any, ...]) -> None:
    """`function` in the place of a node."""
    with graph.inserting_before(node):
        made = graph.call_function(function, arguments)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def only_user(node: fx.Node) -> fx.Node | None:
    """What alone reads it; None: several do, or nobody."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def picked(made: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The choice of rows that alone reads it: of each sample, always the same."""
    user = only_user(node)
    return user if user is not None and user.target is aten.index_select.default and _picks(made, user) else None


def _picks(made: fx.GraphModule, select: fx.Node) -> bool:
    order: Any = select.args[2]
    if select.args[1] != 1 or len(mark_of(select).shape or ()) != 3 or order.op != "get_attr":
        return False
    tensor = get_tensor(made, str(order.target))
    return tensor.dtype == torch.int64 and tensor.ndim == 1 and tensor.is_contiguous()
