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
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch.fx import GraphModule

from mmpipe import media
from mmpipe.answers import FULL
from mmpipe.build import Built, build, not_bound
from mmpipe.calibrated import mismatch
from mmpipe.config import Config, load
from mmpipe.engine import Engine, Wish
from mmpipe.errors import InputError, ModelError
from mmpipe.fingerprints import fingerprints
from mmpipe.graphs.fuse import FusedGraph
from mmpipe.graphs.plan import HEAD, Plan
from mmpipe.jobs.auditing import audit_settings
from mmpipe.jobs.job import JobSettings, Summary, run_job
from mmpipe.jobs.output import refuse
from mmpipe.jobs.progress import Progress
from mmpipe.listing import find_samples, input_root
from mmpipe.loading import collector_paused, give_back_freed_memory
from mmpipe.machine import versions
from mmpipe.observing import Observer
from mmpipe.placing import device_of
from mmpipe.resolved import PLAIN, Kind, Resolved
from mmpipe.runners import Runners
from mmpipe.runtime.ledger import Outcome
from mmpipe.runtime.shard import Answered
from mmpipe.types import MODALITIES, Prediction, Sample
from mmpipe.workers import Done

_NOT_TOLD = ("reasons", "more_from")  # of what every `auto` became, in run.json
_SHARDS_A_TURN = 16  # of a list, in which nobody else uses the pipeline
_STREAM_BUCKETS = 4  # buckets that `stream` takes at a time: enough to fill the later stages' buckets


class Pipeline:
    """Encoders and a head as one graph, cut at its exits and ready to run. Made by `load`; close it, or use `with`.

    Several threads may call it; runs take turns.
    """

    def __init__(
        self, config: Config, *, say: Callable[[str], None] = lambda text: None, encoders_only: bool = False
    ) -> None:
        began = time.perf_counter()
        self.config = config
        self._device = device_of(config)  # first: what is not there is refused before models are loaded
        with collector_paused():
            self._built: Built = build(config, say=say, encoders_only=encoders_only)
        self._dims = {name: preparation.dim for name, preparation in self._built.preparations.items()}
        self._limits = media.Limits(**config.input.limits.model_dump())
        self._lock = threading.RLock()  # an observer may look at the pipeline that calls it
        self.runners = Runners(config, self._built, self._device)
        self._engine = Engine(config, self._built, self._limits, self.runners)
        self.runners.resolved()  # what does not fit is refused now
        if reason := self._not_calibrated_for():
            self._leave_exits_out(reason, say)
        give_back_freed_memory()
        self._build_seconds = time.perf_counter() - began

    def _not_calibrated_for(self) -> str:
        """Why the calibration's exits are left out, now that number type and backend are known; "": they stay."""
        calibration = self._built.calibration
        if calibration is None:
            return ""
        dtype, backends = self.resolved.dtype, [self.resolved.backend]
        why = mismatch(calibration, model=self._built.core, dtype=dtype, backends=backends, dtypes=self.dtypes)
        return not_bound(self.config, why) if why else ""

    def _leave_exits_out(self, why: str, say: Callable[[str], None] = lambda text: None) -> None:
        """Build anew without the calibration's exits."""
        self._engine.close()
        with collector_paused():
            self._built = build(self.config, say=say, without_exits=why)
        self.runners = Runners(self.config, self._built, self._device)
        self._engine = Engine(self.config, self._built, self._limits, self.runners)
        self.runners.resolved()

    def _proved(self, prove: Callable[[Runners], None]) -> None:
        """Through the parity gate: exits that were calibrated with a type that may not be used hold no more."""
        prove(self.runners)
        if why := self._not_calibrated_for():
            if self.runners.observers.any():  # they look at places of this graph
                raise ModelError(f"the calibration's exits do not hold: {why}; set runtime.dtype: float32")
            self._leave_exits_out(why)
            prove(self.runners)

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
        self._built.graph.write()  # another compiler may be about to look at its code
        return self._built.graph

    @property
    def plan(self) -> Plan:
        """Stages, segments, steps and buffers of the graph as it is now, scheduled for the configuration's bucket."""
        with self._lock:
            return self.runners.plan()

    @property
    def modules(self) -> Mapping[str, GraphModule]:
        """Each segment's part of the graph: inputs then reads → tuple of writes."""
        with self._lock:
            return self.runners.cut.modules

    @property
    def resolved(self) -> Resolved:
        """What every `auto` became, for batches, and why."""
        with self._lock:
            return self.runners.resolved()

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Encoder → the number type that it is computed in, for batches: a depth exit may part it into several."""
        found: dict[str, set[str]] = {}
        for segment in self.plan.segments:
            if segment.branch != HEAD:
                found.setdefault(segment.branch, set()).add(self.resolved.segments.get(segment.name, PLAIN).dtype)
        return {branch: "+".join(sorted(types)) for branch, types in found.items()}

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

    @property
    def limits(self) -> media.Limits:
        """What a medium may be at most."""
        return self._limits

    # --- predicting -------------------------------------------------------------------------------------------------

    def __call__(self, *, image: Any = None, text: Any = None, audio: Any = None, id: str = "sample") -> Prediction:
        """One sample. image, audio: a path, bytes, PIL image, array or tensor (sound: (samples, rate_hz)); text: the
        text itself, or a `Path` to a file.

        It runs a plan of its own, of one row unless `runtime.batch_size` says otherwise; the first call measures how
        one sample goes fastest. `predict`'s answers for the same sample agree within rounding.
        """
        sample = self._sample({"id": id, "image": image, "text": text, "audio": audio}, 0)
        return self.run([sample], kind="call")[0][0]

    def predict(self, samples: Iterable[Sample | Mapping[str, Any]]) -> list[Prediction]:
        """List in, list out, in order. A sample is a `Sample` or a mapping with any of image, text, audio, id.

        What can't be read becomes a Prediction with a status and a reason, never an exception.
        """
        found = [self._sample(sample, number) for number, sample in enumerate(samples)]
        answers: list[Prediction] = []
        if found:
            self._run_list(found, lambda samples, predictions, outcome: answers.extend(predictions))
        return answers

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
        numbers = itertools.count()

        def keep(samples: Sequence[Sample], predictions: list[Prediction], outcome: Outcome) -> None:
            for prediction in predictions:
                row = next(numbers)
                if prediction.embedding is not None:
                    rows[row] = prediction.embedding

        if found:
            self._run_list(found, keep, exits=False, embeddings=True)
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
        with self._lock:
            number = self.runners.observers.add(self.graph, self.runners.cut, where, callback)
            self.runners.forget_executors()
        try:
            yield
        finally:
            with self._lock:
                self.runners.observers.remove(number)
                self.runners.forget_executors()

    def settle(self, samples: Sequence[Sample]) -> None:
        """Decide how a job of these samples runs, before its first batch, and make ready for it: what only many
        samples win back is measured, and compiled for. Once a batch has run it stays as it is."""
        with self._lock:
            self._proved(lambda runners: runners.settle(samples, self._limits))

    def job_settings(self, samples: Sequence[Sample]) -> JobSettings:
        """Settles how these samples will run; what a folder job needs to know of it."""
        self.settle(samples)
        source, output = self.config.source, self.config.output
        exits = tuple(exit_.name for exit_ in self.plan.exits) or (FULL,)
        promised = self._built.max_disagreement
        return JobSettings(
            title=source.name or "mmpipe",
            dims=self._dims,
            labels=self.labels,
            exits=exits,
            shard_rows=output.shard_rows,
            max_failed=self.config.input.max_failed,
            thumbnails=output.thumbnails,
            limits=self._limits,
            resolved={name: value for name, value in asdict(self.resolved).items() if name not in _NOT_TOLD},
            versions=versions(),
            notes=(*self.notes, *self._backend_note()),
            build_seconds=self._build_seconds,
            audit=audit_settings(self.config.fusion.audit, promised, exits, self.resolved.batch_size),
        )

    def _backend_note(self) -> list[str]:
        """Where a backend that was asked for has nothing to compute."""
        asked, has = self.config.runtime.backend, self.resolved.backend
        if asked in ("auto", *has.split("+")):
            return []
        return [f"runtime.backend: {asked} computes nothing here, {has} does: {self.resolved.reasons['backend']}"]

    def fingerprints(self, samples: Sequence[Sample]) -> dict[str, str]:
        """Hashes of the model, of its numerics, and of a job over these samples."""
        found = fingerprints(self.config, self._built, self.resolved, self.plan, samples)
        with self._lock:
            self.runners.give_back_weights("batch")
        return found

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
        kind: Kind = "batch",
        cached: bool = True,
        deliberate: bool | None = None,
        answered: Answered = lambda count: None,
    ) -> tuple[list[Prediction], Outcome]:
        """One shard: predictions in order, and the trace of the run, of each row's first look. `answered` is told of
        progress.

        `kind`: which of the pipeline's plans runs it. `deliberate` None: as configured where exits are on; without
        exits it is the full pipeline, which looks once. `cached` False: all is computed, whatever is known.
        """
        wish = Wish(kind=kind, exits=exits, cached=cached, deliberate=deliberate, embeddings=embeddings)
        with self._lock:
            if kind == "call":
                self.runners.called()
            self._proved(lambda runners: runners.prove(kind, samples, self._limits))
            return self._engine.run(samples, wish, answered)

    def run_shards(
        self,
        shards: Sequence[Sequence[Sample]],
        done: Done,
        *,
        exits: bool = True,
        embeddings: bool | None = None,
        deliberate: bool | None = None,
        alone: bool = False,
        answered: Answered = lambda count: None,
    ) -> None:
        """As `run` for one shard after the other, but the next one begins before the last has ended, and several
        processes may share them (not if `alone`). `done` gets each (samples, predictions, outcome) when it has been
        answered, in order; it must not use the pipeline."""
        wish = Wish(exits=exits, deliberate=deliberate, embeddings=embeddings, alone=alone)
        with self._lock:
            if shards:
                first = shards[0]
                self._proved(lambda runners: runners.prove("batch", first, self._limits))
            self._engine.run_shards(shards, wish, done, answered)

    def _run_list(
        self, samples: Sequence[Sample], done: Done, *, exits: bool = True, embeddings: bool | None = None
    ) -> None:
        """Some shards at a time, so that other threads come to their turn too."""
        self.settle(samples)
        size = self.config.output.shard_rows
        alone = any(_is_open(medium) for sample in samples for medium in sample.media.values())
        for first in range(0, len(samples), _SHARDS_A_TURN * size):
            last = min(len(samples), first + _SHARDS_A_TURN * size)
            shards = [samples[start : min(last, start + size)] for start in range(first, last, size)]
            self.run_shards(shards, done, exits=exits, embeddings=embeddings, alone=alone)

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
        named = given.get("id")
        return Sample(str(number if named is None else named), offered)

    def close(self) -> None:
        """Give back what the pipeline holds; using it afterwards builds its segments again."""
        with self._lock:
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _is_open(medium: Any) -> bool:
    """Whether it is read from a file that is open: two processes would move one position in it."""
    return hasattr(medium, "read") or getattr(medium, "fp", None) is not None  # PIL opens now, and reads later
