"""The nouns of `graphs`, as frozen data. Read this first.

capture makes one graph of each module, fuse joins them, cut and schedule fill in what is below:

    Branch     who fills it: fuse      one encoder's nodes, or the head's
    Exit       fuse                    an output that may answer: logits over the labels
    Value      cut                     what one segment writes and another (or the caller) reads
    Segment    cut                     nodes of one stage and one branch: what is lowered, placed, timed and drawn
    Step       schedule                a segment, or the copies before and after it: what is put on a stream
    Buffer     schedule, memory        bytes that a step reads or writes: where they are, how many rows
    StagePlan  schedule                the steps and buffers of one run of one stage, at one number of rows
    Plan       cut, then schedule      all of them, in an order that runs

Shapes are per row: dimension 0, the batch, is left out. A stage's number is the index of the first exit that needs it.
`to_json` and `from_json` write a Plan down and read it back unchanged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

HEAD = "head"  # the branch of the head and of every probe; encoders' branches are named by their modality
PRESENCE = "presence"  # the input [batch, branch] bool that says which modalities a row has


class GraphError(ValueError):
    """A module can't be captured, or modules can't be fused. The message names it and the way out."""


class PlanError(RuntimeError):
    """A plan that must not run: the proof that failed names the steps and the buffer. A bug, or an edited plan."""


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


# Where a buffer's rows are.
#   scratch  one lane's, at an offset planned from lifetimes within one run
#   slots    one row for each sample that is live: carried values, embeddings, inputs that are needed again
#   media    one row for each decoded medium: the host fills them, a run reads them, then they are free again
#   host     one lane's: what the host writes before a run (row numbers, presence) or reads after it (answers)
Home = Literal["scratch", "slots", "media", "host"]


@dataclass(frozen=True)
class Buffer:
    """Memory for one value: `rows` rows of `shape`."""

    name: str  # "image@0/in/image.pixels", "slots/mean", "media/image.pixels"
    shape: tuple[int, ...]  # per row
    dtype: torch.dtype
    rows: int
    home: Home
    offset: int = 0  # bytes from the start of the lane's scratch; 0 elsewhere

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Step:
    """One piece of work on one stream. Its event, if it `records` one, has its name.

    A step begins when those before it on its stream have ended, and those that it `waits` for. Staging is a step like
    any other: "in" gathers a segment's rows into scratch, "run" computes, "out" scatters what it wrote; "restore"
    scatters embeddings that the host knows already, of rows that the segment is spared.
    """

    name: str  # "in:image@0", "image@0", "out:image@0", "restore:image@0"
    does: Literal["in", "run", "out", "restore"]
    segment: str
    stage: int
    branch: str
    stream: str
    reads: tuple[str, ...]  # buffers
    writes: tuple[str, ...]
    waits: tuple[str, ...] = ()
    records: bool = False  # a stream or the host waits for its event


@dataclass(frozen=True)
class StagePlan:
    """What one run does: the segments of one stage, or of several where the schedule is parallel.

    `steps` are in the order of submission. When the events of `ends` are there, every step has ended, and the lane's
    scratch may be used by another run. `rows` is the bucket: each segment's rows are padded to it. `follows`: steps
    that wait for the same step of the run before, because that may be on other streams.
    """

    stages: tuple[int, ...]
    rows: int
    streams: tuple[str, ...]
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    scratch_bytes: int
    ends: tuple[str, ...]
    follows: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "stage " + "+".join(map(str, self.stages)) + f", {self.rows} rows"

    def buffer(self, name: str) -> Buffer:
        return next(buffer for buffer in self.buffers if buffer.name == name)

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)


@dataclass(frozen=True)
class Plan:
    """What runs, in an order that runs: stage by stage, encoders before the head; and, once scheduled, where and when.

    Until `schedule.place` has filled them in, `stage_plans` is empty.
    """

    branches: tuple[Branch, ...]
    exits: tuple[Exit, ...]  # empty for a pipeline that only embeds
    segments: tuple[Segment, ...]
    values: tuple[Value, ...]
    embeddings: tuple[tuple[str, str], ...]  # branch → the value that is its embedding; "image.layer4" → a pooled state
    stage_plans: tuple[StagePlan, ...] = ()
    lanes: int = 1  # runs in flight at once, each with scratch of its own
    slots: int = 0  # rows of the slots: samples that are live at once
    own_streams: bool = False  # each lane has streams of its own; else all lanes share theirs
    restores: tuple[str, ...] = ()  # branches whose embeddings the host may give instead of having them computed

    @property
    def stages(self) -> int:
        return max(1, len(self.exits))

    def stage(self, number: int) -> Sequence[Segment]:
        return [segment for segment in self.segments if segment.stage == number]

    def value(self, name: str) -> Value:
        return next(value for value in self.values if value.name == name)

    def segment(self, name: str) -> Segment:
        return next(segment for segment in self.segments if segment.name == name)

    def feeder(self, branch: str) -> Segment:
        """The segment whose "in" step takes a branch's inputs from the media slots: the branch's first."""
        return next(segment for segment in self.segments if segment.branch == branch)

    def embedding(self, branch: str) -> str:
        """The value that is a branch's embedding."""
        return dict(self.embeddings)[branch]

    def restorable(self, branch: str) -> bool:
        """Whether all that the rest of the graph has from a branch is its embedding, computed from its inputs alone.

        Not so where an exit, or another branch, looks inside it: then its embedding would not stand for it.
        """
        segments = [segment for segment in self.segments if segment.branch == branch]
        return (
            len(segments) == 1
            and not segments[0].reads
            and segments[0].writes == (self.embedding(branch),)
            and all(name.startswith(f"{branch}.") for name in segments[0].inputs)
            and not self.kept_inputs(branch)
        )

    def kept_inputs(self, branch: str) -> tuple[str, ...]:
        """Inputs of a branch that a segment other than its feeder reads: they outlive the media slots."""
        feeder = self.feeder(branch).name
        names = next(b.inputs for b in self.branches if b.name == branch)
        return tuple(n for n in names if any(n in s.inputs and s.name != feeder for s in self.segments))

    def later_reads(self, name: str) -> bool:
        """Whether a segment reads this value: then it goes to slots."""
        return any(name in segment.reads for segment in self.segments)


def to_json(plan: Plan) -> str:
    """A plan as JSON. `from_json` gives it back, equal."""
    return json.dumps(asdict(plan), default=_dtype_name, indent=1)


def from_json(text: str) -> Plan:
    """What `to_json` wrote → the same plan. ValueError, KeyError or TypeError where it is something else."""
    data = json.loads(text)
    return Plan(
        branches=tuple(Branch(b["name"], tuple(b["inputs"]), b["dim"]) for b in data["branches"]),
        exits=tuple(Exit(e["name"], e["value"], tuple(e["sees"]), tuple(e["brings"])) for e in data["exits"]),
        segments=tuple(Segment(**_tuples(s)) for s in data["segments"]),
        values=tuple(Value(v["name"], tuple(v["shape"]), _dtype(v["dtype"])) for v in data["values"]),
        embeddings=tuple((branch, value) for branch, value in data["embeddings"]),
        stage_plans=tuple(
            StagePlan(
                stages=tuple(s["stages"]),
                rows=s["rows"],
                streams=tuple(s["streams"]),
                steps=tuple(Step(**_tuples(step)) for step in s["steps"]),
                buffers=tuple(Buffer(**_tuples(b) | {"dtype": _dtype(b["dtype"])}) for b in s["buffers"]),
                scratch_bytes=s["scratch_bytes"],
                ends=tuple(s["ends"]),
                follows=tuple(s["follows"]),
            )
            for s in data["stage_plans"]
        ),
        lanes=data["lanes"],
        slots=data["slots"],
        own_streams=data["own_streams"],
        restores=tuple(data["restores"]),
    )


def _dtype_name(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise TypeError(f"{type(value).__name__} has no place in a plan")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
