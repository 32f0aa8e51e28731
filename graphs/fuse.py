"""Captured branches and a captured head → one torch.fx graph with one output per exit.

    inputs   "image.pixels", "text.input_ids", … and "presence" [batch, branch]
    output   {"exits": {name: logits [batch, label]}, "embeddings": {branch: [batch, dim]},
              "states": {"image.layer4": [batch, features]}}, the pooled layers that were asked for

The head is copied once per exit, with constants for what that exit does not see. Masking embeddings instead would make
every exit depend on every encoder, and there would be nothing to leave to a later stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmpipe.graphs.capture import Captured
from mmpipe.graphs.late import LateModule
from mmpipe.graphs.plan import HEAD, PRESENCE, GraphError, Mark

aten = torch.ops.aten


@dataclass(frozen=True)
class Probe:
    """A linear answer on one layer of one encoder: its state, pooled over all but batch and features."""

    branch: str
    layer: int  # from 1
    weight_LD: Tensor
    bias_L: Tensor
    mask: str | None = None  # the branch's input [batch, tokens] that is 0 at padding


@dataclass(frozen=True)
class PooledLayer:
    """A layer's state to hand out, pooled exactly as a probe on it would pool: what probes are trained on."""

    branch: str
    layer: int  # from 1
    mask: str | None = None  # as a Probe's

    @property
    def name(self) -> str:
        return f"{self.branch}.layer{self.layer}"


@dataclass(frozen=True)
class ExitSpec:
    """An exit to build: the head on what it `sees`, at `depth` (1-based head output; None: the last), or a probe."""

    name: str
    sees: tuple[str, ...]
    depth: int | None = None
    probe: Probe | None = None


class FusedGraph(LateModule):
    """The fused graph. `version` counts recompilations, so that who cut it knows when it was edited."""

    version = 0

    def recompile(self) -> Any:
        self.version += 1
        return super().recompile()


def reach(starts: Iterable[fx.Node], further: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The nodes themselves and all that `further` leads to from them."""
    found: set[fx.Node] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(further(node))
    return found


def mark_of(node: fx.Node) -> Mark:
    """The node's Mark; a node that a user put in takes the place of its first marked argument, shape unknown."""
    mark = node.meta.get("mmpipe")
    if isinstance(mark, Mark):
        return mark
    for argument in node.all_input_nodes:
        return replace(mark_of(argument), shape=None, dtype=None, batch_multiple=None)
    return Mark(HEAD)


def fuse(
    branches: Sequence[Captured],
    head: Captured | None,
    exits: Sequence[ExitSpec],
    states: Sequence[PooledLayer] = (),
) -> FusedGraph:
    """Join graphs of encoders (one output, [batch, dim]) and of a head into one.

    `head`: captured with inputs `presence` and one per branch, outputs one per depth. `exits`: in order, the last being
    the full pipeline; empty together with `head=None` for a pipeline that only embeds. `states`: pooled layers that
    are outputs too, beside the embeddings.
    """
    if (head is None) != (not exits):
        raise GraphError("a head and exits go together")
    joiner = _Joiner()
    embeddings: dict[str, fx.Node] = {}
    for branch in branches:
        if branch.outputs != 1:
            raise GraphError(
                f"{branch.name}: an encoder returns one tensor [batch, dim]; this one returns {branch.outputs}"
            )
        inputs = {name: joiner.placeholder(branch, name) for name in branch.inputs}
        (embedding,) = joiner.copy(branch, inputs)
        embeddings[branch.name] = joiner.through(embedding)
        mark = mark_of(embeddings[branch.name])
        if not mark.batch_leads or len(mark.shape or ()) != 2:
            raise GraphError(f"{branch.name}: an encoder returns [batch, dim]; this one returns {mark.shape}")
    answers: dict[str, fx.Node] = {}
    if head is not None:
        presence = joiner.presence(len(branches))
        order = [branch.name for branch in branches]
        copies: dict[tuple[str, ...], tuple[fx.Node, ...]] = {}
        for spec in exits:
            if spec.probe is not None:
                answers[spec.name] = joiner.probe(spec.probe, spec.name)
                continue
            if spec.sees not in copies:  # depths of the full head share one copy
                seen = joiner.view_of_exit(spec, order, embeddings, presence)
                copies[spec.sees] = joiner.copy(head, seen, copy=spec.name)
            outputs = copies[spec.sees]
            if spec.depth is not None and spec.depth > len(outputs):
                raise GraphError(f"exit {spec.name}: the head answers at {len(outputs)} depths, not {spec.depth}")
            answers[spec.name] = outputs[(spec.depth or len(outputs)) - 1]
    pooled = {state.name: joiner.state(state) for state in states}
    return joiner.finish({"exits": answers, "embeddings": embeddings, "states": pooled})


class _Joiner:
    """Builds the fused graph node by node; tensors hang under the branch's name."""

    def __init__(self) -> None:
        self.root, self.graph = nn.Module(), fx.Graph()
        self.placeholders: list[fx.Node] = []
        self.made: dict[str, fx.Node] = {}
        self.start = self.graph.call_function(len, ((),))  # placeholders go before it; erased at the end

    def _node(self, target: Any, args: tuple[Any, ...], mark: Mark) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["mmpipe"] = mark
        return node

    def _constant(self, name: str, tensor: Tensor, mark: Mark) -> fx.Node:
        set_tensor(self.root, name, tensor)
        node = self.graph.get_attr(name)
        node.meta["mmpipe"] = replace(mark, shape=tuple(tensor.shape), dtype=tensor.dtype)
        return node

    def _placeholder(self, name: str, mark: Mark) -> fx.Node:
        with self.graph.inserting_before(self.start):
            node = self.graph.placeholder(name.replace(".", "_"))
        node.meta["mmpipe"] = mark
        node.meta["input"] = name
        return node

    def placeholder(self, branch: Captured, name: str) -> fx.Node:
        source = next(n for n in branch.graph.graph.nodes if n.op == "placeholder" and n.target == name)
        node = self._placeholder(f"{branch.name}.{name}", mark_of(source))
        self.made[f"{branch.name}.{name}"] = node
        return node

    def presence(self, count: int) -> fx.Node:
        return self._placeholder(PRESENCE, Mark(HEAD, shape=("B", count), dtype=torch.bool))

    def copy(self, captured: Captured, inputs: Mapping[str, fx.Node], copy: str | None = None) -> tuple[fx.Node, ...]:
        """Copy a captured graph's nodes with its placeholders replaced; returns its outputs."""
        env: dict[fx.Node, fx.Node] = {}
        for node in captured.graph.graph.nodes:
            if node.op == "placeholder":
                env[node] = inputs[node.target]
            elif node.op == "output":
                return tuple(env[output] for output in node.args[0])
            elif node.op == "get_attr":
                name = f"{captured.name}.{node.target.removeprefix('module.')}"
                env[node] = self._constant(
                    name, get_tensor(captured.graph, node.target), replace(mark_of(node), copy=copy)
                )
            else:
                made = self.graph.node_copy(node, env.__getitem__)
                made.meta = {"mmpipe": replace(mark_of(node), copy=copy)}
                env[node] = made
        raise AssertionError("a graph has an output")

    def through(self, embedding: fx.Node) -> fx.Node:
        """An encoder that hands on its input gets one node, so that there is something to run."""
        return (
            self._node(aten.alias.default, (embedding,), mark_of(embedding))
            if embedding.op == "placeholder"
            else embedding
        )

    def view_of_exit(
        self, spec: ExitSpec, order: Sequence[str], embeddings: Mapping[str, fx.Node], presence: fx.Node
    ) -> dict[str, fx.Node]:
        """What one exit's copy of the head is given: zeros and False for what it does not see."""
        base = Mark(HEAD, copy=spec.name)
        if set(spec.sees) == set(order):
            return {**embeddings, PRESENCE: presence}
        seen_M = torch.tensor([name in spec.sees for name in order])
        constant = self._constant(f"exit.{spec.name.replace('.', '_')}.sees", seen_M, base)
        flags = replace(mark_of(presence), copy=spec.name)
        given = {PRESENCE: self._node(aten.bitwise_and.Tensor, (presence, constant), flags)}
        size = self._node(aten.sym_size.int, (presence, 0), replace(base, batch_multiple=1))
        for name in order:
            if name in spec.sees:
                given[name] = embeddings[name]
                continue
            mark = mark_of(embeddings[name])
            assert mark.shape is not None
            zero = self._constant(
                f"exit.{spec.name.replace('.', '_')}.no_{name}", torch.zeros(1, int(mark.shape[1])), base
            )
            given[name] = self._node(
                aten.expand.default, (zero, [size, -1]), replace(base, shape=mark.shape, dtype=torch.float32)
            )
        return given

    def probe(self, probe: Probe, name: str) -> fx.Node:
        """Pool the state after a layer and answer from it."""
        base = Mark(HEAD, copy=name)
        features = probe.weight_LD.shape[1]
        state = layer_output(self.graph, probe.branch, probe.layer)
        shape = mark_of(state).shape
        assert shape is not None
        if features not in (shape[-1], shape[1]):
            raise GraphError(f"exit {name}: its probe wants {features} features, the layer has {shape[-1]}")
        pooled = self.pool(state, features, probe.branch, probe.mask, base)
        weight_node = self._constant(f"exit.{name.replace('.', '_')}.weight", probe.weight_LD, base)
        bias_node = self._constant(f"exit.{name.replace('.', '_')}.bias", probe.bias_L, base)
        logits = replace(base, shape=("B", probe.weight_LD.shape[0]), dtype=torch.float32)
        return self._node(aten.linear.default, (pooled, weight_node, bias_node), logits)

    def state(self, layer: PooledLayer) -> fx.Node:
        """A layer's pooled state as an output of its own branch."""
        state = layer_output(self.graph, layer.branch, layer.layer)
        features = layer_features(self.graph, layer.branch, layer.layer)
        return self.pool(state, features, layer.branch, layer.mask, Mark(layer.branch))

    def pool(self, state: fx.Node, features: int, branch: str, mask: str | None, base: Mark) -> fx.Node:
        """[batch, …] → [batch, features]: the mean over all but those two, where there is a mask over what it keeps."""
        shape = mark_of(state).shape
        assert shape is not None
        pooled = replace(base, shape=("B", features), dtype=torch.float32)
        if len(shape) == 3 and features == shape[-1] and mask is not None:
            mask_BT = self.made[f"{branch}.{mask}"]
            weight = replace(base, shape=(*(mark_of(mask_BT).shape or ()), 1), dtype=torch.float32)
            mask_BT1 = self._node(aten.unsqueeze.default, (mask_BT, -1), replace(weight, dtype=mark_of(mask_BT).dtype))
            mask_BT1 = self._node(aten.to.dtype, (mask_BT1, torch.float32), weight)
            kept = self._node(
                aten.mul.Tensor, (state, mask_BT1), replace(base, shape=shape, dtype=mark_of(state).dtype)
            )
            total = self._node(aten.sum.dim_IntList, (kept, [1]), pooled)
            count = self._node(aten.sum.dim_IntList, (mask_BT1, [1]), replace(pooled, shape=("B", 1)))
            count = self._node(aten.clamp_min.default, (count, 1.0), replace(pooled, shape=("B", 1)))
            return self._node(aten.div.Tensor, (total, count), pooled)
        if len(shape) > 2:  # features last (tokens), else first (convolutions)
            over = range(1, len(shape) - 1) if features == shape[-1] else range(2, len(shape))
            return self._node(aten.mean.dim, (state, list(over)), pooled)
        return state

    def finish(self, output: dict[str, dict[str, fx.Node]]) -> FusedGraph:
        self.graph.erase_node(self.start)
        self.graph.output(output).meta["mmpipe"] = Mark(HEAD)
        fused = FusedGraph(self.root, self.graph, "FusedGraph")
        fused.graph.eliminate_dead_code()
        fused.recompile()
        fused.eval()
        return fused


def layer_output(graph: fx.Graph, branch: str, layer: int) -> fx.Node:
    """The last tensor of a layer that something outside the layer reads. GraphError where there is no such."""
    inside = {n: None for n in graph.nodes if mark_of(n).branch == branch and mark_of(n).layer == layer}
    outward = [n for n in inside if mark_of(n).batch_leads and any(user not in inside for user in n.users)]
    if not outward:
        deepest = max((mark_of(n).layer or 0 for n in graph.nodes if mark_of(n).branch == branch), default=0)
        if layer <= deepest:
            why = "that layer hands on no tensor with one row per sample"
        else:
            why = f"the encoder has {deepest} layers" if deepest else "this encoder has no layers to exit from"
        raise GraphError(f"after {branch}.layer{layer}: {why}")
    found: fx.Node = outward[-1]
    return found


def layer_features(graph: fx.Graph, branch: str, layer: int) -> int:
    """How many features a layer's output has: of its dimensions, the one that the layer's vectors (biases, norms) have.

    A token's features are last, a convolution's first; the shape alone doesn't say which it is.
    """
    shape = mark_of(layer_output(graph, branch, layer)).shape
    assert shape is not None
    vectors = [
        mark_of(argument).shape
        for node in graph.nodes
        if mark_of(node).branch == branch and mark_of(node).layer == layer
        for argument in node.all_input_nodes
        if argument.op == "get_attr" and len(mark_of(argument).shape or ()) == 1
    ]
    first, last = (sum(vector == (size,) for vector in vectors) for size in (shape[1], shape[-1]))
    convolution = first > last or (first == last and len(shape) == 4)
    return int(shape[1] if convolution else shape[-1])


def outputs_of(graph: fx.Graph) -> dict[str, dict[str, fx.Node]]:
    """The fused graph's output: {"exits": {name: node}, "embeddings": {branch: node}, "states": {layer: node}}."""
    found = next(node for node in graph.nodes if node.op == "output").args[0]
    assert isinstance(found, Mapping)
    return {"states": {}, **{key: dict(value) for key, value in found.items()}}


def inputs_of(graph: fx.Graph) -> Iterator[tuple[str, fx.Node]]:
    """(input name, placeholder) in order: "image.pixels", …, "presence"."""
    for node in graph.nodes:
        if node.op == "placeholder":
            yield node.meta.get("input", node.target), node


def mark_edits(graph: FusedGraph) -> None:
    """Give nodes that a user put in a Mark with the shape that they have at two batch sizes."""
    new = [node for node in graph.graph.nodes if "mmpipe" not in node.meta]
    if not new:
        return
    small, large = (_shapes(graph, batch) for batch in (3, 5))
    for node in new:
        mark = mark_of(node)
        if node in small:
            (at_3, dtype), (at_5, _) = small[node], large[node]
            shape = tuple(
                a if a == b else "B" if (a, b) == (3, 5) else f"{a / 3:g}*B" for a, b in zip(at_3, at_5, strict=True)
            )
            mark = replace(mark, shape=shape, dtype=dtype)
        node.meta["mmpipe"] = mark


def _shapes(graph: FusedGraph, batch: int) -> dict[fx.Node, tuple[tuple[int, ...], torch.dtype]]:
    """Run the graph on fake tensors of `batch` rows: the shape and dtype of every tensor in it."""
    found: dict[fx.Node, tuple[tuple[int, ...], torch.dtype]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if isinstance(value, Tensor):
                found[node] = tuple(value.shape), value.dtype
            return value

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        rows = []
        for name, node in inputs_of(graph.graph):
            mark = mark_of(node)
            assert mark.shape is not None, name
            rows.append(torch.zeros([batch if size == "B" else int(size) for size in mark.shape], dtype=mark.dtype))
        Recorder(graph).run(*rows)
    return found


def get_tensor(root: nn.Module, target: str) -> Tensor:
    """The tensor that a get_attr node names."""
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value.detach()


def set_tensor(root: nn.Module, target: str, tensor: Tensor) -> None:
    """Hang a tensor under a dotted name, as a buffer; the same name twice means the same tensor."""
    *path, name = target.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_buffer(name, tensor.detach())


def drop_unread_tensors(module: fx.GraphModule) -> None:
    """Let go of what no node of the graph reads any more."""
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in list(module.named_buffers(remove_duplicate=False)):
        if name not in read:
            path, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(path), leaf)


def sweep(graph: FusedGraph) -> int:
    """Erase what no output reads; inputs stay, they are the caller's."""
    count = 0
    for node in reversed(list(graph.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.graph.erase_node(node)
            count += 1
    return count
