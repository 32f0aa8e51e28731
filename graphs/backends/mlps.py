"""A transformer's MLP as one operation of the native backend, with the norms around it and what is added after it.

    layer_norm(linear(activation(linear(layer_norm(x), W, b)), V, c) + y)   →   mlp(x, W, b, V, c, y, norm, then)

The numbers between the products are up to four times as wide as those around them; here they never leave the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from mmpipe.graphs.backends.kernels import sources
from mmpipe.graphs.backends.norms import eps_of, norms, only_user, picked, plain_factors
from mmpipe.graphs.backends.operations import ACTIVATIONS, COLUMNS, mlp, tiled
from mmpipe.graphs.backends.packed import added, form_of
from mmpipe.graphs.fuse import drop_unread_tensors, get_tensor, mark_of, set_tensor
from mmpipe.graphs.precision import once, shortened

aten = torch.ops.aten

_FORMS: dict[Any, str] = {
    (aten.relu.default, ""): "relu",
    (aten.gelu.default, "none"): "gelu",
    (aten.gelu.default, "tanh"): "gelu_tanh",
}
_QUICK = 1.702  # x · sigmoid(1.702 x): what OpenAI's CLIP has for GELU


@dataclass(frozen=True)
class Mlp:
    """Its nodes."""

    first: fx.Node
    second: fx.Node
    activation: str


def found(module: fx.GraphModule, second: fx.Node) -> Mlp | None:
    """The MLP that ends with this product, whatever its type; None: it ends none that the kernel takes."""
    if "mlp.cpp" not in sources() or not _is_product(module, second):
        return None
    between: Any = second.args[0]
    activation, first, readers = _activation(between)
    if first is None or set(between.users) != {second}:
        return None
    if not _is_product(module, first) or set(first.users) != readers:
        return None
    sizes = (mark_of(first).shape or ("",))[1:]
    return Mlp(first, second, activation) if sizes and all(isinstance(size, int) for size in sizes) else None


def _activation(node: fx.Node) -> tuple[str, fx.Node | None, set[fx.Node]]:
    """Which it is, of what, and which nodes read that; None: it is no activation that the kernel takes."""
    x: Any = node.args[0] if node.args else None
    name = _FORMS.get((node.target, form_of(node)), "") if isinstance(x, fx.Node) else ""
    if name:
        return name, x, {node}
    if node.target is not aten.mul.Tensor:
        return "", None, set()
    for x, share in (node.args, node.args[::-1]):
        if not isinstance(share, fx.Node) or share.target is not aten.sigmoid.default or set(share.users) != {node}:
            continue
        scaled: Any = share.args[0]
        if scaled.target is aten.mul.Tensor and scaled.args == (x, _QUICK) and set(scaled.users) == {share}:
            return "quick_gelu", cast("fx.Node", x), {node, scaled}
    return "", None, set()


def join_mlps(made: fx.GraphModule) -> None:
    """In place, those whose products are in bfloat16; their matrices may be float32 yet."""
    for node in list(made.graph.nodes):
        one = found(made, node)
        if one is None:
            continue
        parts: Any = (one.first.args[0], one.first, one.second)
        if all(mark_of(part).dtype == torch.bfloat16 for part in parts):
            _join(made, one)
    made.graph.eliminate_dead_code()
    drop_unread_tensors(made)
    made.recompile()


def _is_product(module: fx.GraphModule, node: fx.Node) -> bool:
    """Of a kept matrix whose sides are multiples of what the kernel takes at a time."""
    if node.target is not aten.linear.default or node.kwargs:
        return False
    factors: Any = [part for part in node.args[1:] if part is not None]
    if any(part.op != "get_attr" for part in factors):
        return False
    matrix = get_tensor(module, str(factors[0].target))
    sides = matrix.ndim == 2 and not any(side % COLUMNS for side in matrix.shape)
    return sides and matrix.device.type == "cpu" and matrix.is_floating_point()


def _join(made: fx.GraphModule, one: Mlp) -> None:
    x: Any = one.first.args[0]
    last, other, norm, then = one.second, None, None, None
    readers = set(x.users)
    user = only_user(last)
    if user is not None and (other := added(last, user)) is not None:
        last = user
    residual = other is x and readers == {one.first, last}
    if (residual or len(readers) == 1) and _normed(made, x) and mark_of(x.args[0]).dtype == torch.bfloat16:
        norm, x = (x.args[2], x.args[3], eps_of(x)), x.args[0]
        other = None if residual else other
    residual = residual and norm is not None
    after = only_user(last)
    if after is not None and _normed(made, after) and after.args[0] is last and picked(made, after) is None:
        then, last = (after.args[2], after.args[3], eps_of(after)), after
    with made.graph.inserting_before(last):
        weights = [part for product in (one.first, one.second) for part in _kept(made, product)]
        arguments = (x, *weights, ACTIVATIONS[one.activation], other, norm, then, residual)
        joined = made.graph.call_function(mlp, arguments)
    joined.meta = dict(last.meta)
    last.replace_all_uses_with(joined)
    made.graph.erase_node(last)


def _normed(made: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it is a layer norm that the kernel takes on the way."""
    return norms(node) and mark_of(node).dtype == torch.bfloat16 and plain_factors(made, node)


def _kept(made: fx.GraphModule, product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Its matrix as the kernel reads it, and its bias in float32."""
    weight: Any = product.args[1]
    bias: Any = product.args[2] if len(product.args) > 2 else None
    matrix = get_tensor(made, str(weight.target))
    # equal matrices are one tensor, whose products may have biases of their own
    names = f"{weight.target}_tiled", f"{weight.target}_tiled_{'no' if bias is None else bias.target}_bias"
    set_tensor(made, names[0], once(matrix, "tiled", lambda: tiled(shortened(matrix, torch.bfloat16))))
    set_tensor(made, names[1], _long(matrix, None if bias is None else get_tensor(made, str(bias.target))))
    nodes = made.graph.get_attr(names[0]), made.graph.get_attr(names[1])
    for node in nodes:
        node.meta["mmpipe"] = weight.meta.get("mmpipe")
    return nodes


def _long(matrix: Tensor, bias: Tensor | None) -> Tensor:
    return torch.zeros(len(matrix)) if bias is None else bias.to(torch.float32).contiguous()
