"""Exits → stages → segments. One backward slice carries it: stage(node) = the first exit that depends on the node.

    stages_of   every node's stage, moved where a value could not be carried between stages row by row
    cut         the segments' graphs and the Plan

Rules:
- what depends on the batch size alone is recomputed in each segment, never carried;
- a carried value has the batch alone as dimension 0: where it hasn't, its readers join the earlier stage, until it has;
- embeddings belong to the last stage and force nothing; what no output reads is dropped.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from mmpipe.graphs.fuse import FusedGraph, get_tensor, inputs_of, mark_edits, mark_of, outputs_of, set_tensor
from mmpipe.graphs.late import LateModule
from mmpipe.graphs.plan import HEAD, Branch, Exit, GraphError, Plan, Segment, Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Cut:
    """The plan, and for each of its segments a GraphModule: inputs then reads → tuple of writes."""

    plan: Plan
    modules: Mapping[str, fx.GraphModule]


def stages_of(graph: fx.Graph) -> dict[fx.Node, int]:
    """Stage of every node that some output needs; constants and what follows from the batch size have none."""
    outputs = outputs_of(graph)
    exits, last = list(outputs["exits"].values()), max(0, len(outputs["exits"]) - 1)
    stage: dict[fx.Node, int] = {}
    for number, node in enumerate(exits):
        _claim(node, number, stage)
    for node in (*outputs["embeddings"].values(), *outputs["states"].values()):
        _claim(node, last, stage)
    floating = _batch_only(graph)
    for node in floating:
        stage.pop(node, None)
    _move_cuts(graph, stage, floating)
    return stage


def _claim(node: fx.Node, number: int, stage: dict[fx.Node, int]) -> None:
    """Give `number` to a node and all it depends on, where nothing earlier has them."""
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current.op == "get_attr" or stage.get(current, number + 1) <= number:
            continue
        stage[current] = number
        waiting.extend(current.all_input_nodes)


def _batch_only(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value follows from the batch size and constants: sizes, and what is made of sizes."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is aten.sym_size.int:
            if mark_of(node).batch_multiple is not None:
                found.add(node)
        else:
            inputs = [argument for argument in node.all_input_nodes if argument.op != "get_attr"]
            if all(argument in found for argument in inputs):  # none at all: arange(77), made anew where it is read
                found.add(node)
    return found


def _move_cuts(graph: fx.Graph, stage: dict[fx.Node, int], floating: set[fx.Node]) -> None:
    """Where a value that can't be carried is read in a later stage, move the reader forward into the earlier one."""
    order = [node for node in graph.nodes if node in stage]
    moved = True
    while moved:
        moved = False
        for node in order:
            if node.op == "placeholder" or mark_of(node).batch_leads:
                continue
            for user in node.users:
                if user in stage and user.op != "output" and stage[user] > stage[node]:
                    _claim_within(user, stage[node], stage, floating)
                    moved = True


def _claim_within(node: fx.Node, number: int, stage: dict[fx.Node, int], floating: set[fx.Node]) -> None:
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current.op == "get_attr" or current in floating or stage[current] <= number:
            continue
        stage[current] = number
        waiting.extend(current.all_input_nodes)


def cut(graph: FusedGraph) -> Cut:
    """Cut a fused graph into segments by stage and branch. The graph itself is left as it is."""
    mark_edits(graph)
    stage = stages_of(graph.graph)
    floating = _batch_only(graph.graph)
    outputs = outputs_of(graph.graph)
    names = dict.fromkeys(_branch_order(graph))
    wanted = {node for group in outputs.values() for node in group.values()}
    groups: dict[tuple[int, str], list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node in stage and node.op == "call_function":
            groups.setdefault((stage[node], mark_of(node).branch), []).append(node)
    segments, modules, values = [], {}, {}
    input_names = {node: name for name, node in inputs_of(graph.graph)}
    for key in sorted(groups, key=lambda key: (key[0], [*names, HEAD].index(key[1]))):
        segment, module = _segment(graph, key, groups[key], input_names, wanted, floating)
        segments.append(segment)
        modules[segment.name] = module
    segments = [replace(s, every_row=_every_row(s, segments, last=len(outputs["exits"]) - 1)) for s in segments]
    for node in [*input_names, *(n for group in groups.values() for n in group)]:
        name = input_names.get(node, node.name)
        if node in input_names or any(name in s.writes for s in segments):
            values[name] = _value(name, node)
    plan = Plan(
        branches=tuple(
            Branch(
                name,
                tuple(text for text in input_names.values() if text.startswith(f"{name}.")),
                int((mark_of(outputs["embeddings"][name]).shape or (0, 0))[1]),
            )
            for name in names
        ),
        exits=tuple(_exits(outputs["exits"], stage, list(names))),
        segments=tuple(segments),
        values=tuple(values.values()),
        embeddings=tuple((name, node.name) for key in ("embeddings", "states") for name, node in outputs[key].items()),
    )
    return Cut(plan, modules)


def _every_row(segment: Segment, segments: Sequence[Segment], last: int) -> bool:
    carried = any(set(segment.writes) & set(later.reads) for later in segments)
    return segment.branch == HEAD and (segment.stage == last or carried)


def _branch_order(graph: FusedGraph) -> list[str]:
    return list(outputs_of(graph.graph)["embeddings"])


def _value(name: str, node: fx.Node) -> Value:
    mark = mark_of(node)
    if not mark.batch_leads or mark.dtype is None or mark.shape is None:
        raise GraphError(f"{node.name}: a value of shape {mark.shape} can't be carried between stages row by row")
    return Value(name, tuple(int(size) for size in mark.shape[1:]), mark.dtype)


def _exits(answers: Mapping[str, fx.Node], stage: Mapping[fx.Node, int], branches: Sequence[str]) -> list[Exit]:
    """What each exit depends on, and what it has that the one before had not."""
    found: list[Exit] = []
    before: set[fx.Node] = set()
    for name, node in answers.items():
        slice_: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            current = waiting.pop()
            if current not in slice_ and current.op != "get_attr":
                slice_.add(current)
                waiting.extend(current.all_input_nodes)
        work = {n for n in slice_ if n in stage}
        sees = tuple(b for b in branches if any(mark_of(n).branch == b for n in work))
        new = {mark_of(n).branch for n in work - before} - {HEAD}
        # a deeper layer of the head on the same embeddings is something new for every row that has any of them
        brings = tuple(b for b in branches if b in new) or sees
        before |= work
        found.append(Exit(name, node.name, sees, brings))
    return found


def _segment(
    graph: FusedGraph,
    key: tuple[int, str],
    nodes: Sequence[fx.Node],
    input_names: Mapping[fx.Node, str],
    wanted: set[fx.Node],
    batch_only: set[fx.Node],
) -> tuple[Segment, fx.GraphModule]:
    """Copy one segment's nodes into a graph of their own; constants and batch sizes come along."""
    inside = set(nodes)
    needed: dict[fx.Node, None] = {}  # from outside, in order of first use
    floating: dict[fx.Node, None] = {}

    def collect(node: fx.Node) -> None:
        for argument in node.all_input_nodes:
            if argument in inside or argument.op == "get_attr":
                continue
            if argument in batch_only:
                if argument not in floating:
                    if argument.target is not aten.sym_size.int:
                        collect(argument)
                    floating[argument] = None
            else:
                needed[argument] = None

    for node in nodes:
        collect(node)
    inputs = [node for node in input_names if node in needed]
    reads = [node for node in needed if node not in input_names]
    writes = [n for n in nodes if n in wanted or any(u not in inside and u.op != "output" for u in n.users)]
    made, root = fx.Graph(), nn.Module()
    env: dict[fx.Node, fx.Node] = {}
    for node in [*inputs, *reads]:
        env[node] = made.placeholder(node.name)
        env[node].meta = dict(node.meta)
    size: fx.Node | None = None
    source = next((node for node in [*inputs, *reads] if mark_of(node).batch_leads), None)

    def constant(node: fx.Node) -> fx.Node:
        if node not in env:
            target = str(node.target)
            set_tensor(root, target, get_tensor(graph, target))
            env[node] = made.get_attr(target)
            env[node].meta = dict(node.meta)
        return env[node]

    def copy(node: fx.Node) -> None:
        nonlocal size
        if node in batch_only and node.target is aten.sym_size.int:
            if size is None:
                assert source is not None, "a segment has an input with a batch"
                size = made.call_function(aten.sym_size.int, (env[source], 0))
                size.meta["mmpipe"] = replace(mark_of(node), batch_multiple=1)
            multiple = mark_of(node).batch_multiple
            env[node] = size if multiple == 1 else made.call_function(operator.mul, (size, multiple))
        else:
            env[node] = made.node_copy(node, lambda n: constant(n) if n.op == "get_attr" else env[n])
        env[node].meta.setdefault("mmpipe", mark_of(node))
        env[node].meta["fused"] = node.name

    for node in floating:
        copy(node)
    for node in nodes:
        copy(node)
    made.output(tuple(env[node] for node in writes))
    stage, branch = key
    segment = Segment(
        name=f"{branch}@{stage}",
        stage=stage,
        branch=branch,
        inputs=tuple(input_names[node] for node in inputs),
        reads=tuple(node.name for node in reads),
        writes=tuple(node.name for node in writes),
        nodes=len(nodes),
    )
    module = LateModule(root, made, segment.name.replace("@", "_"))
    module.eval()
    return segment, module
