"""The audit of a job: some samples that left early are computed in full too, to see whether the exits still hold.

A promise is on the share of *all* answered samples whose early answer differs from the full pipeline's. So samples are
chosen among all answered ones; one that did not leave early has the full pipeline's answer, cannot disagree, and costs
nothing to count. What a sample says is thus one draw of exactly what was promised.

Chosen by a hash of the id, the samples are the same whatever the workers, the order or the number of runs; their rows
are not changed. They wait until they fill a bucket, so that an audit of 1% costs about 1% and no padding.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmpipe.config import AuditConfig
from mmpipe.fusion.audit import Observed, share_of
from mmpipe.types import Prediction, Sample

_MOST_SHARDS, _SHARDS_TO_SAY = 16, 64  # between two looks
CERTAINTY = 0.95  # of the interval, over all looks of a job at once


Chosen = tuple[Sample, str | None] | None  # with the label of an early answer; None: it had the full pipeline's


@dataclass(frozen=True)
class AuditSettings:
    """What a job audits. share: of all samples; promised: the share of samples that may disagree, None: no promise."""

    share: float
    disable: bool  # exits, once the promise is broken
    promised: float | None
    last_exit: str  # whose answers are the full pipeline's
    batch: int  # samples that are worth a run

    def shards_a_look(self, rows: int) -> int:
        """After how many shards of so many rows a job looks. Where exits may be switched off, when there is enough to
        compute; where it is only said, seldom: at every look all processes wait for the last."""
        enough = math.ceil(self.batch / (self.share * rows))
        return max(1, min(_MOST_SHARDS, enough)) if self.disable else _SHARDS_TO_SAY


def audit_settings(
    config: AuditConfig | None, promised: float | None, exits: Sequence[str], batch: int
) -> AuditSettings | None:
    """What folder jobs audit: as configured; by default 1% where a calibration promised something. None: nothing."""
    if config is None and promised is not None:
        config = AuditConfig()
    if config is None or not config.share or len(exits) < 2:
        return None
    return AuditSettings(config.share, config.on_drift == "disable", promised, exits[-1], batch)


class Auditor:
    """Sees every row of a job: `choose` among each shard's, `look` at what was chosen, `finish` at the end. `exits`:
    whether to go on using them."""

    def __init__(
        self,
        settings: AuditSettings,
        run: Callable[[Sequence[Sample]], Sequence[Prediction]],
        say: Callable[[str], None],
    ) -> None:
        self.settings, self._run, self._say = settings, run, say
        self.observed = Observed()
        self.audited = 0  # computed in full
        self.broken = False  # has the promise ever been seen to be broken
        self.seconds = 0.0
        self.notes: list[str] = []
        self._over = False
        self._waiting: list[Chosen] = []

    @property
    def exits(self) -> bool:
        return not (self.broken and self.settings.disable and not self._over)

    def choose(self, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Chosen]:
        """Those of a shard's rows that are to be looked at. The others need not be kept."""
        return [
            (sample, prediction.label) if prediction.answered_by != self.settings.last_exit else None
            for sample, prediction in zip(samples, predictions, strict=True)
            if prediction.answered_by is not None and is_chosen(sample.id, self.settings.share)
        ]

    def look(self, chosen: Iterable[Chosen]) -> None:
        """Compute what fills a bucket."""
        if not self.exits:
            return  # nothing leaves early any more
        self._waiting += chosen
        if len(self._waiting) - self._waiting.count(None) >= self.settings.batch:
            self._compute()

    def finish(self) -> None:
        """Compute what is still waiting. Too late to switch exits off: no sample is left."""
        if self._waiting:
            self._over = True
            self._compute()

    def _compute(self) -> None:
        began = time.perf_counter()
        waiting, self._waiting = self._waiting, []
        early = list(filter(None, waiting))
        full = self._run([sample for sample, _ in early]) if early else []
        disagrees = [prediction.label != label for (_, label), prediction in zip(early, full, strict=True)]
        self.audited += len(early)
        self.observed = Observed(self.observed.count + len(waiting), self.observed.yes + sum(disagrees))
        self.seconds += time.perf_counter() - began
        self._judge()

    def _judge(self) -> None:
        promised, (low, high) = self.settings.promised, self.observed.interval(CERTAINTY)
        if promised is None or self.broken or low <= promised:
            return
        self.broken = True
        then = "exits are off from here on"
        if self.exits:
            then = "calibrate on data as they are now"
            if self.settings.disable:
                then = f"that was known only at the end, when no exit could be switched off any more: {then}"
        self.notes.append(
            f"audit: the exits disagree with the full pipeline on {low:.2%} to {high:.2%} of the samples "
            f"({CERTAINTY:.0%} certain), more than the {promised:.2%} that the calibration promised; {then}"
        )
        self._say(self.notes[-1])

    def report(self) -> dict[str, Any]:
        """What run.json holds of it."""
        estimate, interval = self.observed.estimate, self.observed.interval(CERTAINTY)
        return {
            "share": self.settings.share,
            "chosen": self.observed.count,  # among all answered samples
            "audited": self.audited,  # of those: had left early, and were computed in full
            "disagreements": self.observed.yes,
            "estimate": None if estimate is None else round(estimate, 6),  # of the share of all samples that disagree
            "interval": [round(bound, 6) for bound in interval],
            "certainty": CERTAINTY,
            "promised": self.settings.promised,
            "broken": self.broken,
            "exits_disabled": not self.exits,
            "seconds": round(self.seconds, 4),
        }


def is_chosen(id_: str, share: float) -> bool:
    """Whether a sample is audited, by its id alone."""
    digest = hashlib.blake2b(id_.encode("utf-8", "surrogatepass"), digest_size=8, person=b"mmpipe.audit").digest()
    return share_of(digest) < share
