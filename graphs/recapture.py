"""A captured graph without its module's weights, as JSON: what spares the next load of the same module its capture.

What it computes depends on the module's architecture and code, not on its weights; who keeps it has to know both.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmpipe.graphs import plain
from mmpipe.graphs.capture import Captured
from mmpipe.graphs.fuse import get_tensor
from mmpipe.graphs.late import LateModule

_MOST_BYTES = 32 << 20  # of tensors that capture made


def forget_weights(captured: Captured, module: nn.Module) -> bytes:
    """`captured` of `module`: tensors of its own by their names, those that capture made as they are.

    Raises plain.Unwritable.
    """
    own = aliases(module)
    first = {place(tensor): own[name] for name, tensor in _tensors(module).items()}
    tensors: dict[str, Any] = {}
    made_bytes = 0
    for node in captured.graph.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in tensors:
            tensor = get_tensor(captured.graph, node.target)
            known = first.get(place(tensor))
            made_bytes += 0 if known else tensor.numel() * tensor.element_size()
            if made_bytes > _MOST_BYTES:
                raise plain.Unwritable("most of its tensors are not the module's")
            tensors[str(node.target)] = known or _written(tensor)
    about = {
        "name": captured.name,
        "inputs": list(captured.inputs),
        "outputs": captured.outputs,
        "layers": captured.layers,
        "nodes": plain.written(captured.graph.graph),
        "tensors": tensors,
    }
    return json.dumps(about).encode()


def with_weights(content: bytes, module: nn.Module) -> Captured:
    """What `forget_weights` made, on the weights of a `module` of the same architecture, `aliases` included."""
    about = json.loads(content)
    own = _tensors(module)
    tensors = {
        target: own[found] if isinstance(found, str) else _read(found) for target, found in about["tensors"].items()
    }
    graph = LateModule(tensors, plain.read(about["nodes"]))
    return Captured(about["name"], graph, tuple(about["inputs"]), about["outputs"], about["layers"])


def _tensors(module: nn.Module) -> Mapping[str, Tensor]:
    """Parameters and buffers, those too that no checkpoint holds."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def aliases(module: nn.Module) -> Mapping[str, str]:
    """Name of each tensor → the first name of the same memory. Tensors that share it in one module and not in another
    make two architectures: a graph of the first names one of them only."""
    first: dict[tuple[Any, ...], str] = {}
    return {name: first.setdefault(place(tensor), name) for name, tensor in _tensors(module).items()}


def place(tensor: Tensor) -> tuple[Any, ...]:
    """What tells two views of memory apart."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _written(tensor: Tensor) -> dict[str, Any]:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "data": base64.b64encode(data).decode()}


def _read(about: Mapping[str, Any]) -> Tensor:
    data = torch.from_numpy(np.frombuffer(base64.b64decode(about["data"]), dtype=np.uint8).copy())
    dtype: torch.dtype = getattr(torch, about["dtype"].removeprefix("torch."))
    return data.view(dtype).reshape(about["shape"])
