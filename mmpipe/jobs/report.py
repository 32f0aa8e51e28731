"""report.html: what a person wants to know of a run, in one file without network and scripts.

write_report ─► page ─► header · report_sections (the run's charts) · report_cards (samples) · footer
                          both draw with charts.py, write with markup.py, and show media through media_cells.py
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpipe.jobs import report_cards, report_checks, report_sections
from mmpipe.jobs.markup import count, document, escape, number, percent, seconds, table, tag, user
from mmpipe.jobs.media_cells import MediaCells
from mmpipe.media import Limits

if TYPE_CHECKING:
    from mmpipe.jobs.tally import Tally

# Whatever a user's text may hold, the page can neither run nor load anything.
_POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)


def write_report(
    path: Path, tally: Tally, run: Mapping[str, Any], *, title: str, thumbnails: bool, limits: Limits
) -> None:
    """Write the report of a run to `path`, which appears whole or not at all.

    run: the content of run.json. thumbnails=False: no medium is opened, and only the samples' ids are shown of them.
    Media are opened within `limits`, and only those that the pipeline used; what can't be shown is said so in its
    place. Raises OSError where `path` can't be written.
    """
    text = page(tally, run, title=title, cells=MediaCells(thumbnails, limits))
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # a temporary file is its owner's alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def page(tally: Tally, run: Mapping[str, Any], *, title: str, cells: MediaCells) -> str:
    """The whole document."""
    return document(
        f"{title} – mmpipe report",
        (
            _header(tally, run, title),
            report_sections.exits(tally),
            report_cards.stories(tally, cells),
            report_sections.classes(tally),
            report_sections.confidence(tally),
            report_checks.deliberation(tally, run),
            report_checks.audit(run),
            report_sections.time(run),
            report_sections.failures(tally),
            report_cards.samples(tally, cells),
        ),
        _footer(run),
        policy=_POLICY,
        styles=(("mmpipe.jobs", "report.css"),),
    )


def headline(tally: Tally) -> str:
    """The run in one sentence, as plain text."""
    rows, answered = tally.rows, sum(tally.answered_by.values())
    done = "answered" if tally.labels else "embedded"
    if not rows:
        return "No sample was run."
    if not answered:
        return (
            f"{count(rows, 'sample')}, and none could be {done}."
            if rows > 1
            else f"1 sample, which could not be {done}."
        )
    first, early = tally.exits[0], answered - tally.answered_by[tally.exits[-1]]
    head = f"{count(rows, 'sample')}: {'all ' if answered == rows > 1 else '' if rows == 1 else f'{answered:,} '}{done}"
    if len(tally.exits) < 2:
        return f"{head}."
    them = "" if answered == 1 else " of them"
    if first in tally.modalities and tally.answered_by[first]:
        amount = "" if answered == 1 else f" {tally.answered_by[first]:,}{them}"
        return f"{head},{amount} from the {first} alone."
    if early:
        return f"{head},{'' if answered == 1 else f' {early:,}{them}'} before the last exit."
    return f"{head}, none{them} early."


def _header(tally: Tally, run: Mapping[str, Any], title: str) -> str:
    banner = ""
    if run.get("interrupted"):
        words = f"This run was interrupted. It tells of the {count(tally.rows, 'sample')} that were done by then."
        banner = tag("p", words, cls="banner", role="status")
    there = sum(tally.present.values())
    never = there - sum(tally.reached(name) for name in tally.modalities)
    lede = ""
    if never and len(tally.exits) > 1:
        were = "was" if never == 1 else "were"
        words = f"Of {count(there, 'file')}, {never:,} {were} never opened, because an earlier exit was sure."
        lede = tag("p", words, cls="lede")
    figures = "".join(
        tag("div", tag("dt", escape(name)) + tag("dd", tag("b", value) + tag("span", escape(aside))))
        for name, value, aside in _figures(tally, run, there, never)
    )
    return tag(
        "header",
        tag("p", user(title) + tag("span", "mmpipe report"), cls="eyebrow")
        + banner
        + tag("h1", escape(headline(tally)))
        + lede
        + tag("dl", figures, cls="figures"),
    )


def _figures(tally: Tally, run: Mapping[str, Any], there: int, never: int) -> list[tuple[str, str, str]]:
    """(name, value, aside) of the numbers at the top."""
    answered = sum(tally.answered_by.values())
    early = answered - tally.answered_by[tally.exits[-1]]
    figures = [("samples", f"{tally.rows:,}", f"{answered:,} {'answered' if tally.labels else 'embedded'}")]
    if len(tally.exits) > 1 and answered:
        figures.append(("answered early", percent(early, answered), f"{early:,} of {answered:,}"))
        figures.append(("files never opened", f"{never:,}", f"{percent(never, there)} of {there:,}"))
    if run.get("items_per_second"):
        total = run.get("seconds", {}).get("total")
        figures.append(("samples a second", number(run["items_per_second"]), f"in {seconds(total)}" if total else ""))
    if tally.recalled:
        known, looked = tally.recalled.total(), tally.recalled.total() + tally.missed.total()
        figures.append(("known already", percent(known, looked), f"{known:,} of {looked:,} embeddings"))
    figures.append(("failed", f"{tally.status['failed']:,}", f"{tally.status['partial']:,} partial"))
    return figures


def _footer(run: Mapping[str, Any]) -> str:
    parts = [
        _details(title, {name: run[key][name] for name in run[key]})
        for key, title in (
            ("resolved", "Settings, as resolved"),
            ("versions", "Versions"),
            ("fingerprints", "Fingerprints"),
        )
        if run.get(key)
    ]
    notes = "".join(tag("li", escape(note, 600)) for note in run.get("notes", []))
    if notes:
        parts.insert(0, tag("details", tag("summary", "Notes") + tag("ul", notes), open=""))
    return tag("footer", "".join(parts)) if parts else ""


def _details(title: str, values: Mapping[str, Any]) -> str:
    rows = [[escape(name), tag("code", escape(_plain(value), 600))] for name, value in values.items()]
    return tag("details", tag("summary", title) + table(["key", "value"], rows, cls="settings"))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
