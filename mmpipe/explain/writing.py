"""What was explained → files and a few lines for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmpipe.errors import OutputError
from mmpipe.explain.page import render
from mmpipe.explain.words import duration
from mmpipe.graphs.draw import as_trace
from mmpipe.runtime.ledger import Span

_LISTED = 5  # segments and fast paths that a terminal shows


def write_page(path: Path, explained: Mapping[str, Any]) -> None:
    """The page, whole or not at all."""
    _write(path, render(explained))


def write_trace(path: Path, explained: Mapping[str, Any]) -> None:
    """The run as a trace that Perfetto and chrome://tracing open."""
    spans = [Span(**span) for span in explained["timeline"]["spans"]]
    _write(path, json.dumps(as_trace(spans)))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error


def summary(explained: Mapping[str, Any]) -> str:
    """Verdict, the slowest segments, the fast paths that were not taken."""
    lines = [explained["verdict"], *(f"  {line}" for line in explained["advice"]), ""]
    slowest = sorted(explained["segments"], key=lambda segment: -segment["seconds"])[:_LISTED]
    width = max((len(segment["name"]) for segment in slowest), default=0)
    for segment in slowest:
        lines.append(
            f"  {segment['name']:<{width}}  {segment['share']:>4.0%}  {duration(segment['seconds']):>8}"
            f"  {segment['rows']:>5} rows  products alone {segment['products_share']:>4.0%}"
        )
    lines += ["", "not taken:"]
    lines += [f"  {path['what']}: {path['why']}" for path in explained["not_taken"][:_LISTED]]
    return "\n".join(lines)
