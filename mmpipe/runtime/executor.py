"""Runs any Plan over a set of rows, stage by stage; knows no model and no file.

    feed ─► encoder segments (rows that have the modality) ─► slots ─► head segment ─► gate ─► answered, or next stage

Schedule `cascade`: a stage runs over all rows before the next begins, survivors in full buckets. Every bucket has the
same number of rows, the last one padded, so that a row's bytes depend on its own inputs alone.

Shapes: N rows of the run, R rows of a bucket, M modality (branch), L label.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mmpipe.errors import MediaError, MmpipeError
from mmpipe.graphs.backends import Lowered
from mmpipe.graphs.plan import HEAD, PRESENCE, Exit, Plan, Segment

T = TypeVar("T")
Inputs = Mapping[str, Tensor]  # input name without its branch → one row


class Feed(Protocol):
    """Where rows come from: opens and prepares one modality of the rows asked for, in their order."""

    def __call__(self, branch: str, rows: Sequence[int]) -> Iterator[Inputs | MediaError]: ...


class Gate(Protocol):
    """Logits [R, L] → probabilities [R, L], confidence [R], and who leaves at this exit [R] bool."""

    def __call__(self, exit_index: int, logits_RL: Tensor, /) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass
class Look:
    """One exit's look at the rows it gated: the trace that stories and reports are told from."""

    exit_index: int
    rows: list[int]
    labels: list[int]
    confidences: list[float]


@dataclass
class Outcome:
    """What became of N rows."""

    present_NM: Tensor  # bool: what could be used; a failed medium is not
    opened_NM: Tensor  # bool: what was opened, whether it could be used or not
    embedded_NM: Tensor  # bool: whose embedding was computed
    exit_N: Tensor  # int64: index of the exit that answered; -1: none did
    confidence_N: Tensor
    probabilities_NL: Tensor | None = (
        None  # float32; None for a pipeline that only embeds, and where no exit was reached
    )
    embeddings: dict[str, Tensor] = field(default_factory=dict)  # branch → [N, dim]
    failures: dict[int, dict[str, MediaError]] = field(default_factory=dict)  # row → modality → why
    looks: list[Look] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # segment → seconds; "waiting": for media


class Executor:
    """A plan, lowered. One run at a time."""

    def __init__(
        self, plan: Plan, lowered: Mapping[str, Lowered], *, bucket_rows: int, threads: int, gate: Gate | None
    ) -> None:
        self.plan, self.lowered, self.bucket_rows, self.threads, self.gate = plan, lowered, bucket_rows, threads, gate
        self.columns = {branch.name: column for column, branch in enumerate(plan.branches)}
        self._values = {value.name: value for value in plan.values}
        self.wanted = {value for _, value in plan.embeddings}
        self._staging: dict[tuple[str, str], Tensor] = {}

    def run(self, present_NM: Tensor, feed: Feed, *, answered: Callable[[int], None] = lambda count: None) -> Outcome:
        """Run rows to their answers. `answered(count)` is told how many rows have just been done with."""
        with torch.inference_mode(), _threads(self.threads):
            return _Run(self, present_NM.clone(), feed, answered).all_stages()

    def stage_in(self, segment: str, name: str, rows: Sequence[Tensor] | Tensor) -> Tensor:
        """Rows as one bucket, padded with the first of them. The bucket's memory is used again by the next call."""
        value = self._values[name]
        key = (segment, name)
        if key not in self._staging:
            self._staging[key] = torch.zeros(self.bucket_rows, *value.shape, dtype=value.dtype)
        bucket = self._staging[key]
        for position, row in enumerate(rows):
            bucket[position] = row
        bucket[len(rows) :] = bucket[0].clone()
        return bucket

    def slots(self, name: str, rows: int) -> Tensor:
        """Per-sample rows of a value that outlives a bucket; zeros where nothing was computed."""
        value = self._values[name]
        return torch.zeros(rows, *value.shape, dtype=value.dtype)


class _Run:
    """The state of one run. Stages only ever move rows out of `live`."""

    def __init__(self, executor: Executor, present_NM: Tensor, feed: Feed, answered: Callable[[int], None]) -> None:
        self.executor, self.plan, self.feed, self.answered = executor, executor.plan, feed, answered
        count = present_NM.shape[0]
        self.outcome = Outcome(
            present_NM=present_NM,
            opened_NM=torch.zeros_like(present_NM),
            embedded_NM=torch.zeros_like(present_NM),
            exit_N=torch.full((count,), -1),
            confidence_N=torch.zeros(count),
        )
        self.live_N = torch.ones(count, dtype=torch.bool)
        self.tables: dict[str, Tensor] = {}
        self.fed: set[str] = set()
        self.embedding_of = dict(executor.plan.embeddings)

    def all_stages(self) -> Outcome:
        for stage in range(self.plan.stages):
            for segment in self.plan.stage(stage):
                if segment.branch == HEAD:
                    self._head(segment, self.plan.exits[stage])
                else:
                    self._encoder(segment)
            self._free(stage)
        for branch, value in self.plan.embeddings:
            if value in self.tables:
                self.outcome.embeddings[branch] = self.tables[value]
        self.answered(int(self.live_N.sum()))
        if not self.plan.exits:  # nothing to be sure of: the last stage answers for every row that has anything
            self.outcome.exit_N[self.outcome.present_NM.any(dim=1)] = 0
        return self.outcome

    def _encoder(self, segment: Segment) -> None:
        column = self.executor.columns[segment.branch]
        rows = (self.live_N & self.outcome.present_NM[:, column]).nonzero().flatten().tolist()
        opened = segment.branch not in self.fed
        self.fed.add(segment.branch)
        source = self._opened(segment.branch, column, rows) if opened else ((row, {}) for row in rows)
        for bucket in _chunks(source, self.executor.bucket_rows):
            kept_K = torch.tensor([row for row, _ in bucket])
            given = {f"{segment.branch}.{short}": [inputs[short] for _, inputs in bucket] for short in bucket[0][1]}
            for name, tensors in given.items():
                if any(name in other.inputs and other is not segment for other in self.plan.segments):
                    self._table(name)[kept_K] = torch.stack(tensors)
            written = self._call(segment, kept_K, given)
            if self.embedding_of[segment.branch] in written:
                self.outcome.embedded_NM[kept_K, column] = True

    def _opened(self, branch: str, column: int, rows: list[int]) -> Iterator[tuple[int, Inputs]]:
        """Rows as they come from the feed; a row whose medium failed loses that modality and is left out."""
        clock = time.perf_counter()
        for row, result in zip(rows, self.feed(branch, rows), strict=True):
            self._spent("waiting", time.perf_counter() - clock)
            self.outcome.opened_NM[row, column] = True
            if isinstance(result, MediaError):
                self.outcome.present_NM[row, column] = False
                self.outcome.failures.setdefault(row, {})[branch] = result
            else:
                yield row, result
            clock = time.perf_counter()

    def _head(self, segment: Segment, exit_: Exit) -> None:
        have_NM = self.outcome.present_NM
        seen = [self.executor.columns[name] for name in exit_.sees]
        new = [self.executor.columns[name] for name in exit_.brings]
        brought_N = have_NM[:, new].any(dim=1)
        any_N = have_NM[:, seen].any(dim=1)
        last = segment.stage == self.plan.stages - 1
        rows_N = self.live_N & (any_N if segment.every_row else brought_N)
        look = Look(segment.stage, [], [], [])
        for kept in _chunks(iter(rows_N.nonzero().flatten().tolist()), self.executor.bucket_rows):
            kept_K = torch.tensor(kept)
            written = self._call(segment, kept_K, {})
            self._gate(exit_, written, kept_K, last | brought_N, look)
        if look.rows:
            self.outcome.looks.append(look)

    def _gate(self, exit_: Exit, written: Mapping[str, Tensor], rows_K: Tensor, gated_N: Tensor, look: Look) -> None:
        """Let the sure rows leave. The gate sees the whole padded bucket: its arithmetic too must be that of a plan."""
        assert self.executor.gate is not None
        outcome, count = self.outcome, len(rows_K)
        probabilities_RL, confidence_R, leaves_R = self.executor.gate(look.exit_index, written[exit_.value])
        if outcome.probabilities_NL is None:
            outcome.probabilities_NL = torch.zeros(len(outcome.exit_N), probabilities_RL.shape[1])
        gated_K = gated_N[rows_K]
        look.rows += rows_K[gated_K].tolist()
        look.labels += probabilities_RL[:count].argmax(dim=1)[gated_K].tolist()
        look.confidences += confidence_R[:count][gated_K].tolist()
        leaving_K = leaves_R[:count] & gated_K
        leaving = rows_K[leaving_K]
        outcome.exit_N[leaving] = look.exit_index
        outcome.probabilities_NL[leaving] = probabilities_RL[:count][leaving_K]
        outcome.confidence_N[leaving] = confidence_R[:count][leaving_K]
        self.live_N[leaving] = False
        self.answered(int(leaving_K.sum()))

    def _call(self, segment: Segment, rows_K: Tensor, given: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """Run one bucket, from what is `given` and else from slots; what others read goes to slots."""
        arguments = []
        for name in (*segment.inputs, *segment.reads):
            if name in given:
                rows: Sequence[Tensor] | Tensor = given[name]
            else:
                rows = (self.outcome.present_NM if name == PRESENCE else self._table(name))[rows_K]
            arguments.append(self.executor.stage_in(segment.name, name, rows))
        clock = time.perf_counter()
        try:
            outputs = self.executor.lowered[segment.name](*arguments)
        except Exception as error:  # a model, or memory, gave way: the run ends, and says where
            reason = (str(error).splitlines() or ["no memory left" if isinstance(error, MemoryError) else ""])[0]
            raise MmpipeError(f"segment {segment.name} failed: {type(error).__name__}: {reason}") from error
        written = dict(zip(segment.writes, outputs, strict=True))
        self._spent(segment.name, time.perf_counter() - clock)
        for name, bucket in written.items():
            if name in self.executor.wanted or self.plan.last_read(name) >= 0:
                self._table(name)[rows_K] = bucket[: len(rows_K)]
        return written

    def _table(self, name: str) -> Tensor:
        if name not in self.tables:
            self.tables[name] = self.executor.slots(name, len(self.live_N))
        return self.tables[name]

    def _free(self, stage: int) -> None:
        for name in list(self.tables):
            if name not in self.executor.wanted and self.plan.last_read(name) <= stage:
                del self.tables[name]

    def _spent(self, name: str, seconds: float) -> None:
        self.outcome.seconds[name] = self.outcome.seconds.get(name, 0.0) + seconds


def _chunks(source: Iterator[T], size: int) -> Iterator[list[T]]:
    chunk: list[T] = []
    for item in source:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with this many threads, whatever the caller has set; part of the numerics."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
