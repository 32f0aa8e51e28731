"""The part of a graph that must stay in float32 where the rest doesn't: from a waveform to its log spectrum.

What is quiet in a spectrum is a small difference of large numbers, and the logarithm shows it: of eight bits, little
but noise is left of it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from mmpipe.graphs.fuse import reach
from mmpipe.graphs.late import LateModule

aten = torch.ops.aten

_LOGARITHMS = {aten.log.default, aten.log2.default, aten.log10.default, aten.log1p.default}
_LEARNED = ("norm", "softmax", "attention", "relu", "gelu", "silu", "tanh")  # in what a spectrum is not made of


def split(module: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule] | None:
    """inputs → (front: inputs → values; rest: inputs and values → outputs); None where there is no such spectrum."""
    nodes = list(module.graph.nodes)
    front: set[fx.Node] = set()
    for node in nodes:
        if node.target in _LOGARITHMS:
            before = _before(node)
            if not any(word in str(one.target) for one in before if one.op == "call_function" for word in _LEARNED):
                front |= before
    inputs = [node for node in nodes if node.op == "placeholder"]
    crossing = [
        node
        for node in nodes
        if node in front and node.op == "call_function" and any(user not in front for user in node.users)
    ]
    if not crossing or not all(_is_tensor(node) for node in crossing):
        return None
    rest = {node for node in nodes if node.op == "get_attr" or (node not in front and node.op != "placeholder")}
    return _part(module, inputs, front, crossing), _part(module, [*inputs, *crossing], rest, None)


def as_products(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with Fourier transforms of real frames, of which one range of frequencies is read, as matrix products, for
    what has no transform. The module itself where there are none."""
    if not any(node.target is aten.fft_rfft.default for node in module.graph.nodes):
        return module
    made = LateModule(module, copy.deepcopy(module.graph))
    for node in list(made.graph.nodes):
        if node.target is aten.view_as_real.default:
            _as_product(made, node)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def _as_product(module: fx.GraphModule, node: fx.Node) -> None:
    """view_as_real(rfft(x)[..., first:last]) → [x @ cos, -x @ sin]"""
    source: Any = node.args[0]
    first, last = 0, None
    if source.target is aten.slice.Tensor and not source.kwargs and len(source.args) == 4 and _is_last(source):
        _, _, first, last = source.args
        source = source.args[0]
    # of whole frames, and unscaled: no length, no dimension but the last, no norm
    if source.target is not aten.fft_rfft.default or source.kwargs or not _is_last(source, 2):
        return
    frames, *how = source.args
    if any(one is not None for one in (*how[:1], *how[2:])):
        return
    length = frames.meta["mmpipe"].shape[-1]
    frequencies = torch.arange(length // 2 + 1, dtype=torch.float64)[first:last]
    angle_KN = 2 * torch.pi * torch.outer(frequencies, torch.arange(length, dtype=torch.float64)) / length
    parts = []
    with module.graph.inserting_before(node):
        for name, matrix_KN in (("cos", angle_KN.cos()), ("sin", -angle_KN.sin())):
            target = f"{node.name}_{name}"
            module.register_buffer(target, matrix_KN.float())
            parts.append(module.graph.call_function(aten.linear.default, (frames, module.graph.get_attr(target))))
        stacked = module.graph.call_function(aten.stack.default, (parts, -1))
    for new in (*parts, stacked):
        new.meta["mmpipe"] = node.meta["mmpipe"]
    node.replace_all_uses_with(stacked)


def _is_last(node: fx.Node, place: int = 1) -> bool:
    """Whether the dimension that is its argument there (default: the last) is the last of what it reads."""
    dim: Any = node.args[place] if len(node.args) > place else -1
    return dim in (-1, len(node.args[0].meta["mmpipe"].shape) - 1)  # type: ignore[union-attr]


def _before(node: fx.Node) -> set[fx.Node]:
    """The node and all that it depends on."""
    return reach([node], lambda one: one.all_input_nodes)


def _is_tensor(node: fx.Node) -> bool:
    return "mmpipe" in node.meta and node.meta["mmpipe"].shape is not None


def _part(
    module: fx.GraphModule, inputs: Collection[fx.Node], inside: Collection[fx.Node], writes: list[fx.Node] | None
) -> fx.GraphModule:
    """The nodes `inside` as a module of their own. `writes` None: what the whole module returns."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta = dict(node.meta)
    for node in module.graph.nodes:
        if node in inside and node not in copied:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    if writes is not None:
        graph.output(tuple(copied[node] for node in writes))
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return LateModule(module, graph).eval()
