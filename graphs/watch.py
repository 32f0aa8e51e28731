"""Looking inside a segment: the same graph with more outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from mmpipe.graphs.cut import Cut
from mmpipe.graphs.fuse import FusedGraph, layer_output, mark_of
from mmpipe.graphs.late import LateModule
from mmpipe.graphs.plan import GraphError


@dataclass(frozen=True)
class Place:
    """Where a watched tensor is: its segment, its node, and whether the segment returns it anyway."""

    segment: str
    node: str
    written: bool


def find(graph: FusedGraph, made: Cut, where: str) -> list[Place]:
    """A segment ("image@0"), a layer ("image.layer4") or a branch's embedding ("image") → the tensors to look at.

    Raises GraphError that says what there is.
    """
    plan = made.plan
    for segment in plan.segments:
        if segment.name == where:
            return [Place(where, name, True) for name in segment.writes]
    embedding = dict(plan.embeddings).get(where)
    branch, _, layer = where.partition(".layer")
    if embedding is not None:
        node = embedding
    elif layer.isdigit() and branch in {b.name for b in plan.branches}:
        node = layer_output(graph.graph, branch, int(layer)).name
    else:
        segments = ", ".join(segment.name for segment in plan.segments)
        branches = ", ".join(b.name for b in plan.branches)
        raise GraphError(
            f"{where!r}: nothing is called so; segments: {segments}; embeddings: {branches}; BRANCH.layerN"
        )
    for segment in plan.segments:
        if node in segment.writes:
            return [Place(segment.name, node, True)]
        if any(inner.meta.get("fused") == node for inner in made.modules[segment.name].graph.nodes):
            return [Place(segment.name, node, False)]
    raise GraphError(f"{where!r}: no segment computes it")


def with_outputs(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """A segment's module that returns, after its writes, the nodes that the fused graph calls `names`."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(module.graph, env)
    by_name = {node.meta.get("fused"): node for node in module.graph.nodes}
    inner = [by_name[name] for name in names]
    for node in inner:
        if not mark_of(node).batch_leads:
            raise GraphError(f"{node.name}: has not one row for each sample")
    assert isinstance(returned, tuple)
    graph.output((*returned, *(env[node] for node in inner)))
    return LateModule(module, graph, module.__class__.__name__).eval()
