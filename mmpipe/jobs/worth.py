"""What a job's exits brought: the work that was spared, against the looks that it took to spare it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmpipe.graphs.plan import HEAD
from mmpipe.jobs.markup import seconds
from mmpipe.jobs.tally import Tally


@dataclass(frozen=True)
class Worth:
    """Core- and segment-seconds: `saved` by media that were neither decoded nor encoded, at the mean cost of those that
    were; `spent` on the head at every exit but the last."""

    saved: float
    spent: float

    @property
    def pays(self) -> bool:
        return self.saved > self.spent

    def report(self) -> dict[str, Any]:
        """What run.json holds of it."""
        return {"saved_seconds": round(self.saved, 4), "spent_seconds": round(self.spent, 4), "told": self.note()}

    def note(self) -> str:
        """For people."""
        saved, spent = seconds(self.saved), seconds(self.spent)
        told = f"exits spared about {saved} of decoding and encoding and took {spent} of looking"
        return told if self.pays else f"{told}: here they do not pay; fusion.exits: [] answers every sample in full"


def worth_of(tally: Tally) -> Worth | None:
    """What a run's exits were worth; None without exits, or where a modality that was spared was never computed."""
    if len(tally.exits) < 2:
        return None
    saved = 0.0
    for name in tally.modalities:
        computed = tally.reached(name) - tally.recalled[name]
        spared = tally.present[name] - tally.reached(name)
        if spared and computed <= 0:
            return None
        segments = sum(value for key, value in tally.seconds.items() if key.partition("@")[0] == name)
        if spared:
            saved += spared * (segments + tally.decoding[name]) / computed
    heads = {key: value for key, value in tally.seconds.items() if key.startswith(f"{HEAD}@")}
    last = f"{HEAD}@{len(tally.exits) - 1}"
    return Worth(saved, sum(value for key, value in heads.items() if key != last))
