"""A folder, or a manifest, → samples. Files are paired by name alone; none is opened.

Every file of a folder ends either in one sample or in `unmatched`, with the reason why.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from mmpipe.errors import InputError
from mmpipe.media.manifest import read_manifest
from mmpipe.media.pattern import Matcher
from mmpipe.media.rows import Place, Rows, place, whole
from mmpipe.media.walk import printable, walk
from mmpipe.types import MODALITIES, Sample

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
    "text": (".txt", ".md"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".aif"),
}
_MODALITY_OF = {suffix: modality for modality, suffixes in SUFFIXES.items() for suffix in suffixes}

_NAMED_FILES = 5  # how many an error names before it only counts


class Samples(Sequence[Sample]):
    """The samples, each made when it is asked for: a listing of a million files holds their packed names, no more."""

    def __init__(
        self,
        root: Path,
        rows: Rows,
        modalities: Sequence[str],
        keep: Sequence[str] = (),
        *,
        text_inline: bool = False,
    ) -> None:
        self._root, self._rows, self._modalities, self._keep = root, rows, tuple(modalities), tuple(keep)
        self._text_inline = text_inline

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return Samples(self._root, self._rows[index], self._modalities, self._keep, text_inline=self._text_inline)
        sample_id, values, kept = self._rows[index]
        media = {
            modality: value if modality == "text" and self._text_inline else self._root / value
            for modality, value in zip(self._modalities, values, strict=True)
            if value is not None
        }
        return Sample(sample_id, media, dict(zip(self._keep, kept, strict=True)))


@dataclass(frozen=True)
class Listing:
    """What was found.

    samples: media are absolute `Path`s; a manifest's text is a `str`.
    unmatched: (path relative to the folder, reason) of what is in no sample. A folder that wasn't entered ends in "/".
    counts: samples that have each modality, of those asked for. combinations: samples for each exact set, "image+text";
    "" is a manifest row without any.
    keep_types: the Arrow type of each kept manifest column.
    """

    samples: Sequence[Sample]
    unmatched: tuple[tuple[str, str], ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    combinations: Mapping[str, int] = field(default_factory=dict)
    keep_types: Mapping[str, Any] = field(default_factory=dict)


def find(
    folder: str | Path | None,
    *,
    pair_by: str = "stem",
    pattern: Mapping[str, str] | None = None,
    manifest: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    multiple: str = "error",
    modalities: Sequence[str] = MODALITIES,
) -> Listing:
    """The samples of a folder in bytewise order of their ids, or of a manifest in its own order.

    pair_by "stem": a/b/4711.jpg, a/b/4711.txt and a/b/4711.wav are the item "a/b/4711". "folder": 4711/photo.jpg and
    4711/title.txt are the item "4711"; files directly in `folder` belong to none.
    pattern (replaces pair_by): modality → glob with one {id}, such as "{id}/photo*.jpg"; see `pattern.Matcher`.
    manifest (replaces folder): see `manifest.read_manifest` for columns and keep. A file that it names and that isn't
    there is no error here: loading it is one.
    multiple: two files of one modality for one item are an "error", or the "first" bytewise wins.
    modalities: those that the configuration uses; files of others are unmatched.

    Ids and pairs don't depend on how an accent is composed (NFC); bytes that are no UTF-8 show as \\xff in an id.
    Hidden files and folders are left out. Links to files are followed; each folder is walked once, however many links
    lead to it. Raises InputError where there is no sample, or no clear one, saying what was found and what to do.
    """
    if multiple not in ("error", "first"):
        raise ValueError(f"multiple={multiple!r}: error or first")
    if not modalities or not set(modalities) <= set(MODALITIES):
        raise ValueError(f"modalities={tuple(modalities)!r}: some of {MODALITIES}")
    modalities = tuple(modality for modality in MODALITIES if modality in modalities)
    if manifest is not None:
        path = Path(manifest).absolute()
        read = read_manifest(path, columns=columns, keep=keep, modalities=modalities)
        if not read.rows:
            raise InputError(f"{path.name}: no rows: it holds the names of the columns and nothing else")
        samples = Samples(path.parent, read.rows, modalities, tuple(read.keep_types), text_inline=True)
        return Listing(samples, (), *_count(read.rows, modalities), read.keep_types)
    if folder is None:
        raise ValueError("folder or manifest is needed")
    root = Path(folder).absolute()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "there is no such folder"
        hint = (
            " (a manifest goes under `input.manifest`)" if root.suffix.lower() in (".csv", ".jsonl", ".parquet") else ""
        )
        raise InputError(f"{printable(os.fspath(folder))}: {what}{hint}")
    grouped = _Groups(root, modalities)
    if pattern:
        grouped.add_by_pattern(
            {modality: glob for modality, glob in pattern.items() if modality in modalities}, pattern
        )
    elif pair_by in ("stem", "folder"):
        grouped.add_by_name(whole_folder=pair_by == "folder")
    else:
        raise ValueError(f"pair_by={pair_by!r}: stem or folder")
    rows = grouped.rows(multiple)
    unmatched = tuple(sorted(grouped.unmatched))
    if not rows:
        raise InputError(_nothing_found(printable(os.fspath(folder)), unmatched, modalities, pair_by, pattern))
    return Listing(Samples(root, rows, modalities), unmatched, *_count(rows, modalities))


class _Groups:
    """The files of a folder, gathered under their ids; what belongs to none, under its reason."""

    def __init__(self, root: Path, modalities: tuple[str, ...]) -> None:
        self.root, self.modalities = root, modalities
        self.unmatched: list[tuple[str, str]] = []
        self._none: tuple[Place, ...] = (None,) * len(modalities)
        # id → where its files are; items whose files are called alike share one tuple, so that many take little
        self._items: dict[str, tuple[Place, ...]] = {}
        self._alike: dict[tuple[Place, ...], tuple[Place, ...]] = {}
        self._more: dict[tuple[str, str], list[str]] = {}  # (id, modality) → paths beyond the first

    def add(self, item_id: str, modality: str, path: str) -> None:
        if not item_id.isascii():
            item_id = unicodedata.normalize("NFC", printable(item_id))
        number, item = self.modalities.index(modality), self._items.get(item_id, self._none)
        if item[number] is not None:
            self._more.setdefault((item_id, modality), []).append(path)
            return
        item = (*item[:number], place(path, item_id), *item[number + 1 :])
        self._items[item_id] = item if any(isinstance(one, str) for one in item) else self._alike.setdefault(item, item)

    def add_by_name(self, *, whole_folder: bool) -> None:
        for parent, name in walk(self.root, self.unmatched):
            path = f"{parent}/{name}" if parent else name
            stem, dot, suffix = name.rpartition(".")
            modality = _MODALITY_OF.get(f".{suffix.lower()}") if dot else None
            if modality is None:
                self.leave(path, f"unknown suffix .{suffix}" if dot else "no suffix")
            elif modality not in self.modalities:
                self.leave(path, f"no encoder for {modality} in this configuration")
            elif not whole_folder:
                self.add(f"{parent}/{stem}" if parent else stem, modality, path)
            elif parent:
                self.add(parent, modality, path)
            else:
                self.leave(path, "directly in the input folder: with pair_by: folder each item has a folder of its own")

    def add_by_pattern(self, used: Mapping[str, str], pattern: Mapping[str, str]) -> None:
        matchers = {modality: Matcher(modality, glob) for modality, glob in pattern.items()}
        for parent, name in walk(self.root, self.unmatched):
            path = f"{parent}/{name}" if parent else name
            found = [(modality, item_id) for modality, m in matchers.items() if (item_id := m.match(path)) is not None]
            if len(found) > 1:
                names = " and ".join(f"{modality}: '{pattern[modality]}'" for modality, _ in found)
                raise InputError(f"'{printable(path)}' fits more than one pattern ({names}): narrow one of them")
            if not found:
                self.leave(path, "fits no pattern")
            elif found[0][0] not in used:
                self.leave(path, f"no encoder for {found[0][0]} in this configuration")
            else:
                self.add(found[0][1], found[0][0], path)

    def leave(self, path: str, reason: str) -> None:
        self.unmatched.append((printable(path), printable(reason)))

    def rows(self, multiple: str) -> Rows:
        """One row for each id, in order: code points compare as their UTF-8 bytes do."""
        rows = Rows()
        ambiguous: list[tuple[str, str, list[str]]] = []
        for item_id in sorted(self._items):
            values = [whole(where, item_id) for where in self._items[item_id]]
            for number, modality in enumerate(self.modalities if self._more else ()):
                first = values[number]
                if first is not None and (more := self._more.get((item_id, modality))):
                    paths = sorted([first, *more], key=os.fsencode)
                    ambiguous.append((item_id, modality, paths))
                    values[number] = paths[0]
            rows.append((item_id, tuple(values), ()))
        if ambiguous and multiple == "error":
            raise InputError(_ambiguous(ambiguous))
        for item_id, modality, paths in ambiguous:
            for path in paths[1:]:
                self.leave(path, f"item '{item_id}' already has the {modality} '{printable(paths[0])}'")
        return rows


def _count(rows: Rows, modalities: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    sets = rows.present()
    counts = {modality: sum(n for has, n in sets.items() if has[i]) for i, modality in enumerate(modalities)}
    named = {"+".join(m for m, h in zip(modalities, has, strict=True) if h): n for has, n in sets.items()}
    return counts, dict(sorted(named.items(), key=lambda pair: (-pair[1], pair[0])))


def _ambiguous(cases: Sequence[tuple[str, str, list[str]]]) -> str:
    item_id, modality, paths = cases[0]
    names = ", ".join(printable(path) for path in paths[:_NAMED_FILES])
    names += f" and {len(paths) - _NAMED_FILES} more" if len(paths) > _NAMED_FILES else ""
    others = f" ({len(cases) - 1} more items like this)" if len(cases) > 1 else ""
    return (
        f"item '{item_id}' has {len(paths)} files for {modality}: {names}{others}.\n  Keep one, say which by "
        "`input.pattern`, or take the first by name: `input.multiple: first`"
    )


def _nothing_found(
    folder: str,
    unmatched: Sequence[tuple[str, str]],
    modalities: Sequence[str],
    pair_by: str,
    pattern: Mapping[str, str] | None,
) -> str:
    """What was there instead, and the way out."""
    if not unmatched:
        return f"no samples in {folder}: the folder is empty"
    shown = Counter(_what(path, reason) for path, reason in unmatched).most_common(8)
    lines = [f"no samples in {folder}: found " + ", ".join(f"{count} {what}" for what, count in shown)]
    if pattern:
        globs = ", ".join(f"{modality}: '{glob}'" for modality, glob in pattern.items())
        lines.append(f"no file fits `input.pattern` ({globs}); one that is there: '{unmatched[0][0]}'")
    else:
        lines.append(
            "looked for " + "; ".join(f"{modality}: {' '.join(SUFFIXES[modality])}" for modality in modalities)
        )
        if pair_by == "folder" and any("directly in" in reason for _, reason in unmatched):
            lines.append(
                "files lie directly in the folder: with `input.pair_by: stem` 4711.jpg and 4711.txt are one item"
            )
        elif any("no encoder" in reason for _, reason in unmatched):
            lines.append("an encoder for what is there goes under `encoders`")
        else:
            lines.append("for files under other names see `input.pattern`, for a list of them `input.manifest`")
    return "\n  ".join(lines)


def _what(path: str, reason: str) -> str:
    if reason.startswith("hidden"):
        return "hidden"
    if path.endswith("/"):
        return "folders not entered"
    suffix = Path(path).suffix
    return suffix if suffix else "without suffix"
