"""A path of threshold vectors, from nobody leaves to almost everybody does: what is tested, point by point.

The path is found on one part of the data (the learn split) by measured saving; it promises nothing by itself.

Shapes: E exit, F = E + 1 with the full pipeline last, N sample, K point of the path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]

NEVER = np.inf  # the threshold that nobody reaches
_QUARTERS = 4  # points in a move that costs no error: its first part is the surest
_MOVES = 1_000


@dataclass(frozen=True)
class Exits:
    """One sequence of early exits, and what each would make of N samples.

    A sample is answered by the first exit that gates it and whose threshold its confidence reaches, else in full.
    """

    names: tuple[str, ...]  # E
    confidence_EN: Floats
    differs_EN: Bools  # the exit's label is not the full pipeline's
    gated_EN: Bools  # the exit brought this sample something new, and its confidence is a number
    cost_FN: Floats  # seconds of a sample that leaves there, all that came before included
    whole_N: Floats | None = None  # seconds of a sample in a pipeline without exits; None: as one that leaves at none

    def rows(self, chosen_N: Rows) -> Exits:
        return Exits(
            self.names,
            self.confidence_EN[:, chosen_N],
            self.differs_EN[:, chosen_N],
            self.gated_EN[:, chosen_N],
            self.cost_FN[:, chosen_N],
            None if self.whole_N is None else self.whole_N[chosen_N],
        )

    @property
    def count(self) -> int:
        return int(self.cost_FN.shape[1])

    def leaving(self, thresholds_KE: Floats) -> NDArray[np.int16]:
        """[K, N]: the exit that answers each sample at each point; E: the full pipeline."""
        exits = len(self.names)
        at_KN = np.full((len(thresholds_KE), self.count), exits, dtype=np.int16)
        for e in range(exits):
            leaves_KN = self.gated_EN[e] & (self.confidence_EN[e] >= thresholds_KE[:, e, None])
            np.minimum(at_KN, np.where(leaves_KN, np.int16(e), np.int16(exits)), out=at_KN)
        return at_KN

    def outcome(self, thresholds_KE: Floats) -> tuple[Rows, Floats]:
        """At each point [K]: the samples whose early answer is not the full pipeline's, out of all N; and the share of
        the full pipeline's seconds that leaving early saves, less than nothing where the looks cost more."""
        at_KN = self.leaving(thresholds_KE)
        errors_K: Rows = np.take_along_axis(self.differs_FN(), at_KN, axis=0).sum(axis=1)
        spent_K: Floats = np.take_along_axis(self.cost_FN, at_KN, axis=0).sum(axis=1)
        whole = float(self.without().sum())
        return errors_K, 1.0 - spent_K / whole if whole else np.zeros(len(thresholds_KE))

    def without(self) -> Floats:
        """[N]: seconds of each sample without exits."""
        return self.cost_FN[-1] if self.whole_N is None else self.whole_N

    def differs_FN(self) -> Bools:
        return np.concatenate([self.differs_EN, np.zeros((1, self.count), dtype=bool)])


def threshold_path(exits: Exits, most_errors: int, points: int = 64) -> Floats:
    """[K, E]: thresholds that only ever fall, from the surest on; at most `points`, with at most `most_errors` here.

    Each move lowers one exit's threshold: first the move that saves most without a further error, else the one that
    saves most for each error. A move is cut into points at every error, so that a test may stop in the midst of it.
    """
    moving = _Moving(exits)
    path: list[Floats] = []
    for _ in range(_MOVES):
        move = moving.best(most_errors)
        if move is None:
            break
        path += moving.take(move)
    if not path:
        return np.empty((0, len(exits.names)))
    if len(path) > points:
        path = [path[i] for i in np.unique(np.linspace(0, len(path) - 1, points).round().astype(int))]
    return np.stack(path)


@dataclass(frozen=True)
class _Move:
    exit_index: int
    rows: Rows  # that may still leave there, the surest first
    cuts: Rows  # places in `rows` after which the threshold may stand, rising
    errors_C: Rows  # further errors at each cut
    saved_C: Floats  # further seconds saved
    chosen: int  # index of the cut that is best
    value: tuple[float, float]


class _Moving:
    """Thresholds on their way down over the learn split: who answers each sample now, at what cost."""

    def __init__(self, exits: Exits) -> None:
        self.exits = exits
        count = exits.count
        self.thresholds_E = np.full(len(exits.names), NEVER)
        self.at_N = np.full(count, len(exits.names))
        self.wrong_N = np.zeros(count, dtype=np.int64)
        self.cost_N = exits.cost_FN[-1].copy()
        self.errors = 0
        self.sorted = [
            rows[np.argsort(-exits.confidence_EN[e, rows], kind="stable")]
            for e in range(len(exits.names))
            for rows in [np.flatnonzero(exits.gated_EN[e])]
        ]

    def best(self, most_errors: int) -> _Move | None:
        moves = [move for e in range(len(self.sorted)) if (move := self._of_exit(e, most_errors)) is not None]
        return max(moves, key=lambda move: move.value, default=None)

    def _of_exit(self, e: int, most_errors: int) -> _Move | None:
        rows = self.sorted[e][self.at_N[self.sorted[e]] > e]
        if not len(rows):
            return None
        confidence = self.exits.confidence_EN[e, rows]
        errors = np.cumsum(self.exits.differs_EN[e, rows] - self.wrong_N[rows])
        saved = np.cumsum(self.cost_N[rows] - self.exits.cost_FN[e, rows])
        # equal confidences leave together
        ends = np.append(confidence[1:] < confidence[:-1], True)
        cuts = np.flatnonzero(ends & (self.errors + errors <= most_errors) & (saved > 0))
        if not len(cuts):
            return None
        errors_C, saved_C = errors[cuts], saved[cuts]
        free = errors_C <= 0
        if free.any():
            chosen = int(np.flatnonzero(free)[np.argmax(saved_C[free])])
            value = (1.0, float(saved_C[chosen]))
        else:
            rate = saved_C / errors_C
            chosen = int(np.argmax(rate))
            value = (0.0, float(rate[chosen]))
        return _Move(e, rows, cuts, errors_C, saved_C, chosen, value)

    def take(self, move: _Move) -> list[Floats]:
        """Lower the threshold; the points on the way."""
        e, chosen = move.exit_index, move.chosen
        until = move.errors_C[: chosen + 1]
        if move.value[0]:
            wanted = move.saved_C[chosen] * np.arange(1, _QUARTERS + 1) / _QUARTERS
            stops = np.minimum(np.searchsorted(move.saved_C[: chosen + 1], wanted), chosen)
        else:
            highest = np.maximum.accumulate(until)
            stops = np.flatnonzero(np.append(highest[1:] > highest[:-1], True))
        points = []
        for stop in np.unique(stops):
            point = self.thresholds_E.copy()
            point[e] = self._threshold(e, move.rows, int(move.cuts[stop]))
            points.append(point)
        leaving = move.rows[: move.cuts[chosen] + 1]
        self.thresholds_E = points[-1]
        self.errors += int(move.errors_C[chosen])
        self.at_N[leaving] = e
        self.wrong_N[leaving] = self.exits.differs_EN[e, leaving]
        self.cost_N[leaving] = self.exits.cost_FN[e, leaving]
        return points

    def _threshold(self, e: int, rows: Rows, last: int) -> float:
        """Half-way to the next sample, so that a rounding of the confidence changes nobody's answer here."""
        here = self.exits.confidence_EN[e, rows[last]]
        if last + 1 == len(rows):
            return float(here)
        below = self.exits.confidence_EN[e, rows[last + 1]]
        middle = float(np.float32((here + below) / 2))  # the gate compares in float32
        return middle if below < middle <= here else float(here)
