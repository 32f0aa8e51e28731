"""The slow twin of every other backend: the graph as it is, one ATen operation after the other."""

from __future__ import annotations

from torch import fx

from mmpipe.graphs.backends import Lowered
from mmpipe.graphs.plan import Segment


def lower(segment: Segment, module: fx.GraphModule) -> Lowered:
    """torch.fx's own code: each value is freed after its last use."""
    return module.forward
