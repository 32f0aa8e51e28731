"""YAML → plain data that remembers on which line each key stands. Knows no key of the configuration.

Semantics are those of `yaml.safe_load`, less what surprises: duplicate keys, keys that are not text, Python tags and
documents that grow without bound are errors with a line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmpipe.errors import ConfigError

MAX_FILE_BYTES = 1_000_000
MAX_NODES = 100_000  # after aliases are expanded: nine nested aliases of nine make a billion
MAX_DEPTH = 50
MAX_SHOWN_PROBLEMS = 5

_CORE_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp")}
_MERGE_TAG = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Problem:
    """One thing wrong: the dotted key, what it is, the way out."""

    path: str
    message: str
    hint: str = ""
    trained: bool = False  # only a run lacks it: training brings it


@dataclass(frozen=True)
class Source:
    """Where a configuration came from."""

    file: Path | None = None  # None: a mapping from Python
    folder: Path = field(default_factory=Path.cwd)  # what paths inside are relative to
    name: str = "config"
    packaged: bool = False
    places: Mapping[str, str] = field(default_factory=dict)  # dotted key → "file:line" or "--set"
    raw: Mapping[str, str] = field(default_factory=dict)  # dotted key → unquoted scalar as written, where not text

    def place(self, path: str) -> str:
        """ "file:line" of a dotted key, or of the nearest key around it; "" when there is no file."""
        while path and path not in self.places:
            path = path.rpartition(".")[0]
        return self.places.get(path, "")

    def error(self, problems: Iterable[Problem]) -> ConfigError:
        """One error for all: the topmost is its message and path, up to four more follow in its hint."""
        ordered = sorted(problems, key=lambda problem: _line(self.place(problem.path)))
        first, rest = ordered[0], ordered[1:]
        lines = [first.hint] if first.hint else []
        for other in rest[: MAX_SHOWN_PROBLEMS - 1]:
            text = ": ".join(part for part in (self.place(other.path), other.path, other.message) if part)
            lines.append(f"also: {text}" + (f" ({other.hint})" if other.hint else ""))
        if len(rest) >= MAX_SHOWN_PROBLEMS:
            lines.append(f"and {len(rest) - MAX_SHOWN_PROBLEMS + 1} more")
        return ConfigError(
            first.message, where=self.place(first.path), path=first.path, hint="\n  ".join(lines).replace("\0", "")
        )


def _line(place: str) -> int:
    tail = place.rpartition(":")[2]
    return int(tail) if tail.isdecimal() else 0


@dataclass
class Document:
    """Plain data (dict, list, scalars), with dotted key → "file:line" and → the scalar as written."""

    data: Any
    places: dict[str, str]
    raw: dict[str, str]


def shown(value: object, limit: int = 60) -> str:
    """A value as a person would write it in YAML, cut to `limit` characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping" if value else "{}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "[]"
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= limit else f"{text[:limit]}…"


def read_text(path: Path, name: str) -> str:
    """The text of a small UTF-8 file; anything else is a ConfigError whose `where` begins with `name`."""
    try:
        if os.path.isdir(path):
            raise ConfigError("is a folder, not a file", where=name, hint="name the YAML file inside it")
        if os.path.exists(path) and not os.path.isfile(path):
            raise ConfigError("is not a regular file", where=name)
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError("no such file", where=name, hint=f"looked in {path.parent.absolute()}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"can't be read: {reason}", where=name) from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            "is larger than 1 MB", where=name, hint="this is not a configuration, or a list too long for one"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"is not UTF-8: byte 0x{content[error.start]:02x}", where=f"{name}:{line}", hint="save the file as UTF-8"
        ) from None


def parse_yaml(text: str, name: str) -> Document:
    """YAML text → Document. `name` is what errors call it: a file's places become "name:line", others `name` alone.

    Raises ConfigError for everything that `yaml.safe_load` refuses, and for what the module's docstring lists.
    """
    loader: yaml.SafeLoader | None = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        builder = _Builder(loader, name)
        data = None if root is None else builder.build(root, "", ())
        return Document(data, builder.places, builder.raw)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise ConfigError(
            f"holds the control character U+{code:04X}", where=_where(name, line), hint="remove it"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, name) from None
    except (OverflowError, ValueError) as error:  # an escape beyond Unicode, in text that PyYAML reads
        raise ConfigError(f"can't be parsed: {error}", where=name) from None
    except RecursionError:
        raise ConfigError("is nested too deeply", where=name, hint=f"at most {MAX_DEPTH} levels") from None
    finally:
        if loader is not None:
            loader.dispose()


def _where(name: str, line: int) -> str:
    return name if name.startswith("--") else f"{name}:{line}"


def _syntax_error(error: yaml.MarkedYAMLError, name: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    problem = error.problem or "can't be parsed"
    hint = ""
    if "'\\t'" in problem:
        problem, hint = "a tab where YAML wants spaces", "indent with spaces"
    elif "mapping values are not allowed" in problem:
        hint = 'a value that holds ": " needs quotes'
    elif "single document" in str(error.context):
        problem, hint = "a second document begins here", "remove the line ---"
    elif "cannot start any token" in problem or "undefined alias" in problem:
        hint = 'a value that begins with @ ` * & ! | > % or { needs quotes: "{}"'
    elif "flow" in str(error.context) and error.context_mark:
        hint = f"the bracket opened on line {error.context_mark.line + 1} is not closed"
    elif "stream end" in problem or "end of stream" in problem:
        hint = "a bracket or quote is not closed"
    else:
        hint = "look at this line's indentation, and at the line above"
    column = f", column {mark.column + 1}" if mark else ""
    return ConfigError(
        f"not valid YAML: {problem}{column}", where=_where(name, mark.line + 1) if mark else name, hint=hint
    )


class _Builder:
    """YAML nodes → plain data. Walks the tree itself, since PyYAML's constructor drops lines and duplicates."""

    def __init__(self, loader: yaml.SafeLoader, name: str) -> None:
        self.loader, self.name = loader, name
        self.places: dict[str, str] = {}
        self.raw: dict[str, str] = {}
        self.nodes = 0

    def error(self, node: yaml.Node, path: str, message: str, hint: str) -> ConfigError:
        return ConfigError(message, where=_where(self.name, node.start_mark.line + 1), path=path, hint=hint)

    def build(self, node: yaml.Node, path: str, around: tuple[yaml.Node, ...]) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.error(node, path, f"aliases expand to more than {MAX_NODES:,} values", "write them out")
        if node in around:
            raise self.error(node, path, "an alias that contains itself", "write the value out")
        if len(around) >= MAX_DEPTH:
            raise self.error(node, path, "is nested too deeply", f"at most {MAX_DEPTH} levels")
        self.places.setdefault(path, _where(self.name, node.start_mark.line + 1))
        around = (*around, node)
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            return [self.build(item, join(path, index), around) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return self.mapping(node, path, around)
        if isinstance(node, yaml.ScalarNode) and node.tag in _CORE_TAGS:
            return self.scalar(node, path)
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise self.error(
            node, path, f"the tag {tag} is refused", "write a plain value: text, a number, a list or a mapping"
        )

    def scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        try:
            value = self.loader.construct_object(node)
        except (ValueError, LookupError, AttributeError, OverflowError, yaml.constructor.ConstructorError):
            kind = node.tag.rpartition(":")[2].replace("timestamp", "date")
            raise self.error(
                node, path, f"{shown(node.value)} looks like a {kind} and is none", "quote it to make it text"
            ) from None
        if not isinstance(value, str):
            self.raw[path] = node.value
        elif not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise self.error(node, path, f"{shown(value)} holds half a character", "write the character itself")
        return value

    def mapping(self, node: yaml.MappingNode, path: str, around: tuple[yaml.Node, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag == _MERGE_TAG:  # "<<": what is merged comes first, what stands here wins
                result = {**self.merged(value, path, around), **result}
        seen: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if key.tag == _MERGE_TAG:
                continue
            name = self.key(key, path)
            here = join(path, name)
            line = key.start_mark.line + 1
            if name in seen:
                first = seen[name].start_mark.line + 1
                place = f"lines {first} and {line}" if first != line else f"on line {line}"
                message = f"the key {shown(name)} stands twice, {place}"
                raise self.error(key, here, message, "keep one of them")
            seen[name] = key
            self.forget(here)
            self.places[here] = _where(self.name, line)
            result[name] = self.build(value, here, around)
        return result

    def merged(self, node: yaml.Node, path: str, around: tuple[yaml.Node, ...]) -> dict[str, Any]:
        parts = node.value[::-1] if isinstance(node, yaml.SequenceNode) else [node]
        result: dict[str, Any] = {}
        for part in parts:  # of several, the earlier wins
            if not isinstance(part, yaml.MappingNode):
                raise self.error(part, path, "<< merges mappings only", "name an anchor of a mapping: <<: *name")
            result.update(self.build(part, path, around))
        return result

    def forget(self, path: str) -> None:
        """Drops what a merge noted under a key that is written again here."""
        if path in self.places:
            for table in (self.places, self.raw):
                for key in [key for key in table if key == path or key.startswith(f"{path}.")]:
                    del table[key]

    def key(self, node: yaml.Node, path: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(
                node, path, "a key that is a list or a mapping", 'a value that begins with { or [ needs quotes: "{}"'
            )
        if not node.tag.endswith(":str"):
            value = shown(self.scalar(node, path))
            raise self.error(node, path, f"YAML reads the key {node.value} as {value}", f'quote it: "{node.value}"')
        return str(self.scalar(node, path))


def expand(path: str) -> Path:
    """A path with ~ replaced, where it can be."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~nobody
        return Path(path)


def join(path: str, part: str | int) -> str:
    return f"{path}.{part}" if path else str(part)


def apply_override(document: Document, override: str) -> str:
    """Sets one "KEY=VALUE" (dotted key, YAML value) in place; returns the key.

    Lists are reached by index, from 0; mappings on the way are created. Raises ConfigError with where="--set".
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or "" in key.split("."):
        raise ConfigError(
            f"{shown(override)} is not KEY=VALUE", where="--set", hint="for example fusion.exits.0.threshold=0.9"
        )
    value = parse_yaml(text, "--set")
    parts, around = key.split("."), document.data
    for depth, part in enumerate(parts):
        path = ".".join(parts[:depth])
        last = depth == len(parts) - 1
        if isinstance(around, list):
            if not re.fullmatch(r"[0-9]{1,9}", part) or int(part) >= len(around):
                raise ConfigError(
                    f"no item {part} in a list of {len(around)}", where="--set", path=path, hint="items count from 0"
                )
            slot: str | int = int(part)
        elif isinstance(around, dict):
            slot = part
        else:
            raise ConfigError(
                f"is {shown(around)}, which has no key {shown(part)}",
                where="--set",
                path=path,
                hint=f"set {path} itself",
            )
        if last:
            around[slot] = value.data
        else:
            if isinstance(around, dict) and around.get(part) is None:
                around[slot] = {}
            around = around[slot]
    for table, new in ((document.places, value.places), (document.raw, value.raw)):
        for old in [old for old in table if old == key or old.startswith(f"{key}.")]:
            del table[old]
        table.update({join(key, path) if path else key: entry for path, entry in new.items()})
    document.places[key] = "--set"
    return key


def plain(value: object, path: str = "", depth: int = 0) -> Any:
    """A mapping from Python → a copy in dict, list and scalars; paths become text, keys must be text."""
    if depth > MAX_DEPTH:
        raise ConfigError("is nested too deeply", path=path, hint=f"at most {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"the key {shown(key)} is not text", path=path, hint=f'write "{key}"')
        return {key: plain(item, join(path, key), depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return [plain(item, join(path, index), depth + 1) for index, item in enumerate(value)]
    return str(value) if isinstance(value, Path) else value
