"""`mmpipe calibrate`, from a request to the file and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from mmpipe import Pipeline
from mmpipe.calibrated import SecondLook, write_calibration
from mmpipe.calibrating import words
from mmpipe.calibrating.certifying import Result, calibrate
from mmpipe.calibrating.page import write_page
from mmpipe.calibrating.request import Request
from mmpipe.calibrating.scores import Scores, check_known, read_scores, with_truth
from mmpipe.calibrating.second_look import try_second_look
from mmpipe.calibrating.shadow import chosen, shadow
from mmpipe.errors import ConfigError, OutputError
from mmpipe.jobs.progress import Progress
from mmpipe.media import Listing


def run_calibrate(request: Request, listing: Listing | None, progress: Progress) -> Iterator[str]:
    """Calibrate and write; yields the lines to print. `listing` None: on the packaged held-out scores.

    Raises ConfigError, InputError, ModelError, OutputError.
    """
    config = request.config
    with Pipeline(config, say=progress.say) as pipeline:
        if listing is None:
            path = request.packaged_scores(None)
            assert path is not None
            scores = _held_out(path, pipeline, progress.say)
        else:
            scores = _scores(request, listing, pipeline, progress)
    result = calibrate(
        scores,
        max_disagreement=request.max_disagreement,
        certainty=request.certainty,
        confidence=config.fusion.confidence,
    )
    _write(request, result)
    if listing is not None and request.truth is not None and config.fusion.deliberate is not None:
        tried = _second_look(request, listing, request.truth, progress)
        result = replace(result, calibration=result.calibration.model_copy(update={"second_look": tried}))
        _write(request, result)
    write_page(request.report, result, config.source.name)
    yield words.summary(result)
    yield f"\nwrote {request.output} and {request.report}"
    if result.calibration.promise is not None:
        yield f"use it: fusion.calibration: {request.output.name}, or --set fusion.calibration={request.output}"


def _write(request: Request, result: Result) -> None:
    try:
        write_calibration(request.output, result.calibration)
    except OSError as error:
        raise OutputError(f"{request.output}: {error.strerror or error}") from error


def _second_look(request: Request, listing: Listing, truth: Mapping[str, str], progress: Progress) -> SecondLook:
    """With the temperatures that were just found: they say who is unsure."""
    fusion = request.config.fusion.model_copy(update={"calibration": str(request.output.absolute())})
    samples = chosen(listing.samples, request.limit)
    progress.start(sum(sample.id in truth for sample in samples), "looking again")
    try:
        with Pipeline(request.config.model_copy(update={"fusion": fusion}), say=progress.say) as pipeline:
            return try_second_look(pipeline, samples, truth, certainty=request.certainty, advance=progress.advance)
    finally:
        progress.finish()


def _scores(request: Request, listing: Listing, pipeline: Pipeline, progress: Progress) -> Scores:
    samples = chosen(listing.samples, request.limit)
    if request.truth is not None:
        check_known([sample.id for sample in samples], request.truth)
    progress.start(len(samples), "computing in full")
    try:
        scores, ids = shadow(pipeline, samples, advance=progress.advance)
    finally:
        progress.finish()
    return scores if request.truth is None else with_truth(scores, ids, request.truth)


def _held_out(path: Path, pipeline: Pipeline, say: Callable[[str], None]) -> Scores:
    """The packaged scores, if they are of this very model: `auto` is then what they are of."""
    scores, runtime = read_scores(path), pipeline.config.runtime
    configured = runtime.dtype in ("auto", scores.dtype) and runtime.backend in ("auto", *scores.backends)
    if scores.model != pipeline.built.core or not configured:
        raise ConfigError(
            f"{path.name} holds the scores of another model, number type or backend",
            where=path.name,
            hint="give --input PATH: a folder or manifest to calibrate on",
        )
    say(f"calibrating on {scores.count:,} packaged held-out items; --input PATH takes your own")
    return scores
