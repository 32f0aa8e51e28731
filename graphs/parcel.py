"""A segment's module → bytes for another process of ours, and back: operations, tensors and marks as they are.

torch.fx itself would write Python on one side and trace it anew on the other, and lose the marks on the way.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_aggregate


@dataclass(frozen=True)
class _Node:
    """Stands for a node among arguments, by its place in the graph."""

    place: int


@dataclass(frozen=True)
class _Operation:
    """Stands for an operation of PyTorch's, which can't be pickled."""

    name: str  # with its library: "aten::linear"
    overload: str


def wrap(module: fx.GraphModule) -> bytes:
    """Raises what pickle raises where a part is of a class that another process could not import."""
    places = {node: place for place, node in enumerate(module.graph.nodes)}

    def plain(value: Any) -> Any:
        return _Node(places[value]) if isinstance(value, fx.Node) else value

    nodes = [
        (
            *(node.op, node.name, _target(node.target)),
            *(map_aggregate(node.args, plain), map_aggregate(node.kwargs, plain)),
            node.meta.get("mmpipe"),
        )
        for node in module.graph.nodes
    ]
    tensors = {str(n.target): attrgetter(n.target)(module) for n in module.graph.nodes if n.op == "get_attr"}
    modules = {str(n.target): module.get_submodule(n.target) for n in module.graph.nodes if n.op == "call_module"}
    content = io.BytesIO()
    torch.save((nodes, tensors, modules), content)
    return content.getvalue()


def unwrap(content: bytes) -> fx.GraphModule:
    """What `wrap` made. It is a pickle: only for what this program wrote itself."""
    nodes, tensors, modules = torch.load(io.BytesIO(content), weights_only=False)
    graph, made = fx.Graph(), list[fx.Node]()

    def live(value: Any) -> Any:
        return made[value.place] if isinstance(value, _Node) else value

    for op, name, target, args, kwargs, mark in nodes:
        if isinstance(target, _Operation):
            library, _, operation = target.name.partition("::")
            target = getattr(getattr(getattr(torch.ops, library), operation), target.overload)
        node = graph.create_node(op, target, map_aggregate(args, live), map_aggregate(kwargs, live), name)
        if mark is not None:
            node.meta["mmpipe"] = mark
        made.append(node)
    return fx.GraphModule({**tensors, **modules}, graph).eval()


def _target(target: Any) -> Any:
    return _Operation(target._schema.name, target._overloadname) if isinstance(target, OpOverload) else target
