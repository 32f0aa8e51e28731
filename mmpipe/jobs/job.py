"""The folder job: samples in, one row each out, shard by shard; then run.json and the report.

listing ─► shard of samples ─► Engine.run ─► predictions ─► part-NNNNN.parquet ─► tally
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from mmpipe.errors import InputError, Interrupted, MmpipeError
from mmpipe.jobs import shards
from mmpipe.jobs.auditing import Auditor, AuditSettings, Chosen
from mmpipe.jobs.output import claimed, writing
from mmpipe.jobs.progress import Progress, Silent
from mmpipe.jobs.report import write_report
from mmpipe.jobs.tally import Tally
from mmpipe.jobs.worth import worth_of
from mmpipe.loading import collector_spared
from mmpipe.media import Limits, Listing
from mmpipe.runtime.ledger import Outcome
from mmpipe.types import Prediction, Sample


@dataclass(frozen=True)
class JobSettings:
    """What a job needs to know of a configuration."""

    title: str
    dims: Mapping[str, int]  # modality → embedding size, in encoder order
    labels: tuple[str, ...]
    exits: tuple[str, ...]
    shard_rows: int
    max_failed: float  # share of rows
    thumbnails: bool
    limits: Limits
    resolved: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: tuple[str, ...]
    build_seconds: float
    audit: AuditSettings | None = None


class Engine(Protocol):
    """What runs samples: the pipeline."""

    def job_settings(self, samples: Sequence[Sample]) -> JobSettings: ...

    def fingerprints(self, samples: Sequence[Sample]) -> Mapping[str, str]: ...

    def run(self, samples: Sequence[Sample], *, exits: bool = ...) -> tuple[list[Prediction], Outcome]: ...

    def run_shards(
        self,
        shards: Sequence[Sequence[Sample]],
        done: Callable[[Sequence[Sample], list[Prediction], Outcome], None],
        *,
        exits: bool = ...,
        deliberate: bool | None = ...,
        answered: Callable[[int], None] = ...,
    ) -> None: ...


@dataclass(frozen=True)
class Summary:
    """How a job ended. `run` is the content of run.json."""

    folder: Path
    run: Mapping[str, Any]
    tally: Tally
    max_failed: float
    limits: Limits = Limits()  # noqa: RUF009 - frozen

    def exit_code(self, *, strict: bool = False) -> int:
        """0 done; 3 more rows failed than allowed (strict: any failed or partial)."""
        failed, partial = self.tally.status["failed"], self.tally.status["partial"]
        # the nearest number to 29 of 100 is that to 29%; to 29% times 100 it is not 29
        too_many = failed + partial > 0 if strict else failed / max(self.tally.rows, 1) > self.max_failed
        return 3 if too_many else 0

    def verdict(self, *, strict: bool = False) -> str:
        """Exit code 3 in words."""
        failed, partial = self.tally.status["failed"], self.tally.status["partial"]
        if strict:
            return f"{failed:,} failed, {partial:,} partial, and --strict allows none"
        return (
            f"{failed:,} of {self.tally.rows:,} failed, more than input.max_failed allows ({self.max_failed:.4g}); "
            "all rows are written; --set input.max_failed=100% allows any number"
        )


def run_job(
    engine: Engine,
    listing: Listing,
    folder: Path,
    *,
    mode: str = "new",
    limit: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Run the samples of `listing` (the first `limit`) into `folder`.

    Raises InputError for a limit below 1; OutputError; Interrupted at Ctrl-C or SIGTERM; MmpipeError where a model or
    the disk fails. However it ends, whole shards stay, and run.json and the report tell of them.
    """
    progress = progress or Silent()
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: give how many samples to run, 1 or more")
    samples = listing.samples[:limit]
    began, cores = time.perf_counter(), _core_seconds()  # what is measured before the first sample is the job's too
    settings = engine.job_settings(samples)
    columns = shards.schema(settings.dims, len(settings.labels), listing.keep_types)
    tally = Tally(settings.labels, settings.exits, tuple(settings.dims))
    tally.spend("fuse", settings.build_seconds)
    audit: Auditor | None = None
    if settings.audit is not None:
        audit = Auditor(settings.audit, lambda chosen: engine.run(chosen, exits=False)[0], progress.say)
    with claimed(folder, mode), _Signals() as signals:
        fingerprints = engine.fingerprints(samples)
        stopped: MmpipeError | None = None
        numbers = itertools.count()

        def commit(shard: Sequence[Sample], predictions: list[Prediction], outcome: Outcome) -> None:
            clock = time.perf_counter()
            with signals.held():
                with writing(folder):
                    shards.write_shard(folder / shards.FOLDER, next(numbers), shards.table(predictions, columns))
                tally.spend("write", time.perf_counter() - clock)
                tally.add(shard, predictions, outcome)

        progress.start(len(samples), "predicting")
        size = settings.shard_rows
        whole = [samples[start : start + size] for start in range(0, len(samples), size)]
        try:
            with signals.raised(), collector_spared():
                if audit is None:
                    engine.run_shards(whole, commit, answered=progress.advance)
                else:
                    _run_audited(engine, whole, audit, commit, progress.advance)
        except MmpipeError as error:
            stopped = error
        except MemoryError as error:
            stopped = MmpipeError("out of memory: a smaller output.shard_rows or runtime.batch_size needs less")
            stopped.__cause__ = error
        finally:
            progress.finish()
        seconds = {"total": time.perf_counter() - began, "cpu": _core_seconds() - cores}
        run = _run_json(settings, tally, fingerprints, seconds, stopped, audit)
        # A disk that is full stays full: what stopped the job is then what to tell.
        with contextlib.suppress(MmpipeError) if stopped else contextlib.nullcontext(), writing(folder):
            with shards.replacing(folder / "run.json") as temporary:
                temporary.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            write_report(
                folder / "report.html",
                tally,
                run,
                title=settings.title,
                thumbnails=settings.thumbnails,
                limits=settings.limits,
            )
    if stopped is not None:
        raise stopped
    return Summary(folder, run, tally, settings.max_failed, settings.limits)


def _run_audited(
    engine: Engine,
    whole: Sequence[Sequence[Sample]],
    audit: Auditor,
    commit: Callable[[Sequence[Sample], list[Prediction], Outcome], None],
    answered: Callable[[int], None],
) -> None:
    """A few shards at a time, each audited when the last of them is committed: exits that are switched off then are so
    from the same shard on, whatever ran beside what."""
    count = audit.settings.shards_a_look(len(whole[0]) if whole else 1)
    for first in range(0, len(whole), count):
        seen: list[list[Chosen]] = []

        def commit_and_choose(
            shard: Sequence[Sample],
            predictions: list[Prediction],
            outcome: Outcome,
            seen: list[list[Chosen]] = seen,
        ) -> None:
            commit(shard, predictions, outcome)
            seen.append(audit.choose(shard, predictions))

        engine.run_shards(
            whole[first : first + count], commit_and_choose, exits=audit.exits, deliberate=True, answered=answered
        )
        for chosen in seen:
            audit.look(chosen)
    audit.finish()


def _core_seconds() -> float:
    """Of this process, and of those that it has waited for."""
    return sum(os.times()[:4])


class _Signals:
    """Ctrl-C and SIGTERM. Within `raised()` they raise Interrupted; elsewhere (a shard is being committed, the report
    written) they are remembered until `raised()` begins again."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._raises = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # nohup, or a handler that isn't Python's
                    self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *rest: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        if self._raises:
            raise Interrupted(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within `raised()`: what must not be torn. A signal that comes meanwhile raises afterwards."""
        before, self._raises = self._raises, False
        try:
            yield
        finally:
            self._raises = before
        if before and self._number is not None:
            raise Interrupted(self._number)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        try:
            self._raises = True
            if self._number is not None:
                raise Interrupted(self._number)
            yield
        finally:
            self._raises = False


def _run_json(
    settings: JobSettings,
    tally: Tally,
    fingerprints: Mapping[str, str],
    seconds: Mapping[str, float],
    stopped: MmpipeError | None,
    audit: Auditor | None,
) -> dict[str, Any]:
    spent = dict(tally.seconds)
    again = spent.pop("deliberating", 0.0)  # its segments are counted with the others
    # cpu: of all threads of this process, and of those that computed beside it; decode: core-seconds on the workers;
    # waiting: the models', for media; fuse: load, capture, fuse, cut
    parts = {name: round(spent.pop(name, 0.0), 4) for name in ("decode", "waiting", "fuse", "write")}
    worth, bucket = worth_of(tally), int(settings.resolved["batch_size"])
    return {
        "rows": tally.rows,
        "status": {name: tally.status[name] for name in ("ok", "partial", "failed")},
        "answered_by": {name: tally.answered_by[name] for name in settings.exits},
        "files_opened": {name: tally.files_opened[name] for name in settings.dims},
        "cache": {
            "hits": {name: tally.recalled[name] for name in settings.dims},
            "misses": {name: tally.missed[name] for name in settings.dims},
        },
        "items_per_second": round(tally.rows / seconds["total"], 3) if seconds["total"] else 0.0,
        "seconds": {
            **{name: round(value, 4) for name, value in seconds.items()},
            **parts,
            "segments": {name: round(value, 4) for name, value in sorted(spent.items())},
        },
        "buckets": {
            name: {"count": count, "fill": round(tally.in_buckets[name] / (count * bucket), 4)}
            for name, count in sorted(tally.buckets.items())
        },
        "exits": None if worth is None else worth.report(),
        "deliberated": {"rows": tally.deliberated, "changed": tally.changed, "seconds": round(again, 4)},
        "audit": None if audit is None else audit.report(),
        "errors": dict(tally.errors.most_common()),
        "interrupted": isinstance(stopped, Interrupted),
        "stopped": str(stopped) if stopped else None,  # why not all samples have a row
        "resolved": dict(settings.resolved),
        "fingerprints": dict(fingerprints),
        "versions": dict(settings.versions),
        "notes": [
            *settings.notes,
            *(audit.notes if audit is not None else ()),
            *tally.notes,
            *([worth.note()] if worth is not None and not worth.pays else ()),
        ],
    }
