"""What a calibration was asked for, checked before any model is loaded. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mmpipe.config import Config
from mmpipe.config.values import parse_share
from mmpipe.errors import ConfigError, OutputError
from mmpipe.truth import read_truth

DEFAULT_NAME = "calibration.json"
SCORES_NAME = "scores.safetensors"  # held-out scores of a packaged configuration, in its folder


@dataclass(frozen=True)
class Request:
    """The options of `mmpipe calibrate`."""

    config: Config
    max_disagreement: float
    certainty: float
    truth: dict[str, str] | None  # id → label
    output: Path
    limit: int | None

    @classmethod
    def of(
        cls,
        config: Config,
        max_disagreement: str | float = 0.01,
        certainty: str | float = 0.95,
        truth: Path | None = None,
        output: Path | None = None,
        limit: int | None = None,
    ) -> Self:
        """Raises ConfigError, InputError (the truth), OutputError."""
        if config.task == "embed":
            raise config.error("task", "embed has no exits: there is nothing to calibrate", "task: classify")
        deep = any(".layer" in part for exit_ in config.fusion.exits for part in exit_.after)
        if len(config.encoders) == 1 and not deep:
            hint = "configure exits inside it (after: image.layer4), or a second encoder"
            raise config.error("encoders", "one encoder and no depth exits: there is nowhere to leave early", hint)
        shares = {}
        for option, given in (("--max-disagreement", max_disagreement), ("--certainty", certainty)):
            shares[option] = _share(option, given)
        path = output or _beside(config)
        if path.suffix.lower() == ".html":
            raise ConfigError(f"{path.name}: the report has this name; the file is JSON", where="--output")
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise OutputError(f"{path}: {'is a folder' if path.is_dir() else 'there is no such folder'}")
        labels = read_truth(truth, config.all_labels) if truth is not None else None
        return cls(config, shares["--max-disagreement"], shares["--certainty"], labels, path, limit)

    @property
    def report(self) -> Path:
        return self.output.with_suffix(".html")

    def packaged_scores(self, input: Path | None) -> Path | None:
        """The held-out scores that stand in for an input that wasn't given."""
        source = self.config.source
        path = source.folder / source.name / SCORES_NAME
        if input is not None or not source.packaged or not path.is_file():
            return None
        if self.truth is not None or self.limit is not None:
            raise ConfigError("goes with --input: the packaged scores have their own", where="--truth or --limit")
        return path


def _beside(config: Config) -> Path:
    source = config.source
    return Path(DEFAULT_NAME) if source.packaged or source.file is None else source.folder / DEFAULT_NAME


def _share(option: str, given: str | float) -> float:
    try:
        number: object = float(given) if isinstance(given, str) and not given.strip().endswith("%") else given
        share = parse_share(number)
    except (ValueError, ConfigError) as error:
        hint = getattr(error, "hint", "") or "a share: 1%, or 0.01"
        raise ConfigError(f"{given!r} is not a share", where=option, hint=hint) from None
    if not 0.0 < share < 1.0:
        raise ConfigError(f"{given!r} is out of range", where=option, hint="above 0% and below 100%")
    return share
