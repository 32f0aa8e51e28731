"""The slow twin of every other backend, in float32: the graph as it is, one ATen operation after the other. In bfloat16
on a CPU its products are on packed weights (packed.py); a log spectrum is computed a few rows at a time.

A segment becomes one straight function, which TorchScript's interpreter takes on the host where it can
(interpreted.py), else Python. Against the code that torch.fx writes Python's saves what a small segment
feels: tensors are found as locals instead of through `nn.Module.__getattr__`, operations without the lookups in
`torch.ops` (a sixth of a single call of the quickstart models). Every value is freed after its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from mmpipe.graphs.backends import Lowered, Target
from mmpipe.graphs.backends.convolved import convolved
from mmpipe.graphs.backends.interpreted import interpreted
from mmpipe.graphs.backends.packed import available, packed
from mmpipe.graphs.backends.spectrum import split
from mmpipe.graphs.plan import Segment
from mmpipe.graphs.precision import lowered

_BAND = 4  # rows


def lower(segment: Segment, module: fx.GraphModule, target: Target, examples: Sequence[Tensor]) -> Lowered:
    """The function; torch.fx's own where the graph holds calls of modules (a user put them in)."""
    return written(segment, joined(module, target), examples)


def joined(
    module: fx.GraphModule, target: Target, ours: Callable[[fx.GraphModule], None] = lambda short: None
) -> fx.GraphModule:
    """A segment's module in the target's type, with the operations that it will be computed by.

    `ours` puts operations of its own into the copy before the products that are left are packed; matrices of linear
    layers may still be float32 then.
    """
    packs = target.dtype == torch.bfloat16 and available()
    short = lowered(module, target.dtype, matrices=not packs)
    if short is not module:
        ours(short)
    if packs:
        short = packed(short)
    return convolved(short, target.rows)


def written(segment: Segment, short: fx.GraphModule, examples: Sequence[Tensor]) -> Lowered:
    """Such a module as one function."""
    if any(node.op == "call_module" for node in short.graph.nodes):
        return short.forward
    on_host = _on_host(short, examples)
    parts = split(short) if on_host else None
    if parts is None or not _by_rows(parts[0]):
        function = _Writer(short).function(segment.name)
        return interpreted(short, function) if on_host else function
    front, rest = (interpreted(part, _Writer(part).function(segment.name)) for part in parts)
    return lambda *tensors: rest(*tensors, *_in_bands(front, tensors))


def _on_host(module: fx.GraphModule, examples: Sequence[Tensor]) -> bool:
    """Whether nothing it computes with is on another device: there a band would be a launch more, not memory near."""
    return all(tensor.device.type == "cpu" for tensor in (*module.buffers(), *module.parameters(), *examples))


def _by_rows(front: fx.GraphModule) -> bool:
    """Whether every value it hands on has the batch, or so many times it, first."""
    (values,) = next(node for node in front.graph.nodes if node.op == "output").args
    return all(isinstance(value.meta["mmpipe"].shape[0], str) for value in values)


def _in_bands(front: Callable[..., Any], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """A spectrum is many times its sound, and each step passes over all of it: a few rows at a time stay near."""
    rows = tensors[0].shape[0]
    if rows <= _BAND:
        found: Sequence[Tensor] = front(*tensors)
        return found
    bands = []
    for start in range(0, rows, _BAND):
        # every band has as many rows, the last computes some again: a row's last bit may depend on their number
        begin = min(start, rows - _BAND)
        values = front(*(tensor[begin : begin + _BAND] for tensor in tensors))
        skipped = start - begin
        bands.append([value[len(value) // _BAND * skipped :] for value in values])
    return [torch.cat(parts) for parts in zip(*bands, strict=True)]


class _Writer:
    """Writes the source of one function. What it refers to is bound as default arguments: locals, the fastest names."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.bound: dict[str, Any] = {}
        self.names: dict[int, str] = {}  # id of a node or of a bound object → its name

    def function(self, name: str) -> Callable[..., Any]:
        nodes = list(self.module.graph.nodes)
        self.names = {id(node): f"v{number}" for number, node in enumerate(nodes)}
        dead = _last_uses(nodes)
        inputs, lines = [], []
        for node in nodes:
            if node.op == "placeholder":
                inputs.append(self._text(node))
            elif node.op == "get_attr":
                self.names[id(node)] = self._bind(attrgetter(str(node.target))(self.module))
            elif node.op == "output":
                lines.append(f"return {self._text(node.args[0])}")
            else:
                lines.append(f"{self._text(node)} = {self._call(node)}")
                if dead[node]:
                    lines.append(f"del {', '.join(map(self._text, dead[node]))}")
        # bound names come after a bare *, so that no argument can take their place
        parameters = ", ".join([*inputs, *(["*", *(f"{key}={key}" for key in self.bound)] if self.bound else [])])
        source = "\n    ".join([f"def segment({parameters}):", *lines])
        scope: dict[str, Any] = dict(self.bound)
        exec(compile(source, f"<segment {name}>", "exec"), scope)
        function: Callable[..., Any] = scope["segment"]
        return function

    def _call(self, node: fx.Node) -> str:
        arguments = [self._text(value) for value in node.args]
        arguments += [f"{key}={self._text(value)}" for key, value in node.kwargs.items()]
        if node.op == "call_method":
            return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
        # an OpOverload only forwards to `_op`
        return f"{self._bind(getattr(node.target, '_op', node.target))}({', '.join(arguments)})"

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[id(value)]
        if isinstance(value, tuple) and type(value) is tuple:
            return f"({''.join(self._text(item) + ', ' for item in value)})"
        if isinstance(value, list):
            return f"[{', '.join(self._text(item) for item in value)}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key!r}: {self._text(item)}' for key, item in value.items())}}}"
        if isinstance(value, slice):
            return f"slice({self._text(value.start)}, {self._text(value.stop)}, {self._text(value.step)})"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        return self._bind(value)

    def _bind(self, value: Any) -> str:
        name = self.names.get(id(value))
        if name is None:
            name = self.names[id(value)] = f"bound_{len(self.bound)}"
            self.bound[name] = value
        return name


def _last_uses(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """node → values that nothing after it reads, its own among them if nothing does."""
    dead: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last.setdefault(node, node)
        for used in node.all_input_nodes:
            last[used] = node
    for value, user in last.items():
        if value.op not in ("get_attr", "output", "placeholder") and user.op != "output":
            dead[user].append(value)
    return dead
