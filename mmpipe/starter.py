"""A configuration for a folder as it is found: what `mmpipe init` writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mmpipe import media
from mmpipe.errors import InputError, OutputError
from mmpipe.types import MODALITIES

NAME = "mmpipe.yaml"

_MODELS = {
    "image": '{model: "open_clip:ViT-B-32/laion2b_s34b_b79k"}      # pip install "mmpipe[open_clip]"',
    "text": '{model: "hf:sentence-transformers/all-MiniLM-L6-v2", max_tokens: 64}  # pip install "mmpipe[hf]"',
    "audio": '{model: "hf:laion/clap-htsat-unfused", max_seconds: 10}  # hears sounds, not words; "mmpipe[hf]"',
}
_PROMPTS = {"image": '["a photo of a {}"]', "text": '["{}"]', "audio": '["the sound of a {}"]'}


def write_starter(folder: Path, output: Path | None, *, force: bool) -> tuple[Path, media.Listing, Sequence[str]]:
    """Write a YAML for `folder`: (its path, what it finds there, the modalities).

    Chooses how files pair up by what makes the most complete items. Raises InputError, OutputError.
    """
    path = output if output is not None else folder / NAME
    if path.exists() and not force:
        raise OutputError(f"{path} exists: give --output, or --force to replace it")
    pair_by, multiple, listing = _best(folder)
    modalities = [modality for modality in MODALITIES if listing.counts.get(modality)]
    text = _yaml(folder, path, pair_by, multiple, listing, modalities)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}") from error
    return path, listing, modalities


def _best(folder: Path) -> tuple[str, str, media.Listing]:
    """The pairing with the most modalities per item; one that needs no choice among files, where there is one."""
    found: list[tuple[float, int, str, str, media.Listing]] = []
    problem: InputError | None = None
    for pair_by in ("stem", "folder"):
        for multiple in ("error", "first"):
            try:
                listing = media.find(folder, pair_by=pair_by, multiple=multiple)
            except InputError as error:
                problem = problem or error
                continue
            per_item = sum(listing.counts.values()) / len(listing.samples)
            used = sum(listing.counts.values()) - (len(listing.unmatched) if multiple == "first" else 0)
            found.append((per_item if multiple == "error" else per_item - 1, used, pair_by, multiple, listing))
            break
    if not found:
        assert problem is not None
        raise problem
    _, _, pair_by, multiple, listing = max(found, key=lambda entry: entry[:2])
    return pair_by, multiple, listing


def _yaml(
    folder: Path, path: Path, pair_by: str, multiple: str, listing: media.Listing, modalities: Sequence[str]
) -> str:
    relative = os.path.relpath(folder.absolute(), path.absolute().parent)
    has = ", ".join(f"{listing.counts[modality]} {modality}" for modality in modalities)
    encoders = "\n".join(f"  {modality}: {_MODELS[modality]}" for modality in modalities)
    prompts = "\n".join(f"    {modality}: {{prompts: {_PROMPTS[modality]}}}" for modality in modalities)
    quoted = '"' + relative.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"""\
# {len(listing.samples)} items: {has}.
# mmpipe check {path.name} shows how files pair up; every key is in docs/configuration.md.

task: classify
labels: [first label, second label]   # yours: a word or two each, as one would say them

encoders:
{encoders}

fusion:
  head: zero_shot                     # compares each item with the labels, in these sentences
  modalities:
{prompts}

input:
  folder: {quoted}
  pair_by: {pair_by}{"                        # a/1.jpg and a/1.txt are one item" if pair_by == "stem" else ""}
  multiple: {multiple}

output: {{folder: out/{path.stem}}}
"""
