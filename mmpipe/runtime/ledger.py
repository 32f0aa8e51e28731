"""What becomes of the rows of one run: who is live, who may be gated, who left where. Host bookkeeping, no device.

Shapes: N rows of the run, R rows of a bucket, K rows of it that are real, M modality (branch), L label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mmpipe.errors import MediaError
from mmpipe.graphs.plan import Plan, Segment


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

    def in_order(self) -> Look:
        """By row: which bucket was gated first depends on the clock."""
        order = sorted(range(len(self.rows)), key=self.rows.__getitem__)
        return Look(
            self.exit_index,
            [self.rows[place] for place in order],
            [self.labels[place] for place in order],
            [self.confidences[place] for place in order],
        )


@dataclass(frozen=True)
class Span:
    """One step of one run, as it was measured; seconds of time.perf_counter."""

    step: str
    stream: str
    lane: int
    run: int
    rows: int
    start: float
    end: float


@dataclass(frozen=True)
class Decoding:
    """One medium opened, decoded and prepared by one worker; seconds of time.perf_counter."""

    branch: str
    worker: str
    start: float
    end: float


@dataclass
class Outcome:
    """What became of N rows."""

    present_NM: Tensor  # bool: what could be used; a failed medium is not
    opened_NM: Tensor  # bool: what was opened, whether it could be used or not, or was known without decoding it
    embedded_NM: Tensor  # bool: whose embedding was computed, or restored
    exit_N: Tensor  # int64: index of the exit that answered; -1: none did
    confidence_N: Tensor
    probabilities_NL: Tensor | None = (
        None  # float32; None for a pipeline that only embeds, and where no exit was reached
    )
    embeddings: dict[str, Tensor] = field(default_factory=dict)  # branch, or "image.layer4" → [N, dim]
    failures: dict[int, dict[str, MediaError]] = field(default_factory=dict)  # row → modality → why
    looks: list[Look] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # segment → seconds; "waiting": for media
    files_opened: dict[str, int] = field(default_factory=dict)  # branch → how many, what speculation opened included
    recalled: dict[str, int] = field(default_factory=dict)  # branch → rows whose embedding was not computed, but known
    missed: dict[str, int] = field(default_factory=dict)  # branch → rows that were looked up in vain
    notes: list[str] = field(default_factory=list)  # what a user should know of this run
    spans: list[Span] = field(default_factory=list)  # every step of every run, in the order of its end
    decodings: list[Decoding] = field(default_factory=list)


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """Of rows that were run in several parts: as if they had been run at once, the times of all added up."""
    if len(outcomes) == 1:
        return outcomes[0]
    counts = [len(one.exit_N) for one in outcomes]
    found = Outcome(
        present_NM=torch.cat([one.present_NM for one in outcomes]),
        opened_NM=torch.cat([one.opened_NM for one in outcomes]),
        embedded_NM=torch.cat([one.embedded_NM for one in outcomes]),
        exit_N=torch.cat([one.exit_N for one in outcomes]),
        confidence_N=torch.cat([one.confidence_N for one in outcomes]),
        probabilities_NL=_stacked([one.probabilities_NL for one in outcomes], counts),
    )
    for name in dict.fromkeys(name for one in outcomes for name in one.embeddings):
        table = _stacked([one.embeddings.get(name) for one in outcomes], counts)
        assert table is not None
        found.embeddings[name] = table
    looks: dict[int, Look] = {}
    first = 0
    for one, count in zip(outcomes, counts, strict=True):
        found.failures |= {first + row: why for row, why in one.failures.items()}
        for look in one.looks:
            whole = looks.setdefault(look.exit_index, Look(look.exit_index, [], [], []))
            whole.rows += [first + row for row in look.rows]
            whole.labels += look.labels
            whole.confidences += look.confidences
        for name in ("seconds", "files_opened", "recalled", "missed"):
            mine, its = getattr(found, name), getattr(one, name)
            mine |= {key: mine.get(key, 0) + value for key, value in its.items()}
        found.notes += one.notes
        found.spans += one.spans
        found.decodings += one.decodings
        first += count
    found.looks = [looks[number] for number in sorted(looks)]
    found.spans.sort(key=lambda span: span.end)
    return found


def _stacked(tables: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor | None:
    """Below each other; zeros for rows of which nothing was computed. None: nothing was for any."""
    known = next((table for table in tables if table is not None), None)
    if known is None:
        return None
    filled = [
        table if table is not None else known.new_zeros((count, *known.shape[1:]))
        for table, count in zip(tables, counts, strict=True)
    ]
    return torch.cat(filled)


class Ledger:
    """The account of one run's rows. Rows only ever leave `live`."""

    def __init__(self, plan: Plan, present_NM: Tensor, gate: Gate | None) -> None:
        count = present_NM.shape[0]
        self.plan, self.gate_of = plan, gate
        self.columns = {branch.name: column for column, branch in enumerate(plan.branches)}
        self.live_N = torch.ones(count, dtype=torch.bool)
        self.outcome = Outcome(
            present_NM=present_NM.clone(),
            opened_NM=torch.zeros_like(present_NM),
            embedded_NM=torch.zeros_like(present_NM),
            exit_N=torch.full((count,), -1),
            confidence_N=torch.zeros(count),
        )
        # the same bytes: of one row, what numpy does in no time takes a tensor microseconds
        self._opened_NM, self._present_NM = self.outcome.opened_NM.numpy(), self.outcome.present_NM.numpy()
        self._live_N = self.live_N.numpy()

    def is_live(self, row: int) -> bool:
        return bool(self._live_N[row])

    def having(self, branch: str, rows: Sequence[int]) -> list[int]:
        """Those of `rows` that are live and have the branch's modality."""
        column = self.columns[branch]
        chosen = torch.tensor(rows, dtype=torch.long)
        return chosen[self.live_N[chosen] & self.outcome.present_NM[chosen, column]].tolist()

    def opened(self, branch: str, row: int, failure: MediaError | None) -> None:
        column = self.columns[branch]
        self._opened_NM[row, column] = True
        self.outcome.files_opened[branch] = self.outcome.files_opened.get(branch, 0) + 1
        if failure is not None:
            self._present_NM[row, column] = False
            self.outcome.failures.setdefault(row, {})[branch] = failure

    def recalled(self, branch: str, row: int) -> None:
        """A row's embedding is known: its file was read, though not decoded."""
        self.opened(branch, row, None)
        self.outcome.recalled[branch] = self.outcome.recalled.get(branch, 0) + 1

    def wants_head(self, segment: Segment, row: int) -> bool:
        """Whether a row is for the head's segment: the exit brings it something new, or a later stage reads it."""
        exit_ = self.plan.exits[segment.stage]
        return self.is_live(row) and self._has(row, exit_.sees if segment.every_row else exit_.brings)

    def gated(self, exit_index: int, row: int) -> bool:
        exit_ = self.plan.exits[exit_index]
        last = exit_index == len(self.plan.exits) - 1
        return self.is_live(row) and (last or self._has(row, exit_.brings))

    def _has(self, row: int, branches: Sequence[str]) -> bool:
        return any(self._present_NM[row, self.columns[name]] for name in branches)

    def gate(self, exit_index: int, logits_RL: Tensor, rows: Sequence[int], look: Look) -> int:
        """Let the sure ones of `rows` leave; returns how many did. The gate sees the whole padded bucket: its
        arithmetic too must be that of a plan."""
        assert self.gate_of is not None
        outcome, count = self.outcome, len(rows)
        probabilities_RL, confidence_R, leaves_R = self.gate_of(exit_index, logits_RL)
        if outcome.probabilities_NL is None:
            outcome.probabilities_NL = torch.zeros(len(outcome.exit_N), probabilities_RL.shape[1])
        rows_K = torch.tensor(rows, dtype=torch.long)
        gated_K = torch.tensor([self.gated(exit_index, row) for row in rows], dtype=torch.bool)
        look.rows += rows_K[gated_K].tolist()
        look.labels += probabilities_RL[:count].argmax(dim=1)[gated_K].tolist()
        look.confidences += confidence_R[:count][gated_K].tolist()
        leaving_K = leaves_R[:count] & gated_K
        leaving = rows_K[leaving_K]
        outcome.exit_N[leaving] = exit_index
        outcome.probabilities_NL[leaving] = probabilities_RL[:count][leaving_K]
        outcome.confidence_N[leaving] = confidence_R[:count][leaving_K]
        self.live_N[leaving] = False
        return int(leaving_K.sum())

    def embedded(self, branch: str, rows: Sequence[int], bucket_RD: Tensor) -> None:
        """Keep a copy of the embeddings of `rows`, the first of the bucket."""
        outcome = self.outcome
        if branch not in outcome.embeddings:
            shape = (len(outcome.exit_N), *bucket_RD.shape[1:])
            outcome.embeddings[branch] = torch.zeros(shape, dtype=bucket_RD.dtype)
        rows_K = torch.tensor(rows, dtype=torch.long)
        outcome.embeddings[branch][rows_K] = bucket_RD[: len(rows)]
        if branch in self.columns:  # else a layer's pooled state
            outcome.embedded_NM[rows_K, self.columns[branch]] = True

    def spent(self, name: str, seconds: float) -> None:
        self.outcome.seconds[name] = self.outcome.seconds.get(name, 0.0) + seconds

    def forget_speculation(self) -> None:
        """After a parallel run: what an answered row did not need is as if it had never been looked at.

        Which of it was computed before the run was cancelled depends on the clock; a row must not.
        """
        outcome = self.outcome
        for row, exit_index in enumerate(outcome.exit_N.tolist()):
            if exit_index < 0:
                continue
            for branch, column in self.columns.items():
                if branch not in self.plan.exits[exit_index].sees:
                    outcome.opened_NM[row, column] = outcome.embedded_NM[row, column] = False
                    failures = outcome.failures.get(row, {})
                    if failures.pop(branch, None) is not None:
                        outcome.present_NM[row, column] = True
                    if not failures:
                        outcome.failures.pop(row, None)

    def close(self) -> Outcome:
        if not self.plan.exits:  # nothing to be sure of: the last stage answers for every row that has anything
            self.outcome.exit_N[self.outcome.present_NM.any(dim=1)] = 0
        return self.outcome
