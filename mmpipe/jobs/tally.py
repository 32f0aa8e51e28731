"""What a run adds up to, in memory that does not grow with the input: counts, histograms, stories, a few samples."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mmpipe.runtime.ledger import Outcome
from mmpipe.types import Prediction, Sample

BINS = 20  # of confidence, from 0 to 1
SHOWN = 12  # samples drawn at random for the report, and as many of the least sure
FAILURES = 50  # that are listed one by one; all are counted

# "modality:code" of each part of a row's error; what follows them may quote a file's name, whatever is in that
_CODES = re.compile(r"(?:^|; )((?:image|text|audio|head|sample):[a-z_]+)(?=: )")


@dataclass(frozen=True)
class Step:
    """One exit's look at a sample."""

    exit: str
    label: str
    confidence: float
    opened: tuple[str, ...]  # modalities that the exit sees and that could be used


@dataclass(frozen=True)
class Shown:
    """A sample to show to a person, with what the pipeline thought of it at each exit."""

    sample: Sample
    prediction: Prediction
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Story:
    """A sample whose trace shows what exits are for.

    kind: "first" (the first exit was sure, the rest was never opened), "decided" (a later exit was sure),
    "settled" (earlier exits disagreed with each other, the last one settled it).
    """

    kind: str
    shown: Shown
    score: tuple[float, ...]


@dataclass
class Tally:
    """Everything the end of a run is told from. `add` once per shard."""

    labels: tuple[str, ...]
    exits: tuple[str, ...]  # names, in order; ("all",) for a pipeline without early exits
    modalities: tuple[str, ...]
    rows: int = 0
    status: Counter[str] = field(default_factory=Counter)
    answered_by: Counter[str] = field(default_factory=Counter)
    files_opened: Counter[str] = field(default_factory=Counter)
    recalled: Counter[str] = field(default_factory=Counter)  # modality → embeddings that were known
    missed: Counter[str] = field(default_factory=Counter)  # modality → embeddings that were looked up in vain
    decoding: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # modality → seconds on workers
    buckets: Counter[str] = field(default_factory=Counter)  # segment → runs
    in_buckets: Counter[str] = field(default_factory=Counter)  # segment → rows in them
    notes: list[str] = field(default_factory=list)  # what the runs had to say, each once
    present: Counter[str] = field(default_factory=Counter)
    by_label: dict[str, Counter[str]] = field(default_factory=dict)  # label → exit → rows
    confidence: dict[str, list[int]] = field(default_factory=dict)  # exit that answered → rows per bin
    deliberated: int = 0  # rows that were looked at again
    changed: int = 0  # of those: rows whose label is another one for it
    errors: Counter[str] = field(default_factory=Counter)  # "modality:code" → how often
    failures: list[Prediction] = field(default_factory=list)  # the first of status failed and partial
    stories: dict[str, Story] = field(default_factory=dict)
    drawn: list[Shown] = field(default_factory=list)  # at random, in input order
    unsure: list[Shown] = field(default_factory=list)  # the least confident, least first
    seconds: dict[str, float] = field(default_factory=dict)  # segment → seconds; feed, decode, write, fuse too
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, samples: Sequence[Sample], predictions: Sequence[Prediction], outcome: Outcome) -> None:
        """Count one shard."""
        steps = self._steps(outcome, predictions)
        for row, (sample, prediction) in enumerate(zip(samples, predictions, strict=True)):
            self._count(prediction)
            if prediction.deliberated and outcome.probabilities_NL is not None:
                first = self.labels[int(outcome.probabilities_NL[row].argmax())]
                self.deliberated += 1
                self.changed += first != prediction.label
            shown = Shown(sample, prediction, tuple(steps.get(row, ())))
            self._tell(shown)
            self._show(shown)
        for name, seconds in outcome.seconds.items():
            self.spend(name, seconds)
        for decoding in outcome.decodings:
            self.decoding[decoding.branch] += decoding.end - decoding.start
        for span in outcome.spans:
            if ":" not in span.step:
                self.buckets[span.step] += 1
                self.in_buckets[span.step] += span.rows
        self.files_opened.update(outcome.files_opened)
        self.recalled.update(outcome.recalled)
        self.missed.update(outcome.missed)
        self.notes += [note for note in outcome.notes if note not in self.notes]

    def reached(self, modality: str) -> int:
        """Media that a run needed; speculation may open more than there are."""
        return min(self.files_opened[modality], self.present[modality])

    def spend(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _steps(self, outcome: Outcome, predictions: Sequence[Prediction]) -> Mapping[int, list[Step]]:
        steps: dict[int, list[Step]] = {}
        for look in outcome.looks:
            name = self.exits[look.exit_index]
            # the exit's name lists what it sees; "all", and depths of the head, see everything
            seen = [m for m in self.modalities if m in [part.split(".")[0] for part in name.split("+")]]
            for row, label, confidence in zip(look.rows, look.labels, look.confidences, strict=True):
                used = tuple(m for m in predictions[row].used if m in (seen or self.modalities))
                steps.setdefault(row, []).append(Step(name, self.labels[label], confidence, used))
        return steps

    def _count(self, prediction: Prediction) -> None:
        self.rows += 1
        self.status[prediction.status] += 1
        for modality in prediction.present:
            self.present[modality] += 1
        if prediction.answered_by is not None:
            self.answered_by[prediction.answered_by] += 1
            if prediction.label is not None and prediction.confidence is not None:
                self.by_label.setdefault(prediction.label, Counter())[prediction.answered_by] += 1
                bins = self.confidence.setdefault(prediction.answered_by, [0] * BINS)
                bins[min(BINS - 1, int(prediction.confidence * BINS))] += 1
        if prediction.error is not None:
            self.errors.update(_CODES.findall(prediction.error))
            if len(self.failures) < FAILURES:
                self.failures.append(prediction)

    def _show(self, shown: Shown) -> None:
        """Reservoir sampling for `drawn`; the least confident for `unsure`."""
        if shown.prediction.status == "failed":
            return
        if len(self.drawn) < SHOWN:
            self.drawn.append(shown)
        else:
            place = self._random.randrange(self.rows)
            if place < SHOWN:
                del self.drawn[place]
                self.drawn.append(shown)
        if shown.prediction.confidence is not None:
            self.unsure.append(shown)
            self.unsure.sort(key=lambda other: other.prediction.confidence or 0.0)
            del self.unsure[SHOWN:]

    def _tell(self, shown: Shown) -> None:
        story = story_of(shown, self.exits)
        if story is not None and (story.kind not in self.stories or story.score > self.stories[story.kind].score):
            self.stories[story.kind] = story


def story_of(shown: Shown, exits: Sequence[str]) -> Story | None:
    """What a sample's trace tells, and how well: more change and more certainty make a better story."""
    prediction, steps = shown.prediction, shown.steps
    if prediction.status != "ok" or not steps or len(exits) < 2 or prediction.confidence is None:
        return None
    last, first = steps[-1], steps[0]
    if last.exit == exits[0] and prediction.skipped:
        return Story("first", shown, (len(prediction.skipped), prediction.confidence))
    if last.exit == exits[-1]:
        if len(steps) > 2 and steps[-2].label != first.label and _looked_further(steps[-2], last):
            # the surer the two that disagreed, and the surer the one that settled it, the better
            return Story("settled", shown, (min(first.confidence, steps[-2].confidence) + 2 * last.confidence,))
        return None
    if len(steps) > 1:
        return Story("decided", shown, (float(first.label != last.label), last.confidence - first.confidence))
    return None


def _looked_further(before: Step, last: Step) -> bool:
    """Whether the last exit had more to go by: another modality, or the rest of the layers. A sample without what the
    others go on to is only asked again."""
    return last.opened != before.opened or ".layer" in before.exit
