"""Single samples in the report, with the media that were opened: stories with their trace, cards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmpipe.jobs import charts
from mmpipe.jobs.markup import count, escape, listed, percent, tag, user
from mmpipe.jobs.media_cells import MediaCells
from mmpipe.jobs.report_sections import chip, exit_kind, section

if TYPE_CHECKING:
    from mmpipe.jobs.tally import Shown, Step, Story, Tally

_KINDS = ("first", "decided", "settled")
_TOP = 3
_LONG = 4  # looks in a trace, above which those that changed nothing are left out


def stories(tally: Tally, cells: MediaCells) -> str:
    """The samples whose trace shows what exits are for."""
    told = [_story(tally, tally.stories[kind], cells) for kind in _KINDS if kind in tally.stories]
    intro = "From this run: what each exit saw, what it thought, and where the sample left."
    return section("stories", "What exits are for", "".join(told), intro)


def samples(tally: Tally, cells: MediaCells) -> str:
    """Cards: some at random, and the least sure."""
    is_all = len(tally.drawn) == tally.rows - tally.status["failed"]
    if is_all:  # so few that both lists hold the same
        unsure = {shown.sample.id for shown in tally.unsure}
        others = [shown for shown in tally.drawn if shown.sample.id not in unsure]
        title = "Samples, the least sure first" if tally.unsure else "Samples"
        return section("samples", title, _cards(tally, [*tally.unsure, *others], cells))
    return section("unsure", "The least sure", _cards(tally, tally.unsure, cells)) + section(
        "samples", "Drawn at random", _cards(tally, tally.drawn, cells)
    )


def _story(tally: Tally, story: Story, cells: MediaCells) -> str:
    shown = story.shown
    title, words = _told(story)
    looks = _looks(shown.steps)
    columns = [_step(tally, shown, step, new, cells, is_last=step is shown.steps[-1]) for step, new in looks]
    for modality in shown.prediction.skipped:
        cell = cells.cell(shown.sample, shown.prediction, modality)
        columns.append(tag("li", tag("div", cell, cls="media"), cls="never"))
    if left_out := len(shown.steps) - len(looks):
        are = "is" if left_out == 1 else "are"
        words += f" {count(left_out, 'look')} between, which changed nothing, {are} left out."
    head = tag("h3", title) + tag("p", words) + tag("p", user(shown.sample.id), cls="id")
    return tag(
        "article",
        head + tag("ol", "".join(columns), cls="trace", style=f"--columns:{max(3, len(columns))}"),
        cls="story",
    )


def _looks(steps: Sequence[Step]) -> list[tuple[Step, list[str]]]:
    """The steps to show, each with the modalities that were opened for it. A long trace is cut to its turns."""
    looks, seen, before = [], set[str](), ""
    for step in steps:
        new = [modality for modality in step.opened if modality not in seen]
        if len(steps) <= _LONG or new or step.label != before or step is steps[-1]:
            looks.append((step, new))
        seen.update(new)
        before = step.label
    return looks


def _told(story: Story) -> tuple[str, str]:
    """A story's title, and its gist."""
    shown, last, first = story.shown, story.shown.steps[-1], story.shown.steps[0]
    said = {step.exit: f"“{user(step.label, 60)}” ({percent(step.confidence)})" for step in shown.steps}
    if story.kind == "first":
        never = listed(shown.prediction.skipped)
        verb = "was" if len(shown.prediction.skipped) == 1 else "were"
        return f"The {_saw(last)} was enough", f"{said[last.exit]}; its {escape(never)} {verb} never opened."
    before = shown.steps[-2]
    new = [modality for modality in last.opened if modality not in before.opened]
    what = f"The {escape(listed(new))}" if new else f"A deeper look ({escape(last.exit)})"
    if story.kind == "decided":
        changed = "changed that to" if first.label != last.label else "made sure of that:"
        gist = f"The {_saw(first)} alone said {said[first.exit]}; what came next {changed} {said[last.exit]}."
        return f"{what} decided", gist
    end = "and that was confirmed:" if before.label == last.label else "in the end"
    gist = f"First it looked like {said[first.exit]}, then like {said[before.exit]}; {end} {said[last.exit]}."
    return f"{what} settled it", gist


def _saw(step: Step) -> str:
    return escape(listed(step.opened) if step.opened else step.exit)


def _step(tally: Tally, shown: Shown, step: Step, new: Sequence[str], cells: MediaCells, *, is_last: bool) -> str:
    media = "".join(cells.cell(shown.sample, shown.prediction, modality) for modality in new)
    media = media or tag("figure", tag("span", "nothing new opened"), cls="cell note used")
    left = tag("em", "left here") if is_last else ""
    return tag(
        "li",
        tag("div", media, cls="media")
        + tag("p", chip(tally, step.exit) + left, cls="exit")
        + tag("p", user(step.label, 60), cls="label")
        + _sure(step.confidence, exit_kind(tally, step.exit)),
        cls=f"step{' last' if is_last else ''}",
    )


def _sure(confidence: float, kind: str) -> str:
    """How sure, as a bar and a number."""
    return tag(
        "div",
        charts.meter(confidence, f"confidence {percent(confidence)}", kind) + tag("b", percent(confidence)),
        cls="sure",
    )


def _cards(tally: Tally, many: Sequence[Shown], cells: MediaCells) -> str:
    return tag("div", "".join(_card(tally, shown, cells) for shown in many), cls="cards") if many else ""


def _card(tally: Tally, shown: Shown, cells: MediaCells) -> str:
    prediction = shown.prediction
    media = "".join(cells.cell(shown.sample, prediction, modality) for modality in tally.modalities)
    exit_name = prediction.answered_by or ""
    kind = exit_kind(tally, exit_name)
    answer = ""
    if prediction.label is not None:
        answer = tag("p", user(prediction.label, 60), cls="label")
        if prediction.confidence is not None:
            answer += _sure(prediction.confidence, kind)
    others = [(label, share) for label, share in prediction.top_k[:_TOP] if label != prediction.label]
    if others:
        items = "".join(tag("li", user(label, 60) + tag("span", percent(share))) for label, share in others)
        answer += tag("ul", items, cls="others")
    marks = chip(tally, exit_name) if exit_name else ""
    if prediction.deliberated:
        marks += tag("em", "looked again")
    if prediction.status != "ok":
        marks += tag("em", escape(prediction.status))
    foot = tag("p", marks, cls="exit") if marks else ""
    return tag(
        "article",
        tag("div", media, cls="media") + answer + foot + tag("p", user(shown.sample.id), cls="id"),
        cls="card",
    )
