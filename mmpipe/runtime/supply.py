"""The rows of one encoder's segment in one stage of the cascade: asked for, found, and handed on a bucket at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mmpipe.errors import MediaError
from mmpipe.graphs.plan import Segment
from mmpipe.runtime.lanes import Restored, Rows
from mmpipe.runtime.shard import Found, Known, Same, Shard

if TYPE_CHECKING:
    from mmpipe.runtime.cascade import Cascade


class Supply:
    """Rows to compute wait until they fill a bucket, or no more come; those whose embedding is known wait for company
    too, and those that are like another row until that one has been computed.

    `before`: whether the shard before has begun with all its media of this segment. It asks first: media are read in
    the order in which they are asked for, so that a full pool never waits for itself.
    """

    def __init__(self, run: Cascade, shard: Shard, segment: Segment, before: Callable[[], bool] | None) -> None:
        self.run, self.shard, self.segment = run, shard, segment
        self._before = before
        media = run.executor.media.get(segment.branch) if segment.name in run.feeders else None
        self._source = None if media is None else self.shard.feed.open(segment.branch, media)
        self._to_ask: list[int] = []
        self._asked: deque[int] = deque()
        self._left: set[int] = set()  # has not been handed on
        self._fed, self._restored = Rows(), Restored()
        self._same: list[tuple[int, int]] = []  # (row, the row that it is like)

    def put(self, rows: Sequence[int]) -> None:
        """More rows have come into the stage."""
        self._left.update(rows)
        if self._source is None:
            for row in rows:
                self._place(row, None)
        else:
            self._to_ask.extend(rows)
            self._ask()

    def has_passed(self, row: int) -> bool:
        """Whether a row has been handed on, has failed, or was never one of these."""
        return row not in self._left

    def all_begun(self) -> bool:
        """Whether every row that has come is being decoded, or has been."""
        return not self._to_ask and (self._source is None or self._source.unstarted() == 0)

    def collect(self) -> None:
        """Place what is there without waiting."""
        self._settle()
        self._ask()
        while self._wants() and self._source is not None and self._source.ready():
            self._receive(self._source.get())

    def wait(self) -> bool:
        """Wait for one. False: none has been asked for, or a bucket is full."""
        if not self._wants() or self._source is None:
            return False
        clock = time.perf_counter()
        found = self._source.get()
        self.shard.ledger.spent("waiting", time.perf_counter() - clock)
        self._receive(found)
        return True

    def has_bucket(self, last: bool) -> bool:
        """Whether there is a full bucket, or, where no more rows come (`last`), any."""
        most = max(len(self._fed.rows), len(self._restored.rows))
        return most >= self.run.bucket or (last and most > 0 and not self._asked and not self._to_ask)

    def idle(self) -> bool:
        """Whether it has no row to wait for."""
        return not (self._fed.rows or self._restored.rows or self._asked or self._to_ask)

    def take(self, last: bool) -> Rows:
        """A bucket of rows to compute, if there is one; and all that are known, up to a bucket of them."""
        count, taken = self.run.bucket, Rows()
        if len(self._fed.rows) >= count or (last and not self._asked and not self._to_ask):
            fed = self._fed
            taken = Rows(fed.rows[:count], fed.slots[:count], fed.media[:count])
            self._fed = Rows(fed.rows[count:], fed.slots[count:], fed.media[count:])
        taken.restored, self._restored = self._restored, Restored()
        self._left.difference_update(taken.rows, taken.restored.rows)
        return taken

    def _wants(self) -> bool:
        full = max(len(self._fed.rows), len(self._restored.rows)) >= self.run.bucket
        return bool(self._asked) and not full

    def _ask(self) -> None:
        if self._before is not None and self._before():
            self._before = None
        if self._before is None and self._source is not None and self._to_ask:
            self._asked.extend(self._to_ask)
            self._source.put(self._to_ask)
            self._to_ask = []

    def _receive(self, found: Found) -> None:
        row, branch, ledger = self._asked.popleft(), self.segment.branch, self.shard.ledger
        if isinstance(found, Known | Same):
            ledger.recalled(branch, row)
        else:
            ledger.opened(branch, row, found if isinstance(found, MediaError) else None)
        self._place(row, found)

    def _place(self, row: int, found: Found | None) -> None:
        if isinstance(found, MediaError):
            self._left.discard(row)
        elif isinstance(found, Known):
            self._restored.add(row, self.shard.slot_of[row], found.embedding)
        elif isinstance(found, Same):
            self._same.append((row, found.row))
        else:
            self._fed.rows.append(row)
            self._fed.slots.append(self.shard.slot_of[row])
            if found is not None:
                self._fed.media.append(found)

    def _settle(self) -> None:
        """Rows that are like one which has been computed since have its embedding."""
        if not self._same:
            return
        waiting, self._same = self._same, []
        branch, outcome = self.segment.branch, self.shard.ledger.outcome
        for row, like in waiting:
            there = bool(outcome.embedded_NM[like, self.shard.ledger.columns[branch]])
            if there and len(self._restored.rows) < self.run.bucket:
                self._restored.add(row, self.shard.slot_of[row], outcome.embeddings[branch][like])
            else:
                self._same.append((row, like))
