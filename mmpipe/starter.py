"""A configuration for a folder as it is found: what `mmpipe init` writes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mmpipe import media
from mmpipe.errors import InputError, OutputError
from mmpipe.jobs.progress import visible
from mmpipe.media.manifest import MANIFEST_SUFFIXES
from mmpipe.types import MODALITIES

NAME = "mmpipe.yaml"
BLANK_LABELS = ("first label", "second label")  # what a user has to replace
_LABELS = range(2, 51)  # folders that are taken for classes
_READMES = ("readme", "license", "licence", "changelog", "copying")

_MODELS = {
    "image": '{model: "open_clip:ViT-B-32/laion2b_s34b_b79k"}      # pip install "mmpipe[open_clip]"',
    "text": '{model: "hf:sentence-transformers/all-MiniLM-L6-v2", max_tokens: 64}  # pip install "mmpipe[hf]"',
    "audio": '{model: "hf:laion/clap-htsat-unfused", max_seconds: 10}  # hears sounds, not words; "mmpipe[hf]"',
}
_PROMPTS = {"image": '["a photo of a {}"]', "text": '["{}"]', "audio": '["the sound of a {}"]'}


@dataclass(frozen=True)
class Pairing:
    """How files become items, and what that finds."""

    listing: media.Listing
    pair_by: str = "stem"
    multiple: str = "error"
    pattern: Mapping[str, str] = field(default_factory=dict)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(modality for modality in MODALITIES if self.listing.counts.get(modality))

    @property
    def per_item(self) -> float:
        """Modalities an item has, in the mean."""
        return sum(self.listing.counts.values()) / len(self.listing.samples)

    @property
    def share_used(self) -> float:
        """Of the media files: those that are in an item."""
        known = {suffix for suffixes in media.SUFFIXES.values() for suffix in suffixes}
        left = sum(
            PurePosixPath(path).suffix.lower() in known for path, reason in self.listing.unmatched if reason != "hidden"
        )
        used = sum(self.listing.counts.values())
        return used / (used + left)


@dataclass(frozen=True)
class Starter:
    """What `init` wrote, what the folder holds by it, and what to know about that."""

    path: Path
    pairing: Pairing
    notes: tuple[str, ...]


def write_starter(folder: Path, output: Path | None, *, force: bool) -> Starter:
    """Write a YAML for `folder`, paired in the way that makes the most complete items; opens no medium.

    Raises InputError where there is nothing to pair, OutputError where the YAML can't be written.
    """
    path = output if output is not None else folder / NAME
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path} exists: give --output, or --force to replace it")
    pairing = _best(folder)
    labels = _folder_labels(pairing)
    text = _yaml(folder, path, pairing, labels)
    try:
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"{path} can't be written: {reason}") from error
    return Starter(path, pairing, tuple(_notes(folder, pairing, labels)))


def _best(folder: Path) -> Pairing:
    """The pairing with the most modalities per item that leaves few files out."""
    found: list[Pairing] = []
    problem: InputError | None = None
    for pair_by in ("stem", "folder"):
        for multiple in ("error", "first"):
            try:
                found.append(Pairing(media.find(folder, pair_by=pair_by, multiple=multiple), pair_by, multiple))
                break
            except InputError as error:
                problem = problem or error
    if not found:
        assert problem is not None
        raise problem
    pattern = _folder_of_each(found[0]) if found[0].pair_by == "stem" else {}
    if pattern:
        found.append(Pairing(media.find(folder, pattern=pattern, multiple="first"), pattern=pattern))

    return max(found, key=lambda pairing: pairing.per_item * pairing.share_used)


def _folder_of_each(by_stem: Pairing) -> dict[str, str]:
    """photos/1.jpg with texts/1.txt: a pattern for each modality, where each has one folder to itself; else nothing."""
    folders: dict[str, set[str]] = {}
    for sample in by_stem.listing.samples:
        parent = sample.id.rpartition("/")[0]
        for modality in sample.media:
            folders.setdefault(modality, set()).add(parent)
        if len(sample.media) > 1 or not parent:
            return {}
    alone = len(folders) > 1 and all(len(parents) == 1 for parents in folders.values())
    if not alone or len(set.union(*folders.values())) < len(folders):
        return {}
    return {modality: f"{_literal(next(iter(parents)))}/{{id}}.*" for modality, parents in folders.items()}


def _literal(path: str) -> str:
    """A path as a glob that stands for itself."""
    return "".join(f"[{mark}]" if mark in "*?[" else mark for mark in path)


def _folder_labels(pairing: Pairing) -> list[str]:
    """cats/1.jpg, dogs/1.jpg: the names of the folders, where they look like classes."""
    if pairing.pair_by != "stem" or pairing.pattern:
        return []
    holds: dict[str, set[str]] = {}
    for sample in pairing.listing.samples:
        holds.setdefault(PurePosixPath(sample.id).parts[0] if "/" in sample.id else "", set()).update(sample.media)
    parents = set(holds)
    if all(len(kinds) == 1 for kinds in holds.values()) and len(set.union(*holds.values())) > 1:
        return []  # photos/ and texts/ are kinds of media
    labels = sorted({" ".join(name.replace("_", " ").replace("-", " ").split()) for name in parents})
    items = sum("/" in sample.id for sample in pairing.listing.samples)
    return labels if "" not in labels and len(labels) in _LABELS and items > len(labels) else []


def _notes(folder: Path, pairing: Pairing, labels: Sequence[str]) -> list[str]:
    notes = []
    if labels:
        notes.append(f"labels: the names of the {len(labels)} folders; change them if they are no classes")
    if pairing.multiple == "first":
        count = sum("already has the" in reason for _, reason in pairing.listing.unmatched)
        notes.append(
            f"{count:,} files are left out: their items have another of the kind, first by name (multiple: first)"
        )
    readmes = [
        s.id for s in pairing.listing.samples if s.id.rpartition("/")[2].lower() in _READMES and len(s.media) == 1
    ]
    if readmes:
        notes.append(f"{', '.join(readmes[:3])} would be read as a text like any other: move it out of the folder")
    tables = [path for path, _ in pairing.listing.unmatched if PurePosixPath(path).suffix.lower() in MANIFEST_SUFFIXES]
    tables = [path for path in tables if not path.startswith(".") and "/predictions/part-" not in f"/{path}"]
    if tables:
        where = os.path.join(folder, tables[0])
        notes.append(
            f"{tables[0]} may be a table of the items: to read that instead, mmpipe check CONFIG --input {where}"
        )
    return notes


def _yaml(folder: Path, path: Path, pairing: Pairing, labels: Sequence[str]) -> str:
    relative = os.path.relpath(folder.absolute(), path.absolute().parent)
    modalities = pairing.modalities
    has = ", ".join(f"{pairing.listing.counts[modality]:,} {modality}" for modality in modalities)
    encoders = "\n".join(f"  {modality}: {_MODELS[modality]}" for modality in modalities)
    prompts = "\n".join(f"    {modality}: {{prompts: {_PROMPTS[modality]}}}" for modality in modalities)
    if pairing.pattern:
        globs = "\n".join(f"    {modality}: {_quoted(glob)}" for modality, glob in pairing.pattern.items())
        pairs = f"  pattern:                            # files with the same {{id}} are one item\n{globs}"
    else:
        example = {
            "stem": "# a/1.jpg and a/1.txt are one item",
            "folder": "# all files of one folder are one item",
        }
        pairs = f"  pair_by: {pairing.pair_by:<26} {example[pairing.pair_by]}"
    multiple = (
        "\n  multiple: first                     # of several pictures (texts, sounds) of an item, the first by name"
        if pairing.multiple == "first"
        else ""
    )
    given = f"labels: [{', '.join(map(_quoted, labels))}]   # the names of the folders"
    blank = f"labels: [{', '.join(BLANK_LABELS)}]   # yours: a word or two each, as one would say them"
    return f"""\
# {len(pairing.listing.samples):,} items: {has}.
# `mmpipe check` with this file shows how the folder's files pair up; every key is in docs/configuration.md.

task: classify
{given if labels else blank}

encoders:
{encoders}

fusion:
  head: zero_shot                     # compares each item with the labels, in these sentences; `mmpipe fit` trains one
  modalities:
{prompts}

input:
  folder: {_quoted(relative)}
{pairs}{multiple}

output:
  folder: {_quoted(_output(folder))}  # relative to where mmpipe is run; must not be inside the input folder
"""


def _output(folder: Path) -> str:
    """out/NAME, unless that would be inside the folder."""
    name = folder.resolve().name or "media"
    if Path.cwd().is_relative_to(folder.resolve()):
        return os.path.relpath(folder.resolve().parent / "out" / name)
    return f"out/{name}"


def _quoted(text: str) -> str:
    """A YAML scalar in double quotes, whatever is in the text."""
    return '"' + "".join(_escaped(mark) for mark in text) + '"'


def _escaped(mark: str) -> str:
    if mark in '"\\':
        return f"\\{mark}"
    if visible(mark) == mark:
        return mark
    code = ord(mark)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
