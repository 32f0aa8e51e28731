"""A torch.fx graph ↔ plain data, which JSON can hold: operations, their arguments, names and marks; no tensors.

torch.fx itself would write Python on one side and trace it anew on the other, and lose the marks on the way.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from mmpipe.graphs.plan import Mark

_NAMED = (torch.dtype, torch.layout, torch.memory_format)  # PyTorch's constants: written "torch.float32"


class Unwritable(TypeError):
    """A graph has a part that plain data can't stand for: a function without a name, an object of a user's own."""


def written(graph: fx.Graph) -> list[list[Any]]:
    """One entry per node, in order. Raises Unwritable."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    entries = []
    for node in graph.nodes:
        mark = node.meta.get("mmpipe")
        entries.append(
            [
                *(node.op, node.name, _written_target(node.target)),
                *(_written(node.args, places), _written(dict(node.kwargs), places)),
                None if mark is None else _written(asdict(mark), places),
            ]
        )
    return entries


def read(entries: Sequence[Sequence[Any]]) -> fx.Graph:
    """What `written` made, through JSON or not."""
    graph, made = fx.Graph(), list[fx.Node]()
    for op, name, target, args, kwargs, mark in entries:
        node = graph.create_node(op, _read_target(target), _read(args, made), _read(kwargs, made), name)
        if mark is not None:
            node.meta["mmpipe"] = Mark(**_read(mark, made))
        made.append(node)
    return graph


def _written(value: Any, places: Mapping[fx.Node, int]) -> Any:
    """Numbers, texts and lists as they are; all else as {kind: …}."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": places[value]}
    if isinstance(value, tuple):
        return {"tuple": [_written(item, places) for item in value]}
    if isinstance(value, list):
        return [_written(item, places) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _written(item, places) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_written(part, places) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, _NAMED):
        return {"torch": str(value).removeprefix("torch.")}
    raise Unwritable(f"an argument is a {type(value).__name__}: {value!r}")


def _read(value: Any, made: Sequence[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(item, made) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return made[content]
    if kind == "tuple":
        return tuple(_read(item, made) for item in content)
    if kind == "dict":
        return {key: _read(item, made) for key, item in content.items()}
    if kind == "slice":
        return slice(*(_read(part, made) for part in content))
    return torch.device(content) if kind == "device" else getattr(torch, content)


def _written_target(target: Any) -> Any:
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return {"operation": [*target._schema.name.split("::", 1), target._overloadname]}
    named = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    # torch.relu and its like say neither where they are
    for module, name in (named, ("torch", getattr(target, "__name__", None))):
        try:
            if module and name and _function(module, name) is target:
                return {"function": [module, name]}
        except (ImportError, AttributeError):
            continue
    raise Unwritable(f"{target!r} can't be imported")


def _read_target(target: Any) -> Any:
    if isinstance(target, str):
        return target
    ((kind, content),) = target.items()
    if kind == "function":
        return _function(*content)
    library, operation, overload = content
    return getattr(getattr(getattr(torch.ops, library), operation), overload)


def _function(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
