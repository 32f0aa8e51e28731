"""A segment's operations, one after the other, by TorchScript's interpreter instead of Python's.

Where threads decode beside a segment, Python's lock changes hands around each operation, and a segment of small ones
waits for it longer than it computes. The interpreter takes the whole segment without the lock: on two cores a folder
of the quickstart models takes about 0.85 of its time. Operations and their order stay, nothing is optimised: so do the
bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

_C: Any = torch._C
_NAMESPACES = ("aten", "mkldnn")  # of operations that are the dispatcher's alone
_MEMORY_FORMATS = {  # their numbers in the dispatcher: Python has but their names
    torch.contiguous_format: 0,
    torch.preserve_format: 1,
    torch.channels_last: 2,
    torch.channels_last_3d: 3,
}
_WHOLE_NUMBERS = {
    operator.add: "aten::add",
    operator.sub: "aten::sub",
    operator.mul: "aten::mul",
    operator.floordiv: "aten::floordiv",
}


class _Strange(Exception):
    """Something that TorchScript has no operation for, or takes for another."""


_Function = Callable[..., tuple[Tensor, ...]]


def interpreted(module: fx.GraphModule, python: _Function) -> _Function:
    """`python`, the function from the module's inputs to its tuple of outputs, by the interpreter; `python` itself
    where something in it is not such an operation, or this PyTorch has no such interpreter.

    What the interpreter fails at, `python` does again: the interpreter's errors hide which error it was.
    """
    try:
        script = _Script(module)
        function = _C._create_function_from_graph("segment", script.graph)
    except (_Strange, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return python
    weights = tuple(script.weights)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        before = _C._get_graph_executor_optimize()
        _C._set_graph_executor_optimize(False)  # of this thread
        try:
            found: tuple[Tensor, ...] = function(*tensors, *weights)
            return found
        except RuntimeError:
            pass
        finally:
            _C._set_graph_executor_optimize(before)
        return python(*tensors)

    return run


class _Script:
    """A module's graph as TorchScript's. Weights are inputs, after the module's own."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.graph: Any = _C.Graph()
        self.weights: list[Tensor] = []
        self._values: dict[fx.Node, Any] = {}  # one; or a list, where an operation has several results
        nodes = list(module.graph.nodes)
        for node in nodes:
            if node.op == "placeholder":
                self._values[node] = self._input()
        shared: dict[int, Any] = {}  # one input for a tensor that is read under two names
        for node in nodes:
            if node.op == "get_attr":
                tensor = operator.attrgetter(str(node.target))(module)  # itself: an edit of it is to be seen
                if not isinstance(tensor, Tensor):
                    raise _Strange(str(node.target))
                if id(tensor) not in shared:
                    shared[id(tensor)] = self._input()
                    self.weights.append(tensor)
                self._values[node] = shared[id(tensor)]
        for node in nodes:
            if node.op == "output":
                outputs: Any = node.args[0]
                kinds = _C.TupleType([_C.TensorType.get() for _ in outputs])
                self.graph.registerOutput(self._node("prim::TupleConstruct", [*map(self._one, outputs)], [kinds]))
            elif node.op not in ("placeholder", "get_attr"):
                self._values[node] = self._result(node)

    def _input(self) -> Any:
        value = self.graph.addInput()
        value.setType(_C.TensorType.get())
        return value

    def _result(self, node: fx.Node) -> Any:
        target: Any = node.target
        if node.op != "call_function":
            raise _Strange(node.op)
        if target is operator.getitem:
            source, place = cast("tuple[fx.Node, Any]", node.args)
            results = self._values.get(source)
            if not isinstance(place, int) or results is None:
                raise _Strange(f"item {place} of {source}")
            if isinstance(results, list):
                return results[place]
            if str(results.type()) != "List[Tensor]":
                raise _Strange(f"item {place} of {source}")
            return self._put("aten::__getitem__", [results, self.graph.insertConstant(place)], [_C.TensorType.get()])
        if target is torch.ops.aten.sym_size.int:
            given = [self._one(node.args[0]), self.graph.insertConstant(node.args[1])]
            return self._put("aten::size", given, [_C.IntType.get()])
        if target in _WHOLE_NUMBERS:
            return self._put(_WHOLE_NUMBERS[target], [self._whole(one) for one in node.args], [_C.IntType.get()])
        if not isinstance(target, torch._ops.OpOverload) or target.namespace not in _NAMESPACES:
            raise _Strange(str(target))
        schema: Any = target._schema
        if schema.is_mutable:  # x.mul_(number) is another operation's in other bits, and none may be done twice
            raise _Strange(str(target))
        if node.kwargs.get("implicit"):  # an expand that the interpreter leaves out
            raise _Strange(f"{target} {node.kwargs}")
        given = [self._argument(node, place, one) for place, one in enumerate(schema.arguments)]
        types = [one.type for one in schema.returns]
        return self._put(schema.name, given, types, f"{schema.name}.{schema.overload_name}".rstrip("."))

    def _put(self, name: str, given: Sequence[Any], types: Sequence[Any], overload: str = "") -> Any:
        results = self._node(name, given, types)
        found, _, _ = (results[0] if isinstance(results, list) else results).node().schema().partition("(")
        # x · Tensor with a number for the tensor: x · Scalar makes a tensor of it, and the same bits
        if not found or (overload and found not in (overload, overload.replace(".Tensor", ".Scalar"))):
            raise _Strange(f"{overload or name} is taken for {found}")
        return results

    def _node(self, name: str, given: Sequence[Any], types: Sequence[Any]) -> Any:
        """Its result, or a list of several."""
        results = list(self.graph.insertNode(self.graph.create(name, list(given), len(types))).outputs())
        for result, kind in zip(results, types, strict=True):
            result.setType(kind)
        return results[0] if len(results) == 1 else results

    def _argument(self, node: fx.Node, place: int, wanted: Any) -> Any:
        if place < len(node.args):
            given: Any = node.args[place]
        elif wanted.name in node.kwargs:
            given = node.kwargs[wanted.name]
        elif wanted.has_default_value():
            given = wanted.default_value
        else:
            raise _Strange(f"{node.target} without {wanted.name}")
        kind = wanted.type.getElementType() if wanted.type.kind() == "OptionalType" else wanted.type
        if isinstance(given, fx.Node):
            return self._one(given)
        if given is None:
            return self.graph.insertConstant(None)
        if kind.kind() == "ListType":
            return self._list(given, kind.getElementType(), wanted)
        if isinstance(given, torch.memory_format):
            given = _MEMORY_FORMATS[given]
        return self.graph.insertConstant(float(given) if kind.kind() == "FloatType" else given)

    def _list(self, given: Any, kind: Any, wanted: Any) -> Any:
        items = list(given) if isinstance(given, (list, tuple)) else [given] * (wanted.N or 1)
        if kind.kind() == "SymIntType":
            kind = _C.IntType.get()
        if kind.kind() == "FloatType":
            items = [float(one) for one in items]
        values = [self._one(one) if isinstance(one, fx.Node) else self.graph.insertConstant(one) for one in items]
        return self._node("prim::ListConstruct", values, [_C.ListType(kind)])

    def _whole(self, given: Any) -> Any:
        """A whole number that is given or was asked for: of others such an operation is another."""
        if isinstance(given, fx.Node):
            value = self._one(given)
            if value.type().kind() == "IntType":
                return value
        elif type(given) is int:
            return self.graph.insertConstant(given)
        raise _Strange(f"arithmetic with {given}")

    def _one(self, node: Any) -> Any:
        value = self._values.get(node)
        if value is None or isinstance(value, list):
            raise _Strange(f"{node} is no single value")
        return value
