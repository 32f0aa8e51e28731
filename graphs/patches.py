"""A convolution whose windows neither overlap nor leave gaps is a product with each patch: how transformers begin.

As a product it takes packed weights like the others, and hands its rows on without being turned around.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from mmpipe.graphs.fuse import FusedGraph, get_tensor, mark_of, set_tensor

aten = torch.ops.aten


def multiply_patches(graph: FusedGraph) -> int:
    """conv2d(x, w, stride = kernel) → linear(patches of x, w); returns how many there were."""
    found = 0
    for node in list(graph.graph.nodes):
        if node.target is aten.conv2d.default and _in_patches(graph, node):
            _multiply(graph, node)
            found += 1
    graph.graph.eliminate_dead_code()
    return found


def _in_patches(graph: FusedGraph, node: fx.Node) -> bool:
    """conv2d(x, weight, bias, stride, padding, dilation, groups)"""
    given, weight, *rest = node.args
    if node.kwargs or not isinstance(given, fx.Node) or not all(n.op == "get_attr" for n in node.all_input_nodes[1:]):
        return False
    mark, kernel = mark_of(given), get_tensor(graph, str(weight.target)).shape[2:]  # type: ignore[union-attr]
    if not mark.batch_leads or len(mark.shape or ()) != 4:
        return False
    stride, padding, dilation = (_two(rest[n], 0 if n == 2 else 1) if len(rest) > n else (d, d)
                                 for n, d in ((1, 1), (2, 0), (3, 1)))  # fmt: skip
    groups = rest[4] if len(rest) > 4 else 1
    height, width = mark.shape[2:]  # type: ignore[index]
    whole = height % kernel[0] == 0 and width % kernel[1] == 0
    plain = padding == (0, 0) and dilation == (1, 1) and groups == 1
    return bool(stride == tuple(kernel) and kernel.numel() > 1 and whole and plain)


def _two(value: Any, default: int) -> tuple[Any, ...]:
    """As PyTorch reads it: one number for both, or none."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value) * (2 if len(value) == 1 else 1) if value else (default, default)
    return (None, None)


def _multiply(graph: FusedGraph, node: fx.Node) -> None:
    given: Any = node.args[0]
    weight: Any = node.args[1]
    mark, of = mark_of(node), mark_of(given)
    assert of.shape is not None
    kernel_OCHW = get_tensor(graph, str(weight.target))
    filters, channels, high, wide = kernel_OCHW.shape
    down, across = int(of.shape[2]) // high, int(of.shape[3]) // wide
    target = f"{mark.branch}.folded.patches_of_{node.name}"
    set_tensor(graph, target, kernel_OCHW.flatten(1).contiguous())
    numbers = channels * high * wide
    with graph.graph.inserting_before(node):
        matrix = graph.graph.get_attr(target)
        matrix.meta["mmpipe"] = replace(mark_of(weight), shape=(filters, numbers))
        steps: list[tuple[Any, tuple[Any, ...], tuple[int, ...]]] = [
            (aten.reshape.default, ([-1, channels, down, high, across, wide],), (channels, down, high, across, wide)),
            (aten.permute.default, ([0, 2, 4, 1, 3, 5],), (down, across, channels, high, wide)),
            (aten.reshape.default, ([-1, down * across, numbers],), (down * across, numbers)),
            (aten.linear.default, (matrix, *node.args[2:3]), (down * across, filters)),
            (aten.permute.default, ([0, 2, 1],), (filters, down * across)),
            (aten.reshape.default, ([-1, filters, down, across],), (filters, down, across)),
        ]
        made = given
        for operation, arguments, shape in steps:
            before = made
            made = graph.graph.call_function(operation, (before, *arguments))
            made.meta["mmpipe"] = replace(mark, shape=("B", *shape))
    node.replace_all_uses_with(made)
