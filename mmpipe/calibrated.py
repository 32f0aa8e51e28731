"""calibration.json: exits that were certified, what they promise, and the model that they were certified for.

`mmpipe calibrate` writes it; `fusion.calibration` names it, and the build puts its exits in the place of
`fusion.exits`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import nn

from mmpipe.config import Config, ExitConfig
from mmpipe.config.check import exit_problems
from mmpipe.config.source import Document, Source, parse_yaml, read_text, shown
from mmpipe.config.values import listed
from mmpipe.config.words import translate
from mmpipe.errors import ConfigError

VERSION = 1
KEY = "fusion.calibration"

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Temperature = Annotated[float, Field(gt=0, le=1000)]
Names = Annotated[tuple[str, ...], BeforeValidator(listed)]


class _Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


class CalibratedExit(ExitConfig):
    """A place where a sample may answer early."""

    threshold: Share | None = Field(  # type: ignore[assignment]
        description="A sample leaves here when its confidence is at least this; null: none leaves."
    )
    temperature: Temperature = Field(description="What the exit's logits are divided by.")
    answered: Share = Field(description="Share of the test samples that it answered.")


class Promise(_Keys):
    """P(share of items whose early answer differs from the full pipeline's ≤ max_disagreement) ≥ certainty."""

    max_disagreement: Annotated[float, Field(gt=0, lt=1)] = Field(description="At most this share differs.")
    certainty: Annotated[float, Field(gt=0, lt=1)] = Field(description="Over the draw of the items.")
    items_learn: Count = Field(description="Items that temperatures, order and thresholds were learnt from.")
    items_test: Count = Field(description="Other items, that they were tested on.")
    observed: Share = Field(description="Share of the test items whose early answer differed.")


class Expected(_Keys):
    """What leaving early saves, at the costs measured when it was calibrated. No promise."""

    saving: Annotated[float, Field(le=1)] = Field(description="Share of the full pipeline's seconds.")
    seconds_full: Annotated[float, Field(ge=0)] = Field(description="Seconds an item takes in full.")
    seconds_with_exits: Annotated[float, Field(ge=0)] = Field(description="Seconds an item takes with these exits.")


class Accuracy(_Keys):
    """What leaving early costs in accuracy, where true labels were given: a statement of its own."""

    items: Annotated[int, Field(ge=1)] = Field(description="Test items whose true label was given.")
    lost: Count = Field(description="Items that the full pipeline had right, and the early answer wrong.")
    won: Count = Field(description="Items that the early answer had right, and the full pipeline wrong.")
    loss_at_most: Annotated[float, Field(ge=-1, le=1)] = Field(description="Upper confidence limit of the loss.")
    certainty: Annotated[float, Field(gt=0, lt=1)] = Field(description="Of that limit.")


class SecondLook(_Keys):
    """What `fusion.deliberate` brought, where it was configured and true labels were given."""

    below: Annotated[float, Field(gt=0, le=1)] = Field(description="As it was configured.")
    views: Count = Field(description="As it was configured.")
    items: Count = Field(description="Items whose true label was given.")
    looked_at: Count = Field(description="Of those: looked at again.")
    won: Count = Field(description="Of those: wrong at first, right after the second look.")
    lost: Count = Field(description="Of those: right at first, wrong after it.")
    seconds: Annotated[float, Field(ge=0)] = Field(description="What looking again took.")
    pays: bool = Field(description="Whether it surely wins more than it loses; if not, runs leave it out.")

    def told(self) -> str:
        """In a sentence."""
        each = f", at {1e3 * self.seconds / self.looked_at:.3g} ms each" if self.looked_at else ""
        verdict = "it stays on" if self.pays else "it is not shown to pay, and is left out"
        return (
            f"of {self.items:,} items with a true label {self.looked_at:,} were looked at again{each}; {self.won:,} "
            f"answers were won by it, {self.lost:,} lost: {verdict}"
        )


class BindsTo(_Keys):
    """What the exits were certified for."""

    model: str = Field(description="Fingerprint of weights, preparation, labels and head, without the exits.")
    dtype: str = Field(description="Number format of the encoders.")
    backends: Names = Field(description="What computed the segments.")
    dtypes: Mapping[str, str] = Field(default_factory=dict, description="Number format of each encoder, where known.")

    def dtype_of(self, encoder: str) -> str | None:
        """One encoder's number format; None: the file doesn't say, or it has several."""
        told = self.dtype if self.dtype == "float32" else self.dtypes.get(encoder)
        return told if told in ("float32", "bfloat16") else None


class Calibration(_Keys):
    """A calibration file."""

    version: Literal[1] = Field(description="Of this format.")
    made_by: str = Field(description="What wrote the file.")
    labels: Names = Field(description="The labels, in order.")
    binds_to: BindsTo = Field(description="What the exits were certified for.")
    confidence: Literal["max_probability", "margin", "entropy"] = Field(
        description="What a threshold is compared with."
    )
    exits: Annotated[tuple[CalibratedExit, ...], BeforeValidator(listed)] = Field(
        description="Early exits, from first to last; empty: none could be certified."
    )
    full_temperature: Temperature = Field(description="What the full pipeline's logits are divided by.")
    promise: Promise | None = Field(description="What holds for the exits; null: nothing could be certified.")
    expected: Expected | None = Field(description="What leaving early saves.")
    accuracy: Accuracy | None = Field(description="What it costs in accuracy, where true labels were given.")
    second_look: SecondLook | None = Field(default=None, description="Whether `fusion.deliberate` pays.")


@dataclass(frozen=True)
class Gating:
    """How exits decide, whoever set them: one threshold and temperature for each exit but the last."""

    exits: tuple[ExitConfig, ...]
    temperatures: tuple[float, ...]  # one more than exits: the full pipeline's
    confidence: str
    max_disagreement: float | None  # what was certified; None: nothing was

    @property
    def thresholds(self) -> tuple[float, ...]:
        never = math.inf
        return tuple(never if exit_.threshold is None else exit_.threshold for exit_ in self.exits)


def no_second_look(config: Config, calibration: Calibration | None) -> str:
    """Why `fusion.deliberate` is left out though it is configured; empty: it is not."""
    tried, asked = calibration.second_look if calibration else None, config.fusion.deliberate
    if tried is None or asked is None or tried.pays or (tried.below, tried.views) != (asked.below, asked.views):
        return ""
    return f"fusion.deliberate: {tried.told()}"


def by_hand(config: Config, exits: bool = True) -> Gating:
    """The exits of the configuration itself, which promise nothing; `exits` False: none."""
    chosen = config.fusion.exits if exits else ()
    return Gating(chosen, (1.0,) * (len(chosen) + 1), config.fusion.confidence, None)


def certified(calibration: Calibration) -> Gating:
    """The exits of a calibration."""
    temperatures = (*(exit_.temperature for exit_ in calibration.exits), calibration.full_temperature)
    promise = calibration.promise
    return Gating(
        calibration.exits, temperatures, calibration.confidence, promise.max_disagreement if promise else None
    )


def read_calibration(config: Config) -> Calibration:
    """The file that `fusion.calibration` names. ConfigError with its line."""
    assert config.fusion.calibration is not None
    path = config.resolve(config.fusion.calibration)
    return parse_calibration(read_text(path, path.name), path.name, path)


def unlike(found: Calibration, config: Config) -> str:
    """Why a calibration was made for another configuration; empty: it may hold."""
    if found.labels != config.all_labels:
        unknown = [label for label in found.labels if label not in config.all_labels]
        what = f"it knows the label {shown(unknown[0])}, which the configuration doesn't" if unknown else ""
        missing = [label for label in config.all_labels if label not in found.labels]
        what = what or (f"it doesn't know the label {shown(missing[0])}" if missing else "their order differs")
        return f"it was made for other labels: {what}"
    changed = config.fusion.model_copy(update={"exits": found.exits})
    problems = list(exit_problems(config.model_copy(update={"fusion": changed})))
    return problems[0].message if problems else ""


def parse_calibration(text: str, name: str, path: Path | None = None) -> Calibration:
    """JSON text → Calibration. ConfigError: file and line, the key, what was found and what would do."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not JSON: {error.msg}", where=f"{name}:{error.lineno}", hint=_AGAIN) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}", where=name, hint=_AGAIN) from None
    if not isinstance(data, dict) or "version" not in data:
        raise ConfigError("holds no calibration: it has no version", where=name, hint=_AGAIN)
    if data["version"] != VERSION or isinstance(data["version"], bool):
        message = f"is of version {shown(data['version'])}, and this mmpipe reads version {VERSION}"
        raise ConfigError(message, where=name, path="version", hint=_AGAIN)
    places = _places(text, name)
    source = Source(path, path.parent if path else Path.cwd(), name, False, places.places, {})
    try:
        found = Calibration.model_validate(data)
    except ValidationError as error:
        problems = translate(error.errors(include_url=False), source, Calibration.model_json_schema())
        raise source.error(problems) from None
    if bool(found.exits) != (found.promise is not None):
        raise ConfigError("exits and promise go together", where=name, path="promise", hint=_AGAIN)
    return found


_AGAIN = "a calibration is what mmpipe calibrate writes; run it again"


def _places(text: str, name: str) -> Document:
    """JSON is YAML: its reader knows the lines."""
    try:
        return parse_yaml(text, name)
    except ConfigError:
        return Document({}, {}, {})


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write what `read_calibration` reads. OSError where `path` can't be written."""
    text = json.dumps(calibration.model_dump(mode="json"), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def mismatch(
    calibration: Calibration,
    *,
    model: str,
    dtype: str,
    backends: Sequence[str],
    dtypes: Mapping[str, str] = MappingProxyType({}),
) -> str | None:
    """Why a calibration doesn't hold for what is built, in words; None: it does."""
    bound = calibration.binds_to
    if bound.model != model:
        return "it was made for another model: weights, preparation, labels or head have changed"
    if bound.dtype != dtype:
        return f"it was made with numbers of type {bound.dtype}, and these are {dtype}"
    for encoder, its in dtypes.items():
        if (wanted := bound.dtypes.get(encoder, its)) != its:
            return f"it was made with {encoder} in {wanted}, and here it is {its}"
    if sorted(set(bound.backends)) != sorted(set(backends)):
        return f"it was made with {' and '.join(bound.backends)}, and this runs with {' and '.join(backends)}"
    return None


def core_fingerprint(
    modules: Mapping[str, nn.Module], head: nn.Module | None, config: Config, preparations: Mapping[str, Any]
) -> Future[str]:
    """A hash of what decides labels: weights, preparation, labels, head; not of the exits, nor of library versions.
    A thread works it out meanwhile, which takes a second for a gigabyte.

    `preparations`: modality → all that shapes its preparation. Zero-shot prototypes are made by a model, to the last
    bit differently on every machine: their prompts, scales and weights count in their place.
    """
    zero_shot = config.fusion.head == "zero_shot"
    parts = dict(modules) if head is None or zero_shot else {**modules, "head": head}
    states = [(f"{name} {type(part).__qualname__}", sorted(part.state_dict().items())) for name, part in parts.items()]
    settings = {
        "labels": list(config.all_labels),
        "head": config.fusion.head,
        "options": dict(config.fusion.options),
        "prompts": {str(name): one.model_dump(mode="json") for name, one in config.fusion.modalities.items()},
        # an entry that says nothing is as one that isn't there: a later mmpipe may know more entries
        "preparations": {name: {k: v for k, v in one.items() if v != {}} for name, one in preparations.items()},
        "text_models": [encoder.model for encoder in config.encoders.values()] if zero_shot else [],
    }
    end = json.dumps(settings, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
    thread = ThreadPoolExecutor(1)
    found = thread.submit(_hash, states, end)
    thread.shutdown(wait=False)
    return found


def _hash(states: Sequence[tuple[str, Sequence[tuple[str, Any]]]], end: bytes) -> str:
    digest = hashlib.sha256()
    for part, tensors in states:
        digest.update(part.encode())
        for name, tensor in tensors:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(end)
    return digest.hexdigest()[:32]
