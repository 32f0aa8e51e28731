"""A shard: rows that run together, where their media come from, and the account of them. No bucket spans two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mmpipe.errors import MediaError
from mmpipe.graphs.plan import Plan
from mmpipe.runtime.ledger import Gate, Ledger, Look, Outcome
from mmpipe.runtime.pool import MediaRows

Answered = Callable[[int], None]
Computed = Callable[[str, Sequence[int], Tensor], None]  # branch, rows, their embeddings [K, dim]: the lane's memory


@dataclass(frozen=True)
class Known:
    """Found in place of a medium: the row's embedding [dim], on the host. Its branch is not run for it."""

    embedding: Tensor


@dataclass(frozen=True)
class Same:
    """Found in place of a medium: another row of this shard has the same, and is being computed."""

    row: int


Found = int | Known | Same | MediaError  # int: the media slot


class Source(Protocol):
    """The media of one branch: rows are asked for, and found in the same order."""

    def put(self, rows: Iterable[int]) -> None:
        """Ask for rows; they are decoded ahead as far as there is room."""

    def ready(self) -> bool:
        """Whether the next is there without waiting."""

    def get(self) -> Found:
        """The next. Waits."""

    def unstarted(self) -> int:
        """Rows that have been asked for and not begun."""

    def drop(self) -> None:
        """Forget what was asked for and not got; its slots are free."""


class Feed(Protocol):
    """Where rows come from: opens and prepares media into slots.

    Known and Same only for branches that the plan restores; Same only in a cascade.
    """

    def open(self, branch: str, media: MediaRows) -> Source:
        """The media of one branch."""

    def computing(self) -> None:
        """A bucket is about to be computed: whoever decodes may leave the cores to it until the next `get`."""

    def close(self) -> None:
        """Cancel what has not begun, wait for what has."""


class Shard:
    """Rows 0 … N - 1 of a run, from their presence to their Outcome."""

    def __init__(
        self,
        plan: Plan,
        present_NM: Tensor,
        feed: Feed,
        gate: Gate | None,
        *,
        names: Sequence[Any] | None = None,
        answered: Answered = lambda count: None,
        computed: Computed = lambda branch, rows, embeddings_KD: None,
    ) -> None:
        """`names`: of the rows, for who watches. `answered(count)` is told how many rows have just been done with,
        `computed` of embeddings as they come, in memory that the next run overwrites."""
        self.plan, self.feed, self.answered, self.computed = plan, feed, answered, computed
        self.ledger = Ledger(plan, present_NM, gate)
        self.count = present_NM.shape[0]
        self.names = range(self.count) if names is None else names
        self.slot_of: dict[int, int] = {}
        self.looks: dict[int, Look] = {}

    def outcome(self) -> Outcome:
        """What became of the rows, when all have been done with."""
        looks = [self.looks[number].in_order() for number in sorted(self.looks)]
        self.ledger.outcome.looks = [look for look in looks if look.rows]
        return self.ledger.close()
