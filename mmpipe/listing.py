"""Configuration → samples. Loads no model and imports no torch: `mmpipe check` is quick."""

from __future__ import annotations

from pathlib import Path

from mmpipe import media
from mmpipe.config import Config


def find_samples(config: Config, folder: str | Path | None = None) -> media.Listing:
    """The samples of `folder` (or a manifest's path), or of the configuration's input. Loads no model."""
    settings = config.input
    manifest = config.resolve(settings.manifest) if settings.manifest else None
    root = config.resolve(settings.folder) if settings.folder else None
    if folder is not None:
        given = Path(folder)
        is_manifest = given.suffix.lower() in (".csv", ".jsonl", ".parquet") and not given.is_dir()
        manifest, root = (given, None) if is_manifest else (None, given)
    if manifest is None and root is None:
        raise config.error("input", "nothing to read", "set input.folder or input.manifest, or give --input PATH")
    return media.find(
        root,
        pair_by=settings.pair_by or "stem",
        pattern={str(modality): glob for modality, glob in settings.pattern.items()} or None,
        manifest=manifest,
        columns={str(column): name for column, name in settings.columns.items()} or None,
        keep=settings.keep,
        multiple=settings.multiple,
        modalities=config.modalities,
    )
