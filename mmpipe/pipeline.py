"""The pipeline: a configuration, built; predictions for samples, for iterators, for folders.

with Pipeline.load("quickstart") as pipeline:
    pipeline(image="shoe.jpg", text="trail runner").label
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from mmpipe import media
from mmpipe.answers import FULL, Answers
from mmpipe.build import Built, build
from mmpipe.config import Config, load
from mmpipe.errors import InputError
from mmpipe.feed import Feed
from mmpipe.fingerprints import fingerprints, versions
from mmpipe.fusion import gate
from mmpipe.graphs.backends import lower
from mmpipe.graphs.cut import Cut, cut
from mmpipe.graphs.fuse import FusedGraph
from mmpipe.graphs.plan import GraphError, Plan
from mmpipe.graphs.watch import find, with_outputs
from mmpipe.jobs.job import JobSettings, Summary, run_job
from mmpipe.jobs.output import refuse
from mmpipe.jobs.progress import Progress
from mmpipe.listing import find_samples, input_root
from mmpipe.loading import collector_paused
from mmpipe.placing import Resolved, decoding_bytes, placed, resolve
from mmpipe.runtime.executor import Executor
from mmpipe.runtime.lanes import Watch
from mmpipe.runtime.ledger import Gate, Outcome
from mmpipe.runtime.measure import expected_seconds, seconds_to_exits
from mmpipe.types import MODALITIES, Prediction, Sample


@dataclass(frozen=True)
class Observation:
    """What passed a place of the graph: `values[name]` [rows, …] belong to the samples `ids`, in this order."""

    where: str
    ids: Sequence[str]
    values: Mapping[str, Tensor]

    @property
    def tensor(self) -> Tensor:
        """The value of a place that has one: a layer, an embedding."""
        (only,) = self.values.values()
        return only


Observer = Callable[[Observation], None]

_STREAM_BUCKETS = 4  # buckets that `stream` takes at a time: enough to fill the later stages' buckets


class Pipeline:
    """Encoders and a head as one graph, cut at its exits and ready to run. Made by `load`; close it, or use `with`.

    Several threads may call it; runs take turns.
    """

    def __init__(self, config: Config, *, say: Callable[[str], None] = lambda text: None) -> None:
        began = time.perf_counter()
        self.config = config
        with collector_paused():
            self._built: Built = build(config, say=say)
        self._dims = {name: preparation.dim for name, preparation in self._built.preparations.items()}
        self._limits = media.Limits(**config.input.limits.model_dump())
        self._lock = threading.RLock()  # an observer may look at the pipeline that calls it
        self._numbers = itertools.count()
        self._cut: Cut | None = None
        self._cut_version = -1
        self._resolved: dict[int, Resolved] = {}  # rows → how a plan of that bucket runs; 0: the configuration's
        self._plans: dict[int, Plan] = {}
        self._left: list[float] = []  # samples that each exit has answered so far
        self._ids: list[str] = []  # of the samples that run now
        self._observers: dict[int, tuple[str, Observer]] = {}
        self._executors: dict[tuple[int, bool], Executor] = {}
        self.resolved: Resolved = resolve(config, self._current_cut())
        self._resolved[0] = self.resolved
        self._build_seconds = time.perf_counter() - began

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, Any],
        *,
        overrides: Sequence[str] = (),
        say: Callable[[str], None] = lambda text: None,
    ) -> Self:
        """A packaged name, the path of a YAML file, or a mapping → a pipeline.

        `overrides`: "KEY=VALUE" as `--set` takes them. `say` is told what takes time. Raises ConfigError, ModelError.
        """
        return cls(load(source, overrides=overrides), say=say)

    @property
    def graph(self) -> FusedGraph:
        """The fused torch.fx.GraphModule. What runs is cut from it: edit it, call its `recompile()`, and the next run
        is cut anew."""
        return self._built.graph

    @property
    def plan(self) -> Plan:
        """Stages, segments, steps and buffers of the graph as it is now, scheduled for the configuration's bucket."""
        with self._lock:
            return self._plan(0)

    @property
    def modules(self) -> Mapping[str, GraphModule]:
        """Each segment's part of the graph: inputs then reads → tuple of writes."""
        return self._current_cut().modules

    @property
    def labels(self) -> tuple[str, ...]:
        return self._built.labels

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of these models: windows, defaults, uncalibrated confidence."""
        return self._built.notes

    @property
    def built(self) -> Built:
        return self._built

    # --- predicting -------------------------------------------------------------------------------------------------

    def __call__(self, *, image: Any = None, text: Any = None, audio: Any = None, id: str = "sample") -> Prediction:
        """One sample. image, audio: a path, bytes, PIL image, array or tensor (sound: (samples, rate_hz)); text: the
        text itself, or a `Path` to a file.

        Where the graph is large and `runtime.batch_size` is auto, this runs a plan of one row: another plan than
        `predict`'s, which agrees with it within rounding.
        """
        sample = self._sample({"id": id, "image": image, "text": text, "audio": audio}, 0)
        return self.run([sample], rows=self.resolved.call_rows)[0][0]

    def predict(self, samples: Iterable[Sample | Mapping[str, Any]]) -> list[Prediction]:
        """List in, list out, in order. A sample is a `Sample` or a mapping with any of image, text, audio, id.

        What can't be read becomes a Prediction with a status and a reason, never an exception.
        """
        found = [self._sample(sample, number) for number, sample in enumerate(samples)]
        size = self.config.output.shard_rows
        return [
            prediction
            for start in range(0, len(found), size)
            for prediction in self.run(found[start : start + size])[0]
        ]

    def stream(self, samples: Iterable[Sample | Mapping[str, Any]]) -> Iterator[Prediction]:
        """As `predict`, for an iterator that may never end: takes a few buckets at a time."""
        numbered = enumerate(samples)
        while chunk := list(itertools.islice(numbered, _STREAM_BUCKETS * self.resolved.batch_size)):
            yield from self.run([self._sample(sample, number) for number, sample in chunk])[0]

    def embed(self, samples: Iterable[Sample | Mapping[str, Any]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[samples, dims]: L2-normalised embeddings side by side in encoder order, zeros where a modality is absent.

        No exits. A sample of which nothing could be read is a row of NaN: `predict` says why.
        """
        found = [self._sample(sample, number) for number, sample in enumerate(samples)]
        rows = np.full((len(found), sum(self._dims.values())), np.nan, dtype=np.float32)
        size = self.config.output.shard_rows
        for start in range(0, len(found), size):
            predictions, _ = self.run(found[start : start + size], exits=False, embeddings=True)
            for row, prediction in enumerate(predictions, start):
                if prediction.embedding is not None:
                    rows[row] = prediction.embedding
        return rows

    def run_folder(
        self,
        folder: str | Path | None = None,
        output: str | Path | None = None,
        *,
        mode: str = "new",
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Summary:
        """What `mmpipe run` does: a folder in, shards of predictions out. Defaults come from the configuration.

        mode "new" refuses an output folder that is not empty, "overwrite" replaces what mmpipe wrote there. Raises
        InputError, OutputError, Interrupted.
        """
        out = Path(output) if output is not None else self.config.output_folder
        if out is None:
            raise self.config.error("output.folder", "no output folder", "set output.folder, or give one")
        refuse(out, mode, inside=input_root(self.config, folder))
        return run_job(self, self.find(folder), out, mode=mode, limit=limit, progress=progress)

    @contextlib.contextmanager
    def observe(self, where: str, callback: Observer) -> Iterator[None]:
        """While this context is open, `callback` gets an Observation for each bucket that passes `where`.

        `where`: a segment ("image@0": all that it writes), a layer ("image.layer4") or an embedding ("image"). The
        tensors are copies. It is called on the thread that asked for the predictions, between buckets; what it raises
        ends that run. Raises InputError where there is no such place.

            with pipeline.observe("image.layer2", lambda seen: print(seen.ids, seen.tensor.shape)):
                pipeline.predict(samples)
        """
        try:
            find(self.graph, self._current_cut(), where)
        except GraphError as error:
            raise InputError(str(error)) from error
        number = next(self._numbers)
        with self._lock:
            self._observers[number] = where, callback
            self._forget_executors()
        try:
            yield
        finally:
            with self._lock:
                del self._observers[number]
                self._forget_executors()

    def job_settings(self) -> JobSettings:
        """What a folder job needs to know of this pipeline."""
        source, output = self.config.source, self.config.output
        return JobSettings(
            title=source.name or "mmpipe",
            dims=self._dims,
            labels=self.labels,
            exits=tuple(exit_.name for exit_ in self.plan.exits) or (FULL,),
            shard_rows=output.shard_rows,
            max_failed=self.config.input.max_failed,
            thumbnails=output.thumbnails,
            limits=self._limits,
            resolved={name: value for name, value in asdict(self.resolved).items() if name != "reasons"},
            versions=versions(),
            notes=self.notes,
            build_seconds=self._build_seconds,
        )

    def fingerprints(self, samples: Sequence[Sample]) -> dict[str, str]:
        """Hashes of the model, of its numerics, and of a job over these samples."""
        return fingerprints(self.config, self._built, self.resolved, self.plan, samples)

    def find(self, folder: str | Path | None = None) -> media.Listing:
        """The samples of `folder`, or of the configuration's input. Opens no medium."""
        return find_samples(self.config, folder)

    # --- running ----------------------------------------------------------------------------------------------------

    def run(
        self,
        samples: Sequence[Sample],
        *,
        exits: bool = True,
        embeddings: bool | None = None,
        rows: int | None = None,
        answered: Callable[[int], None] = lambda count: None,
    ) -> tuple[list[Prediction], Outcome]:
        """One shard: predictions in order, and the trace of the run. `answered` is told of progress.

        `rows`: another bucket than the configuration's.
        """
        with self._lock:
            key = 0 if rows in (None, self.resolved.batch_size) else int(rows or 0)
            executor = self._executor(key, exits)
            columns = list(self._built.preparations)
            present_NM = torch.tensor(
                [[sample.media.get(name) is not None for name in columns] for sample in samples], dtype=torch.bool
            ).reshape(len(samples), len(columns))
            workers = self.resolved.decode_workers
            bucket = executor.plan.stage_plans[0].rows
            ahead = media.Ahead(workers, decoding_bytes(self.resolved.memory_limit), items_ahead=bucket)
            with ahead:
                feed = Feed(samples, self._built.preparations, executor.plan, self._limits, ahead)
                self._ids = [sample.id for sample in samples]
                outcome = executor.run(present_NM, feed, answered=answered)
            outcome.seconds["decode"] = feed.core_seconds
            outcome.decodings = feed.spans
            if exits:
                self._count(outcome)
        wanted = self.config.output.embeddings or self.config.task == "embed" if embeddings is None else embeddings
        answers = Answers(
            labels=self.labels,
            dims=self._dims,
            exits=tuple(exit_.name for exit_ in executor.plan.exits),
            top_k=self.config.output.top_k,
            probabilities=self.config.output.probabilities,
            embeddings=wanted,
        )
        return answers.of(samples, outcome), outcome

    def _current_cut(self) -> Cut:
        if self._cut is None or self._cut_version != self.graph.version:
            self._cut, self._cut_version = cut(self.graph), self.graph.version
            self._forget_plans()
        return self._cut

    def _forget_plans(self) -> None:
        self._forget_executors()
        self._plans.clear()

    def _forget_executors(self) -> None:
        for executor in self._executors.values():
            executor.close()
        self._executors.clear()

    def _plan(self, rows: int) -> Plan:
        made = self._current_cut()
        if rows not in self._resolved:
            self._resolved[rows] = resolve(self.config, made, rows=rows, measure=self._measured)
        if rows not in self._plans:
            self._plans[rows] = placed(made.plan, self._resolved[rows])
        return self._plans[rows]

    def _executor(self, rows: int, exits: bool) -> Executor:
        plan = self._plan(rows)
        if (rows, exits) not in self._executors:
            gate = self._gate(exits) if plan.exits else None
            self._executors[rows, exits] = self._executor_of(plan, self._resolved[rows].threads, gate)
        return self._executors[rows, exits]

    def _executor_of(self, plan: Plan, threads: int, gate: Gate | None) -> Executor:
        modules = self._current_cut().modules
        watches, modules = self._watched(modules)
        lowered = {s.name: lower(self.resolved.backend, s, modules[s.name]) for s in plan.segments}
        return Executor(plan, lowered, threads=threads, gate=gate, watches=watches)

    def _watched(self, modules: Mapping[str, GraphModule]) -> tuple[dict[str, Watch], Mapping[str, GraphModule]]:
        """Segments that somebody observes return what is looked at, and hand copies of it to the observers."""
        made, places = self._current_cut(), {}
        for number, (where, _) in self._observers.items():
            places[number] = find(self.graph, made, where)
        watches, changed = {}, dict(modules)
        for name in dict.fromkeys(place.segment for found in places.values() for place in found):
            here = {number: [p for p in found if p.segment == name] for number, found in places.items()}
            extra = tuple(dict.fromkeys(p.node for found in here.values() for p in found if not p.written))
            changed[name] = with_outputs(modules[name], extra) if extra else modules[name]
            wanted = {number: [p.node for p in found] for number, found in here.items() if found}
            watches[name] = Watch(extra, partial(self._tell, wanted))
        return watches, changed

    def _tell(self, wanted: Mapping[int, Sequence[str]], rows: Sequence[int], values: Mapping[str, Tensor]) -> None:
        ids = [self._ids[row] for row in rows]
        for number, names in wanted.items():
            if number in self._observers:
                where, callback = self._observers[number]
                callback(Observation(where, ids, {name: values[name].cpu() for name in names}))

    def _count(self, outcome: Outcome) -> None:
        exits = self._plan(0).exits
        self._left = self._left if len(self._left) == len(exits) else [0.0] * len(exits)
        for index in range(len(exits)):
            self._left[index] += float((outcome.exit_N == index).sum())

    def _measured(self, plan: Plan, threads: int) -> float:
        """Seconds that a plan takes to answer one bucket, at the rates at which samples have left so far."""
        with contextlib.closing(
            self._executor_of(plan, threads, self._gate(False) if plan.exits else None)
        ) as executor:
            return expected_seconds(seconds_to_exits(executor), self._left or None)

    def _gate(self, exits: bool) -> Gate:
        kind, thresholds = self.config.fusion.confidence, self._built.thresholds

        def decide(exit_index: int, logits_RL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            probabilities_RL = gate.probabilities(logits_RL)
            confidence_R = gate.confidence(probabilities_RL, kind)
            if exit_index == len(thresholds):
                return probabilities_RL, confidence_R, torch.isfinite(confidence_R)
            leaves_R = gate.leaves(confidence_R, thresholds[exit_index])
            return probabilities_RL, confidence_R, leaves_R if exits else torch.zeros_like(leaves_R)

        return decide

    def _sample(self, given: Sample | Mapping[str, Any], number: int) -> Sample:
        if isinstance(given, Sample):
            return given
        if not isinstance(given, Mapping):
            raise InputError(
                f"sample {number} is a {type(given).__name__}: give a Sample, or a dict with image, text, …"
            )
        unknown = set(given) - {*MODALITIES, "id"}
        if unknown:
            raise InputError(
                f"sample {number} has {', '.join(sorted(map(str, unknown)))}: a sample has image, text, audio, id"
            )
        offered = {name: given[name] for name in MODALITIES if given.get(name) is not None}
        useless = [name for name in offered if name not in self._built.preparations]
        if useless and len(useless) == len(offered):
            raise InputError(f"sample {number} has only {', '.join(useless)}: this pipeline has no such encoder")
        return Sample(str(given.get("id", number)), offered)

    def close(self) -> None:
        """Give back what the pipeline holds; using it afterwards builds its segments again."""
        with self._lock:
            self._forget_plans()
            self._cut, self._cut_version = None, -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
