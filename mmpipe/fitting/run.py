"""`mmpipe fit`, from a request to the files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mmpipe.errors import InputError
from mmpipe.fitting import words
from mmpipe.fitting.embedding import Embedded, embed
from mmpipe.fitting.measuring import Measured, measure
from mmpipe.fitting.page import Told, render
from mmpipe.fitting.request import Request, check_counts
from mmpipe.fitting.splitting import Split, stratified
from mmpipe.fitting.training import fit
from mmpipe.fitting.writing import CONFIG, REPORT, write_config, write_head
from mmpipe.jobs.output import EMPTY, claimed, writing
from mmpipe.jobs.progress import Progress
from mmpipe.media import Listing
from mmpipe.types import Sample


def run_fit(request: Request, listing: Listing, progress: Progress, *, as_json: bool = False) -> Iterator[str]:
    """Fit and write; yields the lines to print. Nothing is written before all is done.

    Raises ConfigError, InputError, ModelError, OutputError; MmpipeError where the head can't be trained.
    """
    labels, folder = request.labels, request.output
    samples, notes = labelled(request, listing.samples)
    for note in (*request.notes, *notes):
        progress.say(f"note: {note}")
    labels_N = torch.tensor([labels.index(request.truth[sample.id]) for sample in samples])
    embedded = embed(request.config, samples, labels_N, progress)
    notes = [*request.notes, *notes, *_lost(embedded)]
    for note in _lost(embedded):
        progress.say(f"note: {note}")
    check_counts(labels, [labels[label] for label in embedded.items.labels_N.tolist()])
    split = stratified(embedded.items.labels_N, request.seed)
    progress.say(f"training on {len(split.training):,}, choosing by {len(split.validation):,}")
    fitted = fit(request.config, labels, embedded, split, seed=request.seed, epochs=request.epochs)
    measured = measure(fitted, embedded, split, labels, request.config.fusion.confidence)
    told = Told(request.config.source.name, labels, fitted, measured, split, embedded, request.seed, tuple(notes))
    with claimed(folder, EMPTY), writing(folder):
        write_head(folder, fitted, labels, embedded.dims)
        (folder / REPORT).write_text(render(told), encoding="utf-8")
        write_config(folder, request.config, fitted, labels, _worth(measured, split, request.seed))
    if as_json:
        yield json.dumps(words.as_json(measured), ensure_ascii=False)
        return
    yield words.summary(measured)
    yield f"\nwrote {folder}\nuse it: mmpipe run {folder / CONFIG} --input FOLDER\nreport: {folder / REPORT}"


def labelled(request: Request, samples: Sequence[Sample]) -> tuple[list[Sample], list[str]]:
    """The samples that have a label, at most `limit` drawn at random, in their order; and what is to be told.

    Raises InputError where the truth and the input have nothing in common.
    """
    found = [sample for sample in samples if sample.id in request.truth]
    strays = sorted(set(request.truth) - {sample.id for sample in samples})
    if not found:
        raise InputError(
            f"none of the {len(request.truth):,} labelled ids is in the input: the truth file has {strays[0]!r}, "
            f"the input {samples[0].id!r}"
        )
    notes = []
    if len(found) < len(samples):
        notes.append(f"{len(samples) - len(found):,} of {len(samples):,} samples have no label: left out")
    if strays:
        named = ", ".join(strays[:3]) + (", …" if len(strays) > 3 else "")
        notes.append(f"{len(strays):,} labels are of ids that the input doesn't have ({named}): left out")
    if request.limit is not None and request.limit < len(found):
        rows = np.random.default_rng([request.seed, 2]).choice(len(found), request.limit, replace=False)
        found = [found[int(row)] for row in np.sort(rows)]
    check_counts(request.labels, [request.truth[sample.id] for sample in found])
    return found, notes


def _lost(embedded: Embedded) -> list[str]:
    notes = [f"{n:,} {name} could not be used: their samples go by what else they have"
             for name, n in embedded.failed.items()]  # fmt: skip
    if embedded.unusable:
        notes.append(f"{embedded.unusable:,} labelled samples had nothing that could be used: left out")
    return notes


def _worth(measured: Measured, split: Split, seed: int) -> str:
    return (
        f"Trained on {len(split.training):,} samples, chosen by {len(split.validation):,}; on {len(split.test):,} "
        f"others, which had no part in either,\nit is right on {words.accuracy(measured.full)}, 95% interval. "
        f"Seed {seed}."
    )
