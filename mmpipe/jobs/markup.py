"""Text and numbers for a page of HTML: nothing a user's file says can leave its element."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from importlib import resources
from typing import Any

CUT = 200  # characters of a user's text that are shown

# What has no picture of its own: controls, halves of a character, non-characters.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_SPACES = re.compile(r"\s+")


def escape(value: Any, cut: int = CUT) -> str:
    """Any value as text for an element or a quoted attribute, cut to `cut` characters."""
    text = _SPACES.sub(" ", str(value)[: 4 * cut])
    if len(text) > cut or len(str(value)) > 4 * cut:
        text = text[: cut - 1].rstrip() + "…"
    return html.escape(_UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", text))


def user(value: Any, cut: int = CUT) -> str:
    """What a user wrote, kept from turning the words around it the other way."""
    return f'<bdi dir="auto">{escape(value, cut)}</bdi>'


def tag(name: str, content: str = "", **attributes: Any) -> str:
    """`<name …>content</name>`. Attributes are escaped, content is not; None leaves an attribute out, cls is class."""
    written = "".join(
        f' {"class" if key == "cls" else key.replace("_", "-")}="{escape(value, 100_000_000)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{content}</{name}>"


def document(title: str, body: Iterable[str], footer: str, *, policy: str, styles: Iterable[tuple[str, str]]) -> str:
    """A whole page: the parts of `body` that there are, after the styles (package, file) in their order."""
    style = "".join(resources.files(package).joinpath(name).read_text(encoding="utf-8") for package, name in styles)
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta name="robots" content="noindex">'
        f"<title>{escape(title)}</title><style>{style}</style>"
    )
    parts = "\n".join(part for part in body if part)
    content = f"<head>{head}</head>\n<body><main>{parts}</main>\n{footer}</body>"
    return f'<!doctype html>\n<html lang="en">{content}</html>\n'


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, cls: str | None = None) -> str:
    """A table of cells that are HTML already. A column whose head begins with # holds numbers."""
    names = list(head)
    kinds = ["number" if name.startswith("#") else None for name in names]
    top = "".join(
        tag("th", escape(name.lstrip("#")), scope="col", cls=kind) for name, kind in zip(names, kinds, strict=True)
    )
    body = "".join(
        tag("tr", "".join(tag("td", cell, cls=kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows
    )
    return tag("div", tag("table", tag("thead", tag("tr", top)) + tag("tbody", body), cls=cls), cls="scroll")


def number(value: float) -> str:
    """1234 → 1,234; 41.66 → 41.7; 0.0123 → 0.012."""
    if value != value or value in (float("inf"), float("-inf")):
        return "–"
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 1 else f"{value:.2g}"


def percent(part: float, whole: float = 1.0) -> str:
    """The share in per cent; what is not all and not nothing never reads 100% or 0%."""
    if not whole or whole != whole or part != part:
        return "–"
    share = 100 * part / whole
    if 0 < share < 1:
        return "<1%"
    return f"{min(share, 99):.0f}%" if 99 < share < 100 else f"{share:.0f}%"


def seconds(value: float) -> str:
    """0.141 → 141 ms; 3.2 → 3.2 s; 200 → 3 min 20 s; 4000 → 1 h 7 min."""
    if value < 0.9995:
        return f"{1000 * value:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(amount: int, noun: str) -> str:
    """1 file, 2 files, 1,000 classes."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{amount:,} {noun if amount == 1 else plural}"


def listed(words: Iterable[str], last: str = "and") -> str:
    """a; a and b; a, b and c."""
    *first, end = [*words] or [""]
    return f"{', '.join(first)} {last} {end}" if first else end
