"""The nouns of `graphs`, as frozen data. Read this first.

capture makes one graph of each module, fuse joins them, cut fills in what is below:

    Branch   who fills it: fuse        one encoder's nodes, or the head's
    Exit     fuse                      an output that may answer: logits over the labels
    Value    cut                       what one segment writes and another (or the caller) reads
    Segment  cut                       nodes of one stage and one branch: what is lowered, placed, timed and drawn
    Plan     cut                       all of them, in an order that runs

Shapes are per row: dimension 0, the batch, is left out. A stage's number is the index of the first exit that needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

HEAD = "head"  # the branch of the head and of every probe; encoders' branches are named by their modality
PRESENCE = "presence"  # the input [batch, branch] bool that says which modalities a row has


class GraphError(ValueError):
    """A module can't be captured, or modules can't be fused. The message names it and the way out."""


@dataclass(frozen=True)
class Mark:
    """What `node.meta["mmpipe"]` holds for every node of a fused graph."""

    branch: str
    layer: int | None = None  # from 1; None: in no layer
    copy: str | None = None  # for the head: the exit that this copy of it serves
    shape: tuple[int | str, ...] | None = None  # with the batch: "B", "49*B", or a number; None: not a tensor
    dtype: torch.dtype | None = None
    batch_multiple: int | None = None  # for a symbolic size: k where its value is k × batch

    @property
    def batch_leads(self) -> bool:
        """Whether the value is a tensor whose dimension 0 is the batch alone, and no other is: rows can be gathered."""
        return self.shape is not None and self.shape[:1] == ("B",) and all(isinstance(d, int) for d in self.shape[1:])


@dataclass(frozen=True)
class Branch:
    """One encoder's part of the fused graph: its inputs in order, and the name of its embedding's output."""

    name: str
    inputs: tuple[str, ...]
    dim: int


@dataclass(frozen=True)
class Exit:
    """An output that may answer. The last one is the full pipeline's, and always answers."""

    name: str
    value: str  # the Value that holds its logits
    sees: tuple[str, ...]  # branches it depends on
    brings: tuple[str, ...]  # branches of which it sees more than the exit before: no such, no gate for that row


@dataclass(frozen=True)
class Value:
    """A tensor that crosses a segment's boundary, or that the caller gives or gets. Row r belongs to sample r."""

    name: str
    shape: tuple[int, ...]  # per row
    dtype: torch.dtype


@dataclass(frozen=True)
class Segment:
    """The nodes of one stage and one branch.

    Rows of an encoder's segment: live samples that have its modality. Rows of a head's: live samples to which the
    stage's exit brings something new, or every live sample (`every_row`) where it is the last stage, or where a later
    one goes on from what it wrote. `inputs` come from outside, `reads` from earlier segments; both are its parameters,
    in this order. `writes` is what it returns.
    """

    name: str  # "image@0"
    stage: int
    branch: str
    inputs: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    nodes: int
    every_row: bool = False


@dataclass(frozen=True)
class Plan:
    """What runs, in an order that runs: stage by stage, encoders before the head."""

    branches: tuple[Branch, ...]
    exits: tuple[Exit, ...]  # empty for a pipeline that only embeds
    segments: tuple[Segment, ...]
    values: tuple[Value, ...]
    embeddings: tuple[tuple[str, str], ...]  # branch → the value that is its embedding

    @property
    def stages(self) -> int:
        return max(1, len(self.exits))

    def stage(self, number: int) -> Sequence[Segment]:
        return [segment for segment in self.segments if segment.stage == number]

    def value(self, name: str) -> Value:
        return next(value for value in self.values if value.name == name)

    def last_read(self, name: str) -> int:
        """The last stage that reads a value; -1 when no segment does."""
        return max((s.stage for s in self.segments if name in s.reads or name in s.inputs), default=-1)
