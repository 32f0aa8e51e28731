"""The folder job: samples in, one row each out, shard by shard; then run.json and the report.

listing ─► shard of samples ─► Engine.run ─► predictions ─► part-NNNNN.parquet ─► tally
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from mmpipe.errors import Interrupted
from mmpipe.jobs import shards
from mmpipe.jobs.output import claimed, writing
from mmpipe.jobs.progress import Progress, Silent
from mmpipe.jobs.report import write_report
from mmpipe.jobs.tally import Tally
from mmpipe.media import Limits, Listing
from mmpipe.runtime.executor import Outcome
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


class Engine(Protocol):
    """What runs samples: the pipeline."""

    def job_settings(self) -> JobSettings: ...

    def fingerprints(self, samples: Sequence[Sample]) -> Mapping[str, str]: ...

    def run(
        self, samples: Sequence[Sample], *, answered: Callable[[int], None] = ...
    ) -> tuple[list[Prediction], Outcome]: ...


@dataclass(frozen=True)
class Summary:
    """How a job ended. `run` is the content of run.json."""

    folder: Path
    run: Mapping[str, Any]
    tally: Tally
    max_failed: float

    def exit_code(self, *, strict: bool = False) -> int:
        """0 done; 3 more rows failed than allowed (strict: any failed or partial)."""
        failed, partial = self.tally.status["failed"], self.tally.status["partial"]
        too_many = failed + partial > 0 if strict else failed > self.max_failed * self.tally.rows
        return 3 if too_many else 0


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

    Raises OutputError, and Interrupted at Ctrl-C or SIGTERM: whole shards, run.json and the report stay.
    """
    progress = progress or Silent()
    settings = engine.job_settings()
    samples = listing.samples[:limit]
    columns = shards.schema(settings.dims, len(settings.labels), listing.keep_types)
    tally = Tally(settings.labels, settings.exits, tuple(settings.dims))
    tally.spend("fuse", settings.build_seconds)
    began = time.perf_counter()
    with claimed(folder, mode):
        fingerprints = engine.fingerprints(samples)
        interrupted: Interrupted | None = None
        progress.start(len(samples), "predicting")
        try:
            with _signals():
                for number, start in enumerate(range(0, len(samples), settings.shard_rows)):
                    shard = samples[start : start + settings.shard_rows]
                    predictions, outcome = engine.run(shard, answered=progress.advance)
                    clock = time.perf_counter()
                    with writing(folder):
                        shards.write_shard(folder / shards.FOLDER, number, shards.table(predictions, columns))
                    tally.spend("write", time.perf_counter() - clock)
                    tally.add(shard, predictions, outcome)
        except Interrupted as error:
            interrupted = error
        finally:
            progress.finish()
        seconds = time.perf_counter() - began
        run = _run_json(settings, tally, fingerprints, seconds, interrupted is not None)
        with writing(folder):
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
    if interrupted is not None:
        raise interrupted
    return Summary(folder, run, tally, settings.max_failed)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise Interrupted, once; later ones are ignored until what is under way has been closed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; its owner decides
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_json(
    settings: JobSettings, tally: Tally, fingerprints: Mapping[str, str], seconds: float, interrupted: bool
) -> dict[str, Any]:
    spent = dict(tally.seconds)
    parts = {
        name: round(spent.pop(name, 0.0), 4) for name in ("decode", "waiting", "fuse", "write")
    }  # decode: core-seconds on the workers; waiting: the model's, for media; fuse: load, capture, fuse, cut
    return {
        "rows": tally.rows,
        "status": {name: tally.status[name] for name in ("ok", "partial", "failed")},
        "answered_by": {name: tally.answered_by[name] for name in settings.exits},
        "files_opened": {name: tally.files_opened[name] for name in settings.dims},
        "items_per_second": round(tally.rows / seconds, 3) if seconds else 0.0,
        "seconds": {
            "total": round(seconds, 4),
            **parts,
            "segments": {name: round(value, 4) for name, value in sorted(spent.items())},
        },
        "errors": dict(tally.errors.most_common()),
        "interrupted": interrupted,
        "resolved": dict(settings.resolved),
        "fingerprints": dict(fingerprints),
        "versions": dict(settings.versions),
        "notes": list(settings.notes),
    }
