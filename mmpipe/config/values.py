"""Text → typed value: model ids, sizes, shares, exits. Each parser raises ConfigError with the way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from mmpipe.config.source import shown
from mmpipe.errors import ConfigError
from mmpipe.types import MODALITIES

MOST = 512  # rows of a batch, or processes
OWN = "own"  # the kind of package.module:Class

# kind → (what its name looks like, an example)
KINDS: dict[str, tuple[str, str]] = {
    "open_clip": (r"hf-hub:[\w.-]+/[\w.-]+|[\w.-]+(/.+)?", "open_clip:ViT-B-32/laion2b_s34b_b79k"),
    "hf": (r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", "hf:sentence-transformers/all-MiniLM-L6-v2"),
    "timm": (r"[\w./-]+", "timm:vit_small_patch16_224"),
    "torchvision": (r"\w+", "torchvision:resnet50"),
    "torchaudio": (r"\w+", "torchaudio:WAV2VEC2_BASE"),
    "tiny": (r"[\w-]+", "tiny:photo"),
}
_OWN_CLASS = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
_LOCAL = r"(\.{1,2}/|~/|/).*"
_UNITS: dict[str, int] = {
    unit: int(base**power)
    for base, units in ((1000, ("KB", "MB", "GB", "TB")), (1024, ("KiB", "MiB", "GiB", "TiB")))
    for power, unit in enumerate(units, start=1)
}
_EXIT_ENTRY = re.compile(r"(?P<part>image|text|audio|head)(\.layer(?P<layer>[0-9]{1,4}))?")


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` that is most like `word`, if any is."""
    found = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.6)
    return found[0] if found else None


def is_own_class(text: str) -> bool:
    return re.fullmatch(_OWN_CLASS, text) is not None


@dataclass(frozen=True)
class ModelId:
    """A model id, taken apart.

    kind: one of KINDS, or "own". name: "ViT-B-32", "ORG/NAME", "package.module:Class", or a local path as written.
    revision: what follows @ (hf), or the pretrained tag or path (open_clip); None: none.
    """

    kind: str
    name: str
    revision: str | None = None

    @property
    def path(self) -> str | None:
        """The local path that the id ends with, as written; None: it names no local path."""
        if self.kind == OWN:
            return None
        return next((part for part in (self.name, self.revision) if part and re.fullmatch(_LOCAL, part)), None)


def parse_model(text: str) -> ModelId:
    """A model id as the configuration has it → ModelId; ConfigError where it follows no known form."""
    kind, colon, name = text.partition(":")
    if colon and kind in KINDS:
        if re.fullmatch(_LOCAL, name):
            return ModelId(kind, name)
        pattern, example = KINDS[kind]
        if not re.fullmatch(pattern, name):
            raise ConfigError(
                f"{shown(text)} is not a model id of {kind}", hint=f"for example {example}; a local path begins with ./"
            )
        if kind == "open_clip" and not name.startswith("hf-hub:"):
            name, _, tag = name.partition("/")
            return ModelId(kind, name, tag or None)
        name, _, revision = name.partition("@")
        return ModelId(kind, name, revision or None)
    if kind == "hf-hub" and re.fullmatch(KINDS["open_clip"][0], text):  # open_clip's own way to say it
        return ModelId("open_clip", text)
    if is_own_class(text):
        return ModelId(OWN, text)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text) and not text.startswith("."):
        name, _, revision = text.partition("@")
        return ModelId("hf", name, revision or None)
    if re.fullmatch(_LOCAL, text):
        raise ConfigError(f"{shown(text)} does not say what kind of model it is", hint=f"hf:{text} or open_clip:{text}")
    if colon:
        near = nearest(kind, KINDS)
        hint = f"did you mean {near}:{name}?" if near else f"known kinds: {', '.join(KINDS)}, or package.module:Class"
        raise ConfigError(f"unknown kind of model {shown(kind)} in {shown(text)}", hint=hint)
    raise ConfigError(
        f"{shown(text)} is not a model id",
        hint=f"KIND:NAME, with KIND one of {', '.join(KINDS)}; for the hub hf:ORG/NAME",
    )


def parse_size(value: object) -> int:
    """ "10GB" (powers of 1000) or "512MiB" (powers of 1024) → bytes."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMGT]i?B|B)", value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"{shown(value)} is not a size", hint="a number with its unit: 10GB, 512MiB")
    size_bytes = round(float(match[1]) * _UNITS.get(match[2], 1))
    if size_bytes < 1:
        raise ConfigError(f"{shown(value)} is no room at all", hint="a number with its unit: 10GB, 512MiB")
    return size_bytes


def parse_size_or_auto(value: object) -> int | Literal["auto"]:
    return "auto" if value == "auto" else parse_size(value)


def parse_count_or_auto(what: str) -> Callable[[object], int | Literal["auto"]]:
    def parse(value: object) -> int | Literal["auto"]:
        if value == "auto":
            return "auto"
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST:
            return value
        raise ConfigError(f"{shown(value)} is not {what}", hint=f"auto, or a whole number from 1 to {MOST}")

    return parse


def parse_device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", text):
        raise ConfigError(f"unknown device {shown(text)}", hint="auto, cpu, cuda or cuda:N")
    return text


def format_size(size_bytes: int) -> str:
    """The inverse of `parse_size`, exact."""
    for unit, factor in sorted(_UNITS.items(), key=lambda item: -item[1]):
        if size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return f"{size_bytes}B"


def parse_share(value: object) -> float:
    """ "1%" or 0.01 → 0.01. A bare 1 or 5 is refused: it may mean either."""
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)\s*%", value)):
        share = float(match[1]) / 100
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, int) and value > 0:
            raise ConfigError(
                f"{value} is not clear as a share", hint=f"write {min(value, 100)}% or {min(value, 100) / 100}"
            )
        share = float(value)
    else:
        raise ConfigError(f"{shown(value)} is not a share", hint="a percentage, or a number from 0 to 1: 1% or 0.01")
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"{shown(value)} is out of range", hint="a share is from 0% to 100%, or from 0 to 1")
    return share


def parse_head(text: str) -> str:
    """A head's name, checked."""
    names = ("zero_shot", "linear", "transformer")
    if text in names or is_own_class(text):
        return text
    near = nearest(text, names)
    choices = f"{', '.join(names)}, or your own package.module:Class"
    raise ConfigError(
        f"unknown head {shown(text)}", hint=f"did you mean {near}? choices: {choices}" if near else choices
    )


@dataclass(frozen=True)
class ExitEntry:
    """One entry of an exit's `after`: a modality, a layer of its encoder, or a layer of the head (from 1)."""

    part: str
    layer: int | None = None


def parse_exit_entry(text: str) -> ExitEntry:
    """ "image", "image.layer4" or "head.layer1" → ExitEntry."""
    if text in ("all", "head"):
        raise ConfigError(f"{shown(text)} is the last stage, which always answers", hint="remove this exit")
    match = _EXIT_ENTRY.fullmatch(text)
    if match is None:
        near = nearest(text.partition(".")[0], (*MODALITIES, "head"))
        hint = f"{', '.join(MODALITIES)}, MODALITY.layerN or head.layerN"
        raise ConfigError(
            f"{shown(text)} is no place for an exit", hint=f"did you mean {near}? one of {hint}" if near else hint
        )
    if match["layer"] is not None and int(match["layer"]) < 1:
        raise ConfigError(f"{shown(text)}: layers count from 1", hint=f"{match['part']}.layer1")
    return ExitEntry(match["part"], int(match["layer"]) if match["layer"] else None)


# As pydantic types

T = TypeVar("T")


def checked(parse: Callable[[Any], T]) -> Callable[[Any], T]:
    """A parser of ours as a pydantic validator: its message and hint travel through pydantic's list of errors."""

    def validate(value: Any) -> T:
        try:
            return parse(value)
        except ConfigError as error:
            context = {"message": error.message, "hint": error.hint}
            raise PydanticCustomError("mmpipe", "{message}", context) from None

    return validate


def valid(parse: Callable[[str], object]) -> Callable[[str], str]:
    """Checks with `parse`, keeps the text as written."""

    def validate(text: str) -> str:
        parse(text)
        return text

    return checked(validate)


def listed(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else listed(value)


def switch_word(value: object) -> object:
    """YAML reads a bare `on` or `off` as true or false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(listed)]
Share = Annotated[
    float,
    PlainValidator(checked(parse_share)),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": r"^[0-9.]+\s*%$"}, {"type": "number", "minimum": 0, "maximum": 1}]}
    ),
]
_SIZE_SCHEMA = {"type": "string", "pattern": r"^[0-9.]+\s*([KMGT]i?B|B)$"}
Size = Annotated[int, PlainValidator(checked(parse_size)), PlainSerializer(format_size), WithJsonSchema(_SIZE_SCHEMA)]
SizeOrAuto = Annotated[
    int | Literal["auto"],
    PlainValidator(checked(parse_size_or_auto)),
    PlainSerializer(lambda size: size if size == "auto" else format_size(size)),
    WithJsonSchema({"anyOf": [{"const": "auto"}, _SIZE_SCHEMA]}),
]
_COUNT_SCHEMA = WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": MOST}]})
BatchSize = Annotated[
    int | Literal["auto"], PlainValidator(checked(parse_count_or_auto("a batch size"))), _COUNT_SCHEMA
]
Processes = Annotated[
    int | Literal["auto"], PlainValidator(checked(parse_count_or_auto("a number of processes"))), _COUNT_SCHEMA
]
