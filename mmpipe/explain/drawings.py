"""Drawings of the page that have two axes: a run's steps by stream, and scratch by step. HTML strings.

Positions are per cent of the drawing and words are not stretched, so that a drawing has any width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmpipe.explain.words import duration, size
from mmpipe.jobs.markup import count, escape, listed, tag

Kind = Callable[[str], str]  # a branch → the class that colours it

SPANS = 400  # steps that are drawn; beyond them, the first runs whose steps are no more
MEDIA = 1200  # decodings that are drawn
MAP_HEIGHT = 220.0  # CSS pixels of a memory map
_LINE = 17.0  # CSS pixels of a line of words in it


@dataclass(frozen=True)
class Window:
    """The part of a timeline that is drawn, and what it leaves out, in words ("" where that is nothing)."""

    spans: Sequence[Mapping[str, Any]]
    decoding: Sequence[Mapping[str, Any]]
    start: float
    end: float
    left_out: str


def window(timeline: Mapping[str, Any]) -> Window:
    """As many of the first runs as have SPANS steps together (one at least), and the decoding until they end."""
    spans, decoding = timeline["spans"], timeline["decoding"]
    steps: dict[int, int] = {}
    for span in sorted(spans, key=lambda span: span["start"]):
        steps[span["run"]] = steps.get(span["run"], 0) + 1
    kept, total = set[int](), 0
    for run, amount in steps.items():
        if kept and total + amount > SPANS:
            break
        kept.add(run)
        total += amount
    drawn = [span for span in spans if span["run"] in kept]
    end = max((span["end"] for span in drawn), default=max((one["end"] for one in decoding), default=0.0))
    ahead = sorted((one for one in decoding if one["start"] < end), key=lambda one: one["start"])
    start = min((one["start"] for one in (*drawn, *ahead)), default=0.0)
    told = []
    if len(kept) < len(steps):
        told.append(f"the first {count(len(kept), 'run')} of {len(steps):,}")
    if len(ahead) > MEDIA:
        told.append(f"the first {MEDIA:,} of {count(len(ahead), 'decoding')} until then")
    return Window(drawn, ahead[:MEDIA], start, end, listed(told))


def branch_of(step: str) -> str:
    """ "in:image@0" and "image@0/in/pixels" → image."""
    return step.rpartition(":")[2].partition("/")[0].partition("@")[0]


def timeline(view: Window, kind: Kind) -> str:
    """A row for each stream and for each worker that decodes, over one axis of time. "" where nothing was measured."""
    streams: dict[str, list[str]] = {}
    for span in sorted(view.spans, key=lambda span: span["start"]):
        staging = " staging" if ":" in span["step"] else ""
        words = f"{span['step']}: {duration(span['end'] - span['start'])}, {count(span['rows'], 'row')}"
        words += f" · run {span['run']}, lane {span['lane']}"
        cell = _span(view, span, kind(branch_of(span["step"])) + staging, words)
        streams.setdefault(f"stream {span['stream']}", []).append(cell)
    workers: dict[tuple[str, str], list[str]] = {}
    for one in view.decoding:
        words = f"{one['branch']}, decoded by worker {one['worker']}: {duration(one['end'] - one['start'])}"
        cell = _span(view, one, kind(one["branch"]), words)
        workers.setdefault((str(one["branch"]), str(one["worker"])), []).append(cell)
    rows = [_row(name, cells, "") for name, cells in streams.items()]
    in_order = sorted(workers, key=lambda who: (who[0], len(who[1]), who[1]))  # worker 2 before worker 10
    rows += [_row(f"decode {branch} {worker}", workers[branch, worker], " decoding") for branch, worker in in_order]
    if not rows:
        return ""
    whole = view.end - view.start
    ticks = "".join(tag("span", duration(whole * part)) for part in (0.0, 0.5, 1.0))
    return tag("div", "".join(rows) + tag("div", ticks, cls="axis"), cls="timeline")


def _row(name: str, cells: Sequence[str], kind: str) -> str:
    title = f"{name}: {count(len(cells), 'span')}"
    drawing = tag("svg", f"<title>{escape(title)}</title>" + "".join(cells), role="img", aria_label=title)
    return tag("div", tag("span", escape(name, 40)) + drawing, cls=f"row{kind}")


def _span(view: Window, span: Mapping[str, Any], kind: str, words: str) -> str:
    whole = max(view.end - view.start, 1e-12)
    start, end = (
        100 * (min(max(at, view.start), view.end) - view.start) / whole for at in (span["start"], span["end"])
    )
    return (
        f'<rect class="{kind}" x="{start:.3f}%" width="{max(end - start, 0.12):.3f}%" height="100%">'
        f"<title>{escape(words)}</title></rect>"
    )


def memory_map(stage: Mapping[str, Any], kind: Kind) -> str:
    """Scratch of one stage plan: a column for each step, offsets upwards, a rectangle for each buffer."""
    steps, whole = stage["steps"], stage["scratch_bytes"]
    if not steps or not whole:
        return ""
    lower = stage["lower_bound"]
    drawn = "".join(_buffer(buffer, len(steps), whole, kind) for buffer in stage["buffers"])
    at = 100 - 100 * lower / whole
    drawn += (
        f'<line class="bound" x2="100%" y1="{at:.3f}%" y2="{at:.3f}%"><title>lower bound: {size(lower)}</title></line>'
    )
    title = f"{stage['name']}: {count(len(stage['buffers']), 'buffer')} in {size(whole)}"
    picture = tag("svg", f"<title>{escape(title)}</title>{drawn}", role="img", aria_label=title, cls="map")
    names = "".join(
        tag("span", escape(step, 40).replace(":", ":<wbr>") + tag("small", size(_live(stage["buffers"], index))))
        for index, step in enumerate(steps)
    )
    box = tag("div", picture + tag("div", names, cls="steps"), cls="map-box", style=f"--steps:{len(steps)}")
    return tag("h3", escape(stage["name"])) + tag("p", _told(stage), cls="more") + tag("div", box, cls="scroll")


def _told(stage: Mapping[str, Any]) -> str:
    whole, lower, unshared = stage["scratch_bytes"], stage["lower_bound"], stage["unshared"]
    above = "the least that is possible" if whole <= lower else f"{whole / lower - 1:.1%} above the least possible"
    saved = f"; without sharing it would be {size(unshared)}, {unshared / whole:.1f} times as much"
    return f"{size(whole)}, {above if lower else 'with no bound known'}{saved if unshared > whole else ''}."


def _live(buffers: Sequence[Mapping[str, Any]], step: int) -> int:
    return sum(buffer["bytes"] for buffer in buffers if buffer["first"] <= step <= buffer["last"])


def _buffer(buffer: Mapping[str, Any], steps: int, whole: int, kind: Kind) -> str:
    """A nested svg, which cuts its words where the rectangle ends."""
    left, width = 100 * buffer["first"] / steps, 100 * (buffer["last"] + 1 - buffer["first"]) / steps
    top, height = 100 * (1 - (buffer["offset"] + buffer["bytes"]) / whole), 100 * buffer["bytes"] / whole
    words = f"{buffer['name']}: {size(buffer['bytes'])} at {size(buffer['offset'])}"
    lines = ""
    if height * MAP_HEIGHT / 100 >= _LINE:
        lines = f'<text x="7" y="{_LINE - 4:.0f}">{escape(buffer["name"], 60)}</text>'
    if height * MAP_HEIGHT / 100 >= 2 * _LINE:
        lines += f'<text class="size" x="7" y="{2 * _LINE - 4:.0f}">{size(buffer["bytes"])}</text>'
    written = " written" if "/out/" in buffer["name"] else ""
    return (
        f'<svg x="{left:.3f}%" y="{top:.3f}%" width="{width:.3f}%" height="{height:.3f}%">'
        f"<title>{escape(words)}</title>"
        f'<rect class="buffer {kind(branch_of(buffer["name"]))}{written}" width="100%" height="100%"/>{lines}</svg>'
    )
