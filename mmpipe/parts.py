"""Who computes what of a job, and what has come of it: shards are cut into parts, and are whole again before they are
told of."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mmpipe.runtime.ledger import Outcome, joined
from mmpipe.types import Prediction, Sample

_AHEAD = 4  # shards for each worker that may wait for an older one: their rows are in memory


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a shard. A part is run as a shard is: no bucket spans two."""

    shard: int
    start: int
    stop: int


@dataclass
class _Shard:
    """What has come of a shard so far: start → its predictions and outcome."""

    rows: int
    found: dict[int, tuple[list[Prediction], Outcome]] = field(default_factory=dict)
    error: BaseException | None = None

    def is_whole(self) -> bool:
        return sum(len(predictions) for predictions, _ in self.found.values()) == self.rows


class Parts:
    """The parts of a job's shards, for several workers. From any thread; `whole` from one.

    `bucket`: parts are so many rows or a multiple, but for a shard's end. A part is a worker's share of what is left,
    so that large parts come first and all end at about the same time; `least`: no smaller ones than this.
    """

    def __init__(self, shards: Sequence[Sequence[Sample]], workers: int, bucket: int, least: int) -> None:
        self.shards, self.workers, self.bucket, self.least = shards, workers, bucket, least
        self._changed = threading.Condition()
        self._left = sum(map(len, shards))
        self._shard, self._row = 0, 0  # where the next part begins
        self._lost: deque[Part] = deque()  # of workers that are no more
        self._open = {number: _Shard(len(shard)) for number, shard in enumerate(shards)}
        self._told = 0  # shards
        self._closed = False
        self._answered = 0  # rows of other processes that nobody has asked for yet

    def samples(self, part: Part) -> Sequence[Sample]:
        return self.shards[part.shard][part.start : part.stop]

    def take(self) -> Part | None:
        """The next to compute; None: there is none left, or what comes next will not be told of."""
        with self._changed:
            if self._closed:
                return None
            end = min(self._failed(), default=len(self.shards))
            while self._shard < len(self.shards) and self._row == len(self.shards[self._shard]):
                self._shard, self._row = self._shard + 1, 0
            if self._shard >= end:
                return None
            stop = self._row + self._rows(len(self.shards[self._shard]) - self._row)
            part, self._row = Part(self._shard, self._row, stop), stop
            self._left -= part.stop - part.start
            return part

    def take_lost(self) -> Part | None:
        """One that has come back; None: there is none."""
        with self._changed:
            return self._lost.popleft() if self._lost and not self._closed else None

    def any_lost(self) -> bool:
        return bool(self._lost)

    def wait_for_room(self, mine: Sequence[Part]) -> None:
        """Until not too many shards wait for one that another worker has; `mine`: parts that the caller has."""
        with self._changed:
            while self._shard - self._told > _AHEAD * self.workers and not self._closed:
                if any(part.shard == self._told for part in mine) or self._told in self._failed():
                    return
                self._changed.wait()

    def put(self, part: Part, predictions: list[Prediction], outcome: Outcome) -> None:
        with self._changed:
            self._open[part.shard].found[part.start] = predictions, outcome
            self._changed.notify_all()

    def fail(self, parts: Sequence[Part], error: BaseException) -> None:
        """Who had these parts (the oldest first) could not go on: `whole` raises the error in the place of the first
        one's shard, or of the next to be told of; somebody else does the others."""
        with self._changed:
            shard = self._open.get(parts[0].shard if parts else self._told)
            if shard is not None:
                shard.error = error
            self._lost.extend(list(parts)[1:])
            self._changed.notify_all()

    def give_back(self, parts: Sequence[Part]) -> None:
        """Somebody else is to compute these."""
        with self._changed:
            self._lost.extend(parts)
            self._changed.notify_all()

    def answered(self, count: int) -> None:
        """So many rows have been answered in another process."""
        with self._changed:
            self._answered += count

    def newly_answered(self) -> int:
        """Since this was asked before."""
        with self._changed:
            count, self._answered = self._answered, 0
            return count

    def whole(self) -> Iterator[tuple[Sequence[Sample], list[Prediction], Outcome]]:
        """The shards that are whole and have not been told of, in order. Raises what ended one."""
        while True:
            with self._changed:
                shard = self._open.get(self._told)
                if shard is None or not (shard.error or shard.is_whole()):
                    return
                if shard.error:
                    raise shard.error
                del self._open[self._told]
                self._told += 1
                self._changed.notify_all()
            found = [shard.found[start] for start in sorted(shard.found)]
            predictions = [prediction for some, _ in found for prediction in some]
            yield self.shards[self._told - 1], predictions, joined([outcome for _, outcome in found])

    def wait(self, seconds: float) -> bool:
        """Until something has changed, at most so long. False: all has been told of."""
        with self._changed:
            if self._open and not self._lost and seconds:
                self._changed.wait(seconds)
            return bool(self._open)

    def close(self) -> None:
        """Nobody is to begin with another."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _rows(self, rest: int) -> int:
        """Of the next part, where `rest` rows of its shard are left."""
        share = math.ceil(self._left / self.workers)
        rows = max(self.least, math.ceil(share / self.bucket) * self.bucket)
        return rest if rest < rows + self.least else rows

    def _failed(self) -> list[int]:
        return [number for number, shard in self._open.items() if shard.error]
