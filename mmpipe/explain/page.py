"""explain.html: what is slow, what was chosen, what it holds; in one file without network and scripts.

render ─► header (the verdict) · time · segments · graph · sections.py · footer
            it draws with jobs/charts.py and drawings.py, and writes with jobs/markup.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from mmpipe.explain import sections
from mmpipe.explain.words import duration, rate, size
from mmpipe.jobs import charts
from mmpipe.jobs.markup import count, escape, listed, number, percent, table, tag, user

# Whatever a name may hold, the page can neither run nor load anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_COLOURS = 8  # x0 to x7 of the report's style
_NAMED = 0.05  # share of the wall time from which a segment has a name under the bar


def render(explained: Mapping[str, Any]) -> str:
    """The whole document. `explained["svg"]` is markup already; every other value is text or a number."""
    style = "".join(
        resources.files(package).joinpath(name).read_text(encoding="utf-8")
        for package, name in (("mmpipe.jobs", "report.css"), ("mmpipe.explain", "page.css"))
    )
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta name="robots" content="noindex">'
        f"<title>{escape(explained['title'])} – mmpipe explain</title><style>{style}</style>"
    )
    colours = Colours(explained)
    body = "\n".join(
        part
        for part in (
            _header(explained, colours),
            _segments(explained, colours),
            _graph(explained),
            sections.timeline(explained, colours),
            sections.pool(explained, colours),
            sections.memory(explained),
            sections.autos(explained),
            sections.not_taken(explained),
            sections.passes(explained),
        )
        if part
    )
    content = f"<head>{head}</head>\n<body><main>{body}</main>\n{_footer(explained)}</body>"
    return f'<!doctype html>\n<html lang="en">{content}</html>\n'


class Colours:
    """Branch → the class that gives it its colour, the same everywhere on the page. The head has none of the eight."""

    def __init__(self, explained: Mapping[str, Any]) -> None:
        decoded = (one["branch"] for one in explained["timeline"]["decoding"])
        names = dict.fromkeys((*(segment["branch"] for segment in explained["segments"]), *decoded))
        encoders = [name for name in names if name != "head"]
        self.kinds = {name: f"x{index % _COLOURS}" for index, name in enumerate(encoders)}

    def __call__(self, branch: str) -> str:
        return self.kinds.get(branch, "ink" if branch == "head" else "none")

    def chip(self, branch: str, words: str) -> str:
        return _chip(self(branch), words)


def _chip(kind: str, words: str, aside: str = "") -> str:
    return tag("span", tag("i", cls=f"swatch {kind}") + tag("span", escape(words, 60)) + aside, cls="chip")


def _header(explained: Mapping[str, Any], colours: Colours) -> str:
    where = tag("span", f"mmpipe explain · {escape(explained['machine'])}")
    advice = "".join(tag("li", escape(words, 600)) for words in explained["advice"])
    return tag(
        "header",
        tag("p", user(explained["title"]) + where, cls="eyebrow")
        + tag("h1", escape(explained["verdict"], 600))
        + (tag("ul", advice, cls="advice") if advice else "")
        + _time(explained, colours)
        + _figures(explained),
        cls="explain",
    )


def _parts(explained: Mapping[str, Any], colours: Colours) -> Iterator[tuple[str, str, float]]:
    """(class, name, seconds) of what the wall time went to: segments, the slowest first, then waiting and the rest.

    Segments that ran side by side share the time that any of them computed.
    """
    spent = explained["seconds"]
    segments = sorted(explained["segments"], key=lambda segment: -segment["seconds"])
    whole = sum(segment["seconds"] for segment in segments)
    small = 0.0
    for segment in segments:
        part = spent["compute"] * segment["seconds"] / whole if whole else 0.0
        if part >= _NAMED * spent["wall"] or segment is segments[0]:
            yield colours(segment["branch"]), segment["name"], part
        else:
            small += part
    yield "t3", "other segments", small
    yield "t0", "waiting for media", spent["waiting"]
    yield "track", "everything else", spent["other"]


def _time(explained: Mapping[str, Any], colours: Colours) -> str:
    """Where the wall time went: one bar, and its parts by name."""
    parts = [part for part in _parts(explained, colours) if part[2] > 0]
    whole = sum(amount for _, _, amount in parts)
    if not whole:
        return ""
    told = [(kind, amount, f"{name}: {duration(amount)}, {percent(amount, whole)}") for kind, name, amount in parts]
    title = "Time: " + listed(f"{name} {percent(amount, whole)}" for _, name, amount in parts)
    legend = "".join(_chip(kind, name, tag("b", percent(amount, whole))) for kind, name, amount in parts)
    return tag("div", charts.stacked(told, title), cls="thick wall") + tag("p", legend, cls="legend parts")


def _figures(explained: Mapping[str, Any]) -> str:
    spent = explained["seconds"]
    core, wall = spent["decode_core"], spent["wall"]
    figures = [
        ("samples a second", number(explained["items_per_second"]), f"{explained['items']:,} in {duration(wall)}"),
        ("computing", percent(spent["compute"], wall), duration(spent["compute"])),
        ("waiting for media", percent(spent["waiting"], wall), duration(spent["waiting"])),
        ("of core time decoding", duration(core), f"{core / wall:.1f} cores at a time" if wall else ""),
    ]
    cells = "".join(
        tag("div", tag("dt", escape(name)) + tag("dd", tag("b", value) + tag("span", escape(aside))))
        for name, value, aside in figures
    )
    answered = explained["answered_by"]
    whole = sum(answered.values())
    by_exit = ""
    if whole and len(answered) > 1:
        told = listed(f"{amount:,} ({percent(amount, whole)}) at {name}" for name, amount in answered.items())
        by_exit = tag("p", f"Samples left: {escape(told, 600)}.", cls="more")
    return tag("dl", cells, cls="figures") + by_exit


def _segments(explained: Mapping[str, Any], colours: Colours) -> str:
    """The segments, the slowest first: their share, and what of it their matrix products alone would take."""
    segments = sorted(explained["segments"], key=lambda segment: -segment["seconds"])
    if not segments:
        return ""
    exits = list(explained["answered_by"])
    rows = []
    for segment in segments:
        kind, share, products = colours(segment["branch"]), segment["share"], segment["products_share"]
        stage = segment["stage"]
        at = f"stage {stage}" + (f" · {exits[stage]}" if stage < len(exits) and len(exits) > 1 else "")
        full = f"{segment['flops'] / 1e9:,.3g} GFLOP"
        words = f"a full bucket takes {duration(segment['bucket_seconds'])}, its products ({full}) alone would take "
        words += duration(segment["products_seconds"])
        rows.append(
            [
                colours.chip(segment["branch"], segment["name"]) + tag("small", escape(at, 60)),
                duration(segment["seconds"]) + tag("small", count(segment["runs"], "run")),
                _bar(share, f"{segment['name']}: {percent(share)} of all segments' time", kind),
                _bar(products, words, "ink"),
                duration(segment["ms_per_row"] / 1e3) + tag("small", count(segment["rows"], "row")),
                rate(segment["gflops_per_second"]) + tag("small", f"{full} a bucket"),
                escape(segment["backend"], 40) + tag("small", f"workspace {size(segment['workspace_bytes'])}"),
            ]
        )
    head = ["segment", "#time", "share", "products alone", "#a row", "#rate", "backend"]
    return sections.section(
        "segments", "Segments, the slowest first", table(head, rows, cls="segments"), _slowest(segments[0])
    )


def _slowest(segment: Mapping[str, Any]) -> str:
    takes = f"{segment['name']} takes the most: {percent(segment['share'])} of all segments' time."
    products = f"Its matrix products alone would take {percent(segment['products_share'])} of that"
    rest = "" if segment["products_share"] >= 1 else "; the rest goes to other operations, memory and launches"
    return f"{escape(takes)} {escape(products)}{escape(rest)}."


def _bar(share: float, words: str, kind: str) -> str:
    return tag("div", charts.meter(share, words, kind) + tag("b", percent(share)), cls="sure")


def _graph(explained: Mapping[str, Any]) -> str:
    intro = "Stages from left to right, a row for each branch. The stronger a box, the more of the time it takes."
    drawing = tag("div", tag("div", explained["svg"], cls="plan-box"), cls="scroll") if explained["svg"] else ""
    return sections.section("graph", "The graph", drawing, intro)


def _footer(explained: Mapping[str, Any]) -> str:
    notes = "".join(tag("li", escape(note, 600)) for note in explained["notes"])
    parts = [tag("details", tag("summary", "Notes") + tag("ul", notes), open="")] if notes else []
    machine = {"machine": explained["machine"], **explained["versions"]}
    parts.append(_details("Machine and versions", machine))
    if explained["fingerprints"]:
        parts.append(_details("Fingerprints", explained["fingerprints"]))
    return tag("footer", "".join(parts))


def _details(title: str, values: Mapping[str, Any]) -> str:
    rows: Sequence[Sequence[str]] = [
        [escape(name), tag("code", escape(value if isinstance(value, str) else json.dumps(value, default=str), 600))]
        for name, value in values.items()
    ]
    return tag("details", tag("summary", escape(title)) + table(["key", "value"], rows, cls="settings"))
