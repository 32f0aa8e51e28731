"""What pydantic found, in plain words. The JSON Schema says what would have been right."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmpipe.config.source import Problem, Source, join, shown
from mmpipe.config.values import nearest

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def translate(details: Sequence[ErrorDetails], source: Source, schema: Mapping[str, Any]) -> list[Problem]:
    """pydantic's list of errors → problems. The schema says what would have been right."""
    problems, guessed = [], set()
    for detail in details:
        if detail["type"] == "extra_forbidden":
            path, key = _path(detail["loc"]), str(detail["loc"][-1])
            known = keys_of(_schema_at(schema, detail["loc"][:-1]))
            near = nearest(key, known)
            if near:
                guessed.add(join(_path(detail["loc"][:-1]), near))
            hint = f"did you mean {near}?" if near else f"keys here: {', '.join(known)}"
            problems.append(Problem(path, f"unknown key {shown(key)}", hint))
    for detail in details:
        path = _path(detail["loc"])
        if detail["type"] == "missing":
            if path not in guessed:
                about = _schema_at(schema, detail["loc"]).get("description", "")
                problems.append(Problem(path, f"the key {detail['loc'][-1]!r} is missing", about.partition(". ")[0]))
        elif detail["type"] == "too_short" and any(_path(other["loc"]).startswith(f"{path}.") for other in details):
            pass  # pydantic counts the good items only
        elif detail["type"] != "extra_forbidden":
            problems.append(_typed(detail, path, source, schema))
    return problems


def _typed(detail: ErrorDetails, path: str, source: Source, schema: Mapping[str, Any]) -> Problem:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    at = _schema_at(schema, [part for part in detail["loc"] if part != "[key]"])
    expected = describe(at, schema)
    if kind == "mmpipe":
        return Problem(path, str(context["message"]), str(context["hint"]))
    if detail["loc"][-1] == "[key]":
        known = keys_of(_schema_at(schema, detail["loc"][:-2]))
        near = nearest(str(value), known)
        hint = f"did you mean {near}?" if near else f"keys here: {', '.join(known)}"
        return Problem(path, f"unknown key {shown(value)}", hint)
    raw = source.raw.get(path)
    if raw and kind in ("string_type", "literal_error"):
        nouns = {bool: f"the truth value {shown(value)}", int: "a number", float: "a number", type(None): "null"}
        message = f"YAML reads {raw} as {nouns.get(type(value), 'a date')}, and text is needed here"
        return Problem(path, message, f"choices: {expected}" if kind == "literal_error" else f'quote it: "{raw}"')
    if kind == "literal_error" and isinstance(value, str):
        near = nearest(value, re.findall(r"'([^']*)'", str(context["expected"])))
        return Problem(
            path,
            f"unknown value {shown(value)}",
            f"did you mean {near}? choices: {expected}" if near else f"choices: {expected}",
        )
    if kind == "invalid-json-value":
        return Problem(path, f"{shown(value)} is not text, a number, a list or a mapping", "quote it")
    hint = f'write {{model: "{value}"}}' if isinstance(value, str) and "model" in at.get("properties", {}) else ""
    if kind in ("float_type", "int_type") and isinstance(value, str):
        with contextlib.suppress(ValueError):
            if math.isfinite(float(value)):
                hint = f"this is text to YAML; without quotes: {float(value):.10f}".rstrip("0").rstrip(".")
    return Problem(path, f"expected {expected}, got {shown(value)}", hint)


def _path(loc: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in loc if part != "[key]")


def _schema_at(schema: Mapping[str, Any], loc: Sequence[int | str]) -> Mapping[str, Any]:
    at: Mapping[str, Any] = schema
    for part in loc:
        at = follow(at, schema)
        if isinstance(part, int):
            at = at.get("items", {})
        else:
            more = at.get("additionalProperties")
            at = at.get("properties", {}).get(part) or (more if isinstance(more, Mapping) else {})
    inner = follow(at, schema)
    return {**inner, **{key: at[key] for key in ("description", "default") if key in at}}


def follow(at: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Through references, and through `X or null` to X."""
    if "$ref" in at:
        return follow(schema["$defs"][at["$ref"].rpartition("/")[2]], schema)
    options = [option for option in at.get("anyOf", ()) if option.get("type") != "null"]
    return follow(options[0], schema) if len(options) == 1 else at


def keys_of(at: Mapping[str, Any]) -> list[str]:
    """The keys a schema's mapping may have."""
    return list(at.get("properties", ())) or list(at.get("propertyNames", {}).get("enum", ()))


def describe(at: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What a schema asks for, in words: "a number from 0 to 1"."""
    at = follow(at, schema)
    if "anyOf" in at:
        return " or ".join(dict.fromkeys(describe(option, schema) for option in at["anyOf"]))
    if "const" in at:
        return str(at["const"])
    if "enum" in at:
        return ", ".join(str(choice) for choice in at["enum"] if isinstance(choice, str))
    kind = at.get("type")
    if kind in ("integer", "number"):
        noun = "a whole number" if kind == "integer" else "a number"
        low, high = at.get("minimum"), at.get("maximum")
        if low is not None and high is not None:
            return f"{noun} from {low:g} to {high:g}" if kind == "number" else f"{noun} from {low} to {high}"
        above = f"{noun} above {at['exclusiveMinimum']}" if "exclusiveMinimum" in at else noun
        return above if high is None else f"{above} and at most {high:g}"
    if kind == "string":
        return (
            "a share (5%)"
            if "%" in at.get("pattern", "")
            else "a size (10GB)"
            if "KMGT" in at.get("pattern", "")
            else "text"
        )
    if kind == "array":
        least = at.get("minItems", 0)
        return "a list" if not least else f"a list of at least {least}"
    if kind == "object":
        keys = keys_of(at)
        least = " (at least one of them)" if at.get("minProperties") else ""
        return f"a mapping with the keys {', '.join(keys)}{least}" if keys else "a mapping"
    return {"boolean": "true or false", "null": "null"}.get(str(kind), "another value")
