"""The page's sections after the segments. Each takes what is explained, and is "" where there is nothing to tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from mmpipe.explain import drawings
from mmpipe.explain.words import duration, size
from mmpipe.jobs import charts
from mmpipe.jobs.markup import count, escape, percent, table, tag


class Colours(Protocol):
    """Branch → the class that colours it; `chip`: words beside that colour."""

    def __call__(self, branch: str, /) -> str: ...
    def chip(self, branch: str, words: str) -> str: ...


def section(name: str, title: str, content: str, intro: str = "") -> str:
    """A section of the page; `content` and `intro` are HTML."""
    if not content:
        return ""
    head = tag("h2", escape(title), id=name) + (tag("p", intro, cls="intro") if intro else "")
    return tag("section", head + content, aria_labelledby=name)


def timeline(explained: Mapping[str, Any], colours: Colours) -> str:
    """What ran when, on which stream, and who decoded beside it."""
    view = drawings.window(explained["timeline"])
    drawn = drawings.timeline(view, colours)
    branches = dict.fromkeys(
        [
            *(drawings.branch_of(span["step"]) for span in view.spans),
            *(one["branch"] for one in view.decoding),
        ]
    )
    legend = tag("p", "".join(colours.chip(name, name) for name in branches), cls="legend")
    shown = f"{duration(view.end - view.start)} of the run"
    shown += f": {view.left_out}" if view.left_out else ", all of it"
    intro = f"{shown}. Gaps in a row are time in which its stream had nothing to do, or waited. Copies are pale."
    return section("timeline", "The run", drawn and legend + drawn, escape(intro, 600))


def pool(explained: Mapping[str, Any], colours: Colours) -> str:
    """Scratch of each stage plan: which buffer lies where, from its first step to its last."""
    maps = [drawings.memory_map(stage, colours) for stage in explained["pool"]["stages"]]
    drawn = "".join(tag("div", one, cls="stage-map") for one in maps if one)
    intro = (
        "Steps from left to right, bytes upwards: a buffer's rectangle spans the steps from its first to its last use. "
        "The dashed line is the heaviest set of buffers that may be live at once: no plan can need less."
    )
    return section("pool", "Scratch, step by step", drawn, intro)


def memory(explained: Mapping[str, Any]) -> str:
    """What holds how many bytes."""
    held = {name: amount for name, amount in explained["memory"].items() if amount}
    whole = sum(held.values())
    most = max(held.values(), default=1)
    rows = [
        [
            escape(name, 60),
            charts.meter(amount / most, f"{name}: {size(amount)}", "ink"),
            size(amount),
            percent(amount, whole),
        ]
        for name, amount in sorted(held.items(), key=lambda item: -item[1])
    ]
    drawn = table(["what", "", "#bytes", "#share"], rows, cls="held") if rows else ""
    return section("memory", "Memory", drawn, f"{size(whole)} in all.")


def autos(explained: Mapping[str, Any]) -> str:
    """What `auto` became."""
    rows = [
        [tag("code", escape(one["key"])), tag("b", escape(one["value"])), escape(one["why"], 600)]
        for one in explained["autos"]
    ]
    intro = f"What {tag('code', 'auto')} became when the pipeline was built, and why."
    drawn = table(["key", "value", "why"], rows, cls="reasons") if rows else ""
    return section("autos", "What was chosen", drawn, intro)


def not_taken(explained: Mapping[str, Any]) -> str:
    """Fast paths that this pipeline on this machine can't use."""
    rows = [[tag("b", escape(one["what"])), escape(one["why"], 600)] for one in explained["not_taken"]]
    drawn = table(["what", "why"], rows, cls="reasons") if rows else ""
    return section("not-taken", "Fast paths not taken", drawn)


def passes(explained: Mapping[str, Any]) -> str:
    """What the passes took out of the graph."""
    rows = [[escape(name), f"{amount:,}"] for name, amount in explained["passes"].items()]
    drawn = table(["pass", "#nodes removed"], rows, cls="time") if rows else ""
    intro = (
        f"{count(sum(explained['passes'].values()), 'node')} fewer than the encoders and the head have by themselves."
    )
    return section("passes", "What the passes removed", drawn, intro)
