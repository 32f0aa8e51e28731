"""Configuration → samples. Loads no model and imports no torch: `mmpipe check` is quick."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from mmpipe import media
from mmpipe.config import Config
from mmpipe.media.manifest import MANIFEST_SUFFIXES


def find_samples(config: Config, folder: str | Path | None = None) -> media.Listing:
    """The samples of `folder` (or a manifest's path), or of the configuration's input. Loads no model."""
    settings = config.input
    root, manifest = _given(config, folder)
    if manifest is None and root is None:
        raise config.error("input", "nothing to read", "set input.folder or input.manifest, or give --input PATH")
    for key in ("columns", "keep") if manifest is None and settings.manifest is None else ():
        if getattr(settings, key):
            message = f"{key} is for a manifest, and there is none"
            raise config.error(f"input.{key}", message, f"add input.manifest, give --input TABLE, or remove {key}")
    listing = media.find(
        root,
        pair_by=settings.pair_by or "stem",
        pattern={str(modality): glob for modality, glob in settings.pattern.items()} or None,
        manifest=manifest,
        columns={str(column): name for column, name in settings.columns.items()} or None,
        keep=settings.keep,
        multiple=settings.multiple,
        modalities=config.modalities,
    )
    own = config.source.file
    if root is None or own is None:
        return listing
    # a configuration in the folder that it describes, as `init` writes it, is no stray file
    return replace(listing, unmatched=tuple(pair for pair in listing.unmatched if not _same(root / pair[0], own)))


def _same(one: Path, other: str | Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def input_root(config: Config, folder: str | Path | None = None) -> Path | None:
    """The folder that `find_samples` looks through; None for a manifest."""
    return _given(config, folder)[0]


def _given(config: Config, folder: str | Path | None) -> tuple[Path | None, Path | None]:
    """(folder, manifest): what was given, else what is configured; a manifest comes before a folder."""
    if folder is not None:
        given = Path(folder)
        is_manifest = given.suffix.lower() in MANIFEST_SUFFIXES and not given.is_dir()
        return (None, given) if is_manifest else (given, None)
    settings = config.input
    if settings.manifest:
        return None, config.resolve(settings.manifest)
    return (config.resolve(settings.folder) if settings.folder else None), None
