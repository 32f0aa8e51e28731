"""What a segment is lowered to. One module a backend, each with

    lower(segment, module, target, examples) → a callable from inputs and reads to the tuple of writes

imported late, as each but eager needs a package of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from mmpipe.graphs.plan import PRESENCE, GraphError, Plan, Segment

Lowered = Callable[..., tuple[Tensor, ...]]

BACKENDS = ("eager", "native", "inductor", "openvino", "onnx", "tensorrt")
OPERATION_BY_OPERATION = ("eager", "native")  # what they make takes any number of rows, and is made in no time


class Unlowerable(GraphError):
    """A backend that can't take a segment, here or at all: the message says why, and what would help."""


@dataclass(frozen=True)
class Target:
    """What a segment is lowered for.

    rows: of the one bucket that it will be called with. dtype: of its matrix products and of what stands between them;
    what goes in and comes out keeps the plan's types. threads: of the thread that will call it. folder: where compiled
    artefacts are kept between runs; None: nowhere. memory: bytes that its values inside may take on each stream, for
    backends that hold memory of their own; None: as many as they like. device: what it will run on, by name.
    """

    rows: int
    dtype: torch.dtype = torch.float32
    threads: int = 1
    folder: Path | None = None
    memory: int | None = None
    device: str = "CPU"


def lower(
    backend: str, segment: Segment, module: fx.GraphModule, target: Target, examples: Sequence[Tensor] = ()
) -> Lowered:
    """Lower one segment. `examples`: its inputs and reads, [rows, …], for backends that compile by example.

    Raises Unlowerable where the backend can't, GraphError where there is no such backend.
    """
    if backend not in BACKENDS:
        raise GraphError(f"unknown backend {backend!r}; one of {', '.join(BACKENDS)}")
    made = importlib.import_module(f"mmpipe.graphs.backends.{backend}")
    lowered: Lowered = made.lower(segment, module, target, examples)
    return lowered


def examples_of(plan: Plan, segment: Segment, rows: int) -> tuple[Tensor, ...]:
    """Plausible inputs and reads of a segment: noise, ones for whole numbers (ids, masks) and flags."""
    make = torch.Generator().manual_seed(0)
    found = []
    for name in (*segment.inputs, *segment.reads):
        if name == PRESENCE:
            found.append(torch.ones(rows, len(plan.branches), dtype=torch.bool))
            continue
        value = plan.value(name)
        shape = (rows, *value.shape)
        if value.dtype.is_floating_point:
            found.append(torch.randn(shape, generator=make).to(value.dtype))
        elif value.dtype == torch.uint8:
            found.append(torch.randint(0, 256, shape, generator=make, dtype=torch.uint8))
        else:
            found.append(torch.ones(shape, dtype=value.dtype))
    return tuple(found)
