"""Samples → predictions, by a built pipeline's plans: opened, decoded, run, looked at again where unsure, told.

    samples ─► Feed ─► executor ─► Outcome ─► (views of the unsure ─► executor) ─► Answers ─► predictions

A job of many samples does that in several processes (`mmpipe.workers`).

Not safe for several threads: the pipeline's lock is.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mmpipe import cache, media
from mmpipe.answers import Answers, Weighed
from mmpipe.budget import decoding_bytes
from mmpipe.build import Built
from mmpipe.config import Config
from mmpipe.decoders import Decoders, available
from mmpipe.deliberating import Deliberation
from mmpipe.feed import Feed
from mmpipe.loading import GivingBack
from mmpipe.parts import Parts
from mmpipe.recalling import Recalling
from mmpipe.resolved import Kind, Resolved
from mmpipe.runners import Runners
from mmpipe.runtime.ledger import Outcome
from mmpipe.runtime.shard import Answered, Shard
from mmpipe.types import Prediction, Sample
from mmpipe.workers import Done, run_side_by_side

_LEAST_BUCKETS = 4  # of a part that is run with exits: only the last bucket of each of its stages is padded
_TAKE_TURNS = 4  # cores; with more, decoding beside computing is felt less than waiting for the last picture


@dataclass(frozen=True)
class Wish:
    """How samples are to be run. kind: by which of the pipeline's plans. exits False: the full pipeline. alone: in this
    process.

    deliberate None: as configured where exits are on; the full pipeline looks once. cached False: all is computed,
    whatever is known. embeddings None: as configured.
    """

    kind: Kind = "batch"
    exits: bool = True
    cached: bool = True
    deliberate: bool | None = None
    embeddings: bool | None = None
    alone: bool = False
    wary: bool = False


class Engine:
    """Runs what a configuration was built into."""

    def __init__(self, config: Config, built: Built, limits: media.Limits, runners: Runners) -> None:
        self.config, self.built, self.limits, self.runners = config, built, limits, runners
        self.deliberation = Deliberation.configured(config, built, limits)
        self.recalling = Recalling(config, built, limits, runners)
        self._decoders: Decoders | None = None
        self._give_back = GivingBack()

    def run(self, samples: Sequence[Sample], wish: Wish, answered: Answered) -> tuple[list[Prediction], Outcome]:
        """One shard: predictions in order, and the trace of each row's first look. `answered` is told of progress."""
        found: list[tuple[list[Prediction], Outcome]] = []
        self.run_shards([samples], wish, lambda samples, *answers: found.append(answers), answered)
        return found[0]

    def run_shards(
        self, shards: Sequence[Sequence[Sample]], wish: Wish, done: Done, answered: Answered = lambda count: None
    ) -> None:
        """As `run` for one shard after the other; `done` gets each, in order."""

        def run(parts: Iterable[Sequence[Sample]], answered: Answered, done: Done, wary: bool) -> None:
            self._run_here(parts, replace(wish, wary=wary), answered, done)

        def counted(samples: Sequence[Sample], predictions: list[Prediction], outcome: Outcome) -> None:
            if wish.exits:
                self.runners.count(outcome)
            done(samples, predictions, outcome)

        rows = sum(map(len, shards))
        most = self._processes(wish)
        if most > 1:
            executor = self.runners.executor(wish.kind, wish.exits)  # made before it is shared
            bucket = executor.plan.stage_plans[0].rows
            several = _LEAST_BUCKETS if executor.plan.stages > 1 and wish.exits else 1
            least = bucket * max(1, min(several, rows // (most * bucket)))
            most = min(most, math.ceil(rows / least))
        if most <= 1:
            run(shards, answered, counted, False)
            return
        if wish.cached:
            self.recalling.of(wish.kind, executor)  # hashes the weights, once for all
        cache.let_go()
        run_side_by_side(Parts(shards, most, bucket, least), run, answered, counted)

    def close(self) -> None:
        """Give back executors and the cache; they are made again when they are needed."""
        self.runners.close()
        self.recalling.close()
        if self._decoders is not None:
            self._decoders.close()
            self._decoders = None

    def decoders(self, wish: Wish) -> Decoders | None:
        """The processes that decode, where that was resolved or where it must be; started once."""
        resolved = self.runners.resolved(wish.kind)
        wanted = wish.wary or (wish.kind == "batch" and resolved.decoding == "processes")
        if wanted and self._decoders is None and available():
            self._decoders = Decoders(self.built.preparations, self.limits, resolved.decode_workers, patient=wish.wary)
        return self._decoders if wanted else None

    def _processes(self, wish: Wish) -> int:
        """How many a run may have: an observer sees this one alone."""
        elsewhere = threading.current_thread() is not threading.main_thread()
        if wish.alone or elsewhere or self.runners.observers.any():
            return 1
        return self.runners.resolved(wish.kind).processes

    def _run_here(self, shards: Iterable[Sequence[Sample]], wish: Wish, answered: Answered, done: Done) -> None:
        """In this process alone."""
        if self._deliberates(wish):  # it runs the same plan again, which a shard in flight would be using
            for samples in shards:
                outcome = self._outcome(samples, wish, answered)
                done(samples, self._told(samples, outcome, wish), outcome)
            return
        self._execute(
            shards, wish, answered, lambda samples, outcome: done(samples, self._told(samples, outcome, wish), outcome)
        )

    def _deliberates(self, wish: Wish) -> bool:
        return self.deliberation is not None and (wish.exits if wish.deliberate is None else wish.deliberate)

    def _told(self, samples: Sequence[Sample], outcome: Outcome, wish: Wish) -> list[Prediction]:
        """The predictions of a run; samples that it was unsure of are looked at again, where that is asked for."""
        exits = self.runners.plan().exits
        weighed: Mapping[int, Weighed] = {}
        if self.deliberation is not None and self._deliberates(wish):
            again = Wish(kind=wish.kind, exits=False, cached=wish.cached)
            weighed = self.deliberation.of(
                samples, outcome, len(exits) - 1, lambda views: self._outcome(views, again, lambda count: None)
            )
        output = self.config.output
        embeddings = output.embeddings or self.config.task == "embed" if wish.embeddings is None else wish.embeddings
        answers = Answers(
            labels=self.built.labels,
            dims={name: preparation.dim for name, preparation in self.built.preparations.items()},
            exits=tuple(exit_.name for exit_ in exits),
            top_k=output.top_k,
            probabilities=output.probabilities,
            embeddings=embeddings,
        )
        return answers.of(samples, outcome, weighed)

    def _outcome(self, samples: Sequence[Sample], wish: Wish, answered: Answered) -> Outcome:
        found: list[Outcome] = []
        self._execute([samples], wish, answered, lambda samples, outcome: found.append(outcome))
        return found[0]

    def _execute(
        self,
        shards: Iterable[Sequence[Sample]],
        wish: Wish,
        answered: Answered,
        done: Callable[[Sequence[Sample], Outcome], None],
    ) -> None:
        """Run shards through a plan, the next one beginning before the last has ended; `done` gets them in order."""
        executor = self.runners.executor(wish.kind, wish.exits)
        plan, columns = executor.plan, list(self.built.preparations)
        recall = self.recalling.of(wish.kind, executor) if wish.cached else None
        flying: deque[tuple[Sequence[Sample], Feed]] = deque()
        resolved = self.runners.resolved(wish.kind)
        decoders = self.decoders(wish)

        def shard_of(samples: Sequence[Sample]) -> Shard:
            samples = list(samples)  # a listing makes a sample whenever it is asked for one
            feed = Feed(
                samples, self.built.preparations, plan, self.limits, ahead, room, recall=recall, decoders=decoders
            )
            flying.append((samples, feed))
            present_NM = torch.tensor(
                [[sample.media.get(name) is not None for name in columns] for sample in samples], dtype=torch.bool
            ).reshape(len(samples), len(columns))
            names = [sample.id for sample in samples]
            return executor.shard(present_NM, feed, names=names, answered=answered, computed=feed.computed)

        def hand_on(outcome: Outcome) -> None:
            samples, feed = flying.popleft()
            outcome.seconds["decode"] = feed.core_seconds
            outcome.decodings = feed.spans
            outcome.missed = dict(feed.missed)
            if recall is not None:
                recall.store.flush()
                outcome.notes += recall.store.notes()
            if decoders is not None and decoders.note:
                outcome.notes.append(decoders.note)
            done(samples, outcome)
            self._give_back()

        rows = plan.stage_plans[0].rows
        alone = wish.kind == "call" and len(plan.stage_plans) > 1
        # two buckets ahead: one that is read next, and one that is being decoded meanwhile
        workers = resolved.decode_workers
        room = media.Room(max(1, decoding_bytes(resolved.memory_limit) // resolved.processes))
        several = media.Ahead(
            workers,
            items_ahead=2 * rows,
            beside=decoders_beside(resolved, workers),
            computing=executor.at_work,
        )
        with media.Here() if alone else several as ahead:
            try:
                executor.run_all(map(shard_of, shards), hand_on)
            finally:
                if recall is not None:
                    recall.store.flush()


def decoders_beside(resolved: Resolved, workers: int) -> int:
    """Decoders that go on while a segment is computed. Where that takes every core, none: each would hold up a thread
    of the segment, and all its others with it (with two cores 7% of a folder's time). Where a GPU computes, all."""
    if resolved.device != "cpu":
        return workers
    every = resolved.streams == "caller" and workers <= resolved.threads
    fills = resolved.processes > 1 or (every and workers <= _TAKE_TURNS)
    return 0 if fills else max(1, workers // 2)
