"""Convolutions that compute what follows them while their result is in the registers.

    activation(conv(x, W, b))      → one operation of oneDNN
    conv(x, W, b) + y              → the same, added to y there
    relu(conv(x, W, b) + y)        → and that

On a CPU, in two dimensions, where channels lie last (graphs/convolutions.py): a picture's maps are far larger than a
convolution's weights, and every operation of its own passes over all of them again. Weights are the graph's own.
Left as they are: maps of one place, and in float32 products place by place of a single row, which start sooner as
PyTorch's own (15 µs against 40).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

from mmpipe.graphs.backends.packed import ACTIVATIONS, added, form_of, put_in_place
from mmpipe.graphs.backends.packed import available as multiplies_bfloat16
from mmpipe.graphs.fuse import get_tensor, mark_of
from mmpipe.graphs.late import LateModule

aten = torch.ops.aten

_OPERATION: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
_ACTIVATIONS = {**ACTIVATIONS, aten.hardswish.default: "hardswish"}
_KEEP_LAYOUT = {*_ACTIVATIONS, aten.max_pool2d.default, aten.avg_pool2d.default, aten.add.Tensor}
_DEFAULTS: tuple[Any, ...] = (None, (1, 1), (0, 0), (1, 1), 1)  # bias, stride, padding, dilation, groups


def convolved(module: fx.GraphModule, rows: int) -> fx.GraphModule:
    """A copy of a segment's module with such convolutions, sharing its weights; the module itself without any.

    `rows`: of the bucket that it will be called with.
    """
    if not torch.backends.mkldnn.is_available() or _OPERATION is None:  # type: ignore[no-untyped-call]
        return module
    if not any(_fits(module, node, rows) for node in module.graph.nodes):
        return module
    made = LateModule(module, copy.deepcopy(module.graph))
    for node in list(made.graph.nodes):
        if _fits(made, node, rows):
            _join(made, node)
    made.recompile()
    return made


def _fits(module: fx.GraphModule, node: fx.Node, rows: int) -> bool:
    """Whether it is such a convolution, followed by something that it can compute and nothing else."""
    if node.kwargs or len(node.users) != 1 or not _lays_last(module, node):
        return False
    weight, *given = node.args[1:]
    kernel, kind = get_tensor(module, str(weight.target)).shape[2:], mark_of(node).dtype  # type: ignore[union-attr]
    if kind not in (torch.float32, torch.bfloat16) or (kind == torch.bfloat16 and not multiplies_bfloat16()):
        return False
    if kind == torch.float32 and rows == 1 and kernel == (1, 1):
        return False
    bias = given[0] if given else None
    if isinstance(bias, fx.Node) and (bias.op != "get_attr" or get_tensor(module, str(bias.target)).dtype != kind):
        return False
    user = next(iter(node.users))
    return user.target in _ACTIVATIONS or (_groups(node) == 1 and added(node, user) is not None)


def _lays_last(module: fx.GraphModule, node: Any) -> bool:
    """Whether it is a convolution on a CPU whose weight has its channels last. Its result has too, unless the weight
    could lie either way."""
    if not isinstance(node, fx.Node) or node.target not in (aten.conv2d.default, *_joined()):
        return False
    constants = [one for one in node.all_input_nodes if one.op == "get_attr"]
    weights = [get_tensor(module, str(one.target)) for one in constants]
    mark = mark_of(node)
    return (
        mark.shape is not None
        and len(mark.shape) == 4
        and mark.shape[2:] != (1, 1)
        and any(
            weight.ndim == 4
            and weight.device.type == "cpu"
            and weight.dtype == mark.dtype
            and weight.is_contiguous(memory_format=torch.channels_last)
            for weight in weights
        )
    )


def _join(module: fx.GraphModule, node: fx.Node) -> None:
    graph = module.graph
    given: list[Any] = [*node.args]
    image, weight, bias, stride, padding, dilation, groups = [*given, *_DEFAULTS[len(given) - 2 :]]
    how = (bias, list(padding), list(stride), list(dilation), groups)
    last = next(iter(node.users))
    arguments: tuple[Any, ...]
    if last.target in _ACTIVATIONS:
        operation, arguments = _OPERATION.default, (image, weight, *how, _ACTIVATIONS[last.target], [], form_of(last))
    else:
        other, then = added(node, last), None
        # where channels may not lie last, torch computes a sum and its activation apart, and knows no bfloat16 there
        if len(last.users) == 1 and next(iter(last.users)).target is aten.relu.default and _comes_last(module, image):
            last, then = next(iter(last.users)), "relu"
        operation, arguments = _OPERATION.binary, (image, other, weight, *how, "add", 1.0, then, [], None)
    with graph.inserting_before(last):
        made = graph.call_function(operation, arguments)
    put_in_place(graph, node, last, made)


def _comes_last(module: fx.GraphModule, image: Any) -> bool:
    """Whether channels are sure to lie last in what a convolution reads: some convolution before it has a weight that
    can't be taken for one whose channels come first, as those of one place, or of one channel, can."""
    while isinstance(image, fx.Node) and image.args:
        if _lays_last(module, image):
            weights = [get_tensor(module, str(n.target)) for n in image.all_input_nodes if n.op == "get_attr"]
            if not all(weight.is_contiguous() for weight in weights if weight.ndim == 4):
                return True
        elif image.target not in _KEEP_LAYOUT:
            return False
        image = image.args[0]
    return False


def _groups(node: fx.Node) -> Any:
    return node.args[6] if len(node.args) > 6 else 1


def _joined() -> tuple[Any, Any]:
    return _OPERATION.default, _OPERATION.binary
