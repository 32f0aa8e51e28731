"""What a segment is lowered to. One module a backend, each with `lower(segment, module) -> callable`, imported late."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor, fx

from mmpipe.graphs.plan import GraphError, Segment

Lowered = Callable[..., tuple[Tensor, ...]]

_BACKENDS = {"eager": "mmpipe.graphs.backends.eager"}


def lower(backend: str, segment: Segment, module: fx.GraphModule) -> Lowered:
    """Lower one segment: a callable from its inputs and reads to the tuple of its writes."""
    if backend not in _BACKENDS:
        raise GraphError(f"unknown backend {backend!r}; one of {', '.join(_BACKENDS)}")
    lowered: Lowered = importlib.import_module(_BACKENDS[backend]).lower(segment, module)
    return lowered
