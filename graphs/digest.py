"""A graph → a hash of what it computes: its operations and its tensors, whatever they are called.

Names depend on what else was fused beside a segment; what it computes does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

_THREADS = 4  # that hash; two already go at most of memory's speed
_LARGE = 1_000_000  # bytes of all tensors, below which starting threads takes longer


def digest(module: fx.GraphModule) -> bytes:
    """Equal for two modules that have the same operations in the same order, on tensors of the same bytes."""
    total = hashlib.sha256()
    number: dict[fx.Node, int] = {}

    def plain(value: Any) -> str:
        """An argument, with nodes by their number."""
        if isinstance(value, fx.Node):
            return f"%{number[value]}"
        if isinstance(value, list | tuple):
            return f"({', '.join(map(plain, value))})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key}: {plain(item)}' for key, item in value.items())}}}"
        if isinstance(value, slice):
            return f"slice{plain((value.start, value.stop, value.step))}"
        return repr(value)

    values = {node.target: attrgetter(node.target)(module) for node in module.graph.nodes if node.op == "get_attr"}
    told = dict(zip(values, of_tensors(list(values.values())), strict=True))
    for node in module.graph.nodes:
        target = ""
        if node.op == "get_attr":
            target = told[node.target]
        elif node.op == "call_module":
            inner = module.get_submodule(node.target)
            target = digest(inner).hex() if isinstance(inner, fx.GraphModule) else f"{inner!r} {_of_state(inner)}"
        elif node.op in ("call_function", "call_method"):
            target = node.target if isinstance(node.target, str) else _of_function(node.target)
        elif node.op == "placeholder":
            target = str(len(number))  # inputs are told apart by their place
        total.update(f"{node.op} {target} {plain(node.args)} {plain(dict(node.kwargs))}\n".encode())
        number[node] = len(number)
    return total.digest()


def of_tensors(tensors: Sequence[Any]) -> list[str]:
    """Of each its shape, type and hash; of what is no tensor what it is called."""
    if sum(value.nbytes for value in tensors if isinstance(value, Tensor)) < _LARGE:
        return list(map(_of_tensor, tensors))
    with ThreadPoolExecutor(_THREADS) as threads:  # hashing lets Python's lock go
        return list(threads.map(_of_tensor, tensors))


def _of_function(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"


def _of_tensor(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(data).hexdigest()}"


def _of_state(module: torch.nn.Module) -> str:
    return " ".join(f"{name} {_of_tensor(value)}" for name, value in module.state_dict().items())
