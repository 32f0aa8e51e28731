"""Products with weights that are laid out for this processor once, not at every call, and with what follows in them.

    linear(x, W, b)              → one operation of oneDNN on the packed W
    activation(linear(x, W, b))  → the same, the activation taken while the result is in the registers
    linear(x, W, b) + y          → the same, added to y there

In bfloat16 on a CPU: there torch lays W out anew in every call, which for a few rows is half of the time. In float32 it
doesn't, and the plain operation is as fast.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

from mmpipe.graphs.fuse import drop_unread_tensors, get_tensor, mark_of, set_tensor
from mmpipe.graphs.late import LateModule
from mmpipe.graphs.precision import once, shortened

aten = torch.ops.aten

ACTIVATIONS = {aten.relu.default: "relu", aten.silu.default: "swish", aten.gelu.default: "gelu"}
_LEAST = 16  # features in and out: below it packing gains nothing


def available() -> bool:
    """Whether this torch has oneDNN's operations, and this processor multiplies bfloat16 in them."""
    return bool(
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def packed(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a lowered module with its bfloat16 products packed; the module itself where there are none.

    Matrices of products in bfloat16 may still be float32. One after the other is shortened and packed: a whole model in
    float32, bfloat16 and packed at once would be twice the memory that it keeps. Other weights are shared with the
    original.
    """
    if not available() or not any(_fits(module, node) or _is_long(module, node) for node in module.graph.nodes):
        return module
    made = LateModule(module, copy.deepcopy(module.graph))
    for node in list(made.graph.nodes):
        if _fits(made, node):
            _pack(made, node)
        elif _is_long(made, node):
            _shorten(made, node)
    made.graph.eliminate_dead_code()
    drop_unread_tensors(made)
    made.recompile()
    return made


def _fits(module: fx.GraphModule, node: fx.Node) -> bool:
    if not _is_product(node) or not all(n.op == "get_attr" for n in node.all_input_nodes[1:]):
        return False
    weight: Any = node.args[1]
    matrix = get_tensor(module, str(weight.target))
    given = node.args[2] if len(node.args) > 2 else None
    alike = given is None or get_tensor(module, str(given.target)).dtype == torch.bfloat16  # type: ignore[union-attr]
    return matrix.device.type == "cpu" and matrix.ndim == 2 and min(matrix.shape) >= _LEAST and alike


def _is_product(node: fx.Node) -> bool:
    return node.target is aten.linear.default and mark_of(node).dtype == torch.bfloat16


def _is_long(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether its matrix is still longer than what it computes in."""
    if not _is_product(node):
        return False
    weight: Any = node.args[1]
    return weight.op == "get_attr" and get_tensor(module, str(weight.target)).dtype == torch.float32


def _shorten(module: fx.GraphModule, node: fx.Node) -> None:
    weight: Any = node.args[1]
    target = f"{weight.target}_short"
    matrix = get_tensor(module, str(weight.target))
    set_tensor(module, target, once(matrix, torch.bfloat16, lambda: shortened(matrix, torch.bfloat16)))
    with module.graph.inserting_before(node):
        short = module.graph.get_attr(target)
    short.meta["mmpipe"] = weight.meta.get("mmpipe")
    node.replace_input_with(weight, short)


def _pack(module: fx.GraphModule, node: fx.Node) -> None:
    weight: Any = node.args[1]
    target = f"{weight.target}_packed"
    try:
        get_tensor(module, target)
    except AttributeError:
        matrix = get_tensor(module, str(weight.target))
        set_tensor(module, target, once(matrix, "packed", lambda: _laid_out(matrix)))
    graph = module.graph
    bias = node.args[2] if len(node.args) > 2 else None
    if len(node.users) == 1 and _is_seen_otherwise(node, next(iter(node.users))):
        _see_sum(graph, node, next(iter(node.users)))
    user = next(iter(node.users)) if len(node.users) == 1 else None
    last = node
    after: tuple[Any, ...] = ("none", [], "")
    with graph.inserting_before(node):
        laid_out = graph.get_attr(target)
        laid_out.meta["mmpipe"] = weight.meta.get("mmpipe")
    if user is not None and user.target in ACTIVATIONS:
        last = user
        after = (ACTIVATIONS[user.target], [], form_of(user))
    elif user is not None and (other := added(node, user)) is not None:
        last = user
        with graph.inserting_before(last):
            made = graph.call_function(
                torch.ops.mkldnn._linear_pointwise.binary, (node.args[0], other, laid_out, bias, "add")
            )
        put_in_place(graph, node, last, made)
        return
    with graph.inserting_before(last):
        made = graph.call_function(torch.ops.mkldnn._linear_pointwise.default, (node.args[0], laid_out, bias, *after))
    put_in_place(graph, node, last, made)


def form_of(activation: fx.Node) -> str:
    """Which of its forms an activation takes: GELU has two."""
    return str(activation.kwargs.get("approximate", "none")) if activation.target is aten.gelu.default else ""


def _laid_out(matrix: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(shortened(matrix, torch.bfloat16))
    return packed


def added(node: fx.Node, user: fx.Node) -> fx.Node | None:
    """What is added to the product: a value of the same type and shape."""
    if user.target is not aten.add.Tensor or user.kwargs:
        return None
    other = next((n for n in user.args if n is not node), None)
    if not isinstance(other, fx.Node) or other.op == "get_attr":
        return None
    one, two = mark_of(node), mark_of(other)
    return other if one.shape is not None and (one.shape, one.dtype) == (two.shape, two.dtype) else None


def _is_seen_otherwise(node: fx.Node, view: fx.Node) -> bool:
    """reshape(product) + y"""
    if view.target is not aten.reshape.default or len(view.users) != 1:
        return False
    shape = mark_of(node).shape
    symbolic_first = shape is not None and all(isinstance(size, int) for size in shape[1:])
    return symbolic_first and added(view, next(iter(view.users))) is not None


def _see_sum(graph: fx.Graph, node: fx.Node, view: fx.Node) -> None:
    """reshape(product) + y → reshape(product + reshape(y))"""
    total = next(iter(view.users))
    other: Any = added(view, total)
    mark = mark_of(node)
    assert mark.shape is not None
    with graph.inserting_before(total):
        seen = graph.call_function(aten.reshape.default, (other, [-1, *mark.shape[1:]]))
        summed = graph.call_function(aten.add.Tensor, (node, seen))
        back = graph.call_function(aten.reshape.default, (summed, *view.args[1:]))
    seen.meta["mmpipe"] = summed.meta["mmpipe"] = mark
    back.meta = dict(total.meta)
    total.replace_all_uses_with(back)
    graph.erase_node(total)
    graph.erase_node(view)


def put_in_place(graph: fx.Graph, node: fx.Node, last: fx.Node, made: fx.Node) -> None:
    """One operation for all from `node` to `last`, each of which only the next reads."""
    made.meta = dict(last.meta)
    last.replace_all_uses_with(made)
    while last is not node:
        before = next(one for one in last.all_input_nodes if one is node or node in one.all_input_nodes)
        graph.erase_node(last)
        last = before
    graph.erase_node(node)
