"""The report's charts of a whole run: where samples left, by class, confidence, time, failures. HTML strings.

Every function takes what it tells of and returns "" where there is nothing to tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmpipe.jobs import charts
from mmpipe.jobs.markup import count, escape, listed, number, percent, seconds, table, tag, user

if TYPE_CHECKING:
    from mmpipe.jobs.tally import Tally

COLOURS = 8  # of exits in report.css; a ninth exit has the first one's again, and its name beside it as all do
CLASSES = 30  # labels shown, the most frequent first


def exit_kind(tally: Tally, name: str) -> str:
    """The class that gives an exit its colour, the same everywhere."""
    return f"x{tally.exits.index(name) % COLOURS}" if name in tally.exits else "none"


def chip(tally: Tally, name: str) -> str:
    """An exit's name beside its colour."""
    return _chip(exit_kind(tally, name), name)


def _chip(kind: str, words: str) -> str:
    breakable = escape(words, 60).replace("+", "+<wbr>").replace(".", ".<wbr>")
    return tag("span", tag("i", cls=f"swatch {kind}") + tag("span", breakable), cls="chip")


def section(name: str, title: str, content: str, intro: str = "") -> str:
    """A section of the page; `content` and `intro` are HTML."""
    if not content:
        return ""
    head = tag("h2", escape(title), id=name) + (tag("p", intro, cls="intro") if intro else "")
    return tag("section", head + content, aria_labelledby=name)


def exits(tally: Tally) -> str:
    """Where samples left, and how many files that opened."""
    answered = sum(tally.answered_by.values())
    without = tally.rows - answered
    if not tally.rows:
        return ""
    drawn = flow(tally, without) if len(tally.exits) > 1 and answered else ""
    intro = "Each exit answers what it is sure of; the rest goes on to the next." if drawn else ""
    return section("exits", "Where samples left" if drawn else "Files", drawn + _files(tally), intro)


def flow(tally: Tally, without: int) -> str:
    """The stream of samples, each exit's part leaving in its own colour, with the numbers underneath."""
    parts = [(exit_kind(tally, name), tally.answered_by[name], name) for name in tally.exits]
    cells = [tag("b", f"{tally.rows:,}") + _chip("source", "all samples")]
    reached = tally.rows - without
    for name in tally.exits:
        left = tally.answered_by[name]
        share = f"{percent(left, reached)} of the {reached:,} that came" if reached else "none came"
        share = f"the last {left:,}" if name == tally.exits[-1] and left else share
        cells.append(tag("b", f"{left:,}") + chip(tally, name) + tag("small", share))
        reached -= left
    if without:
        parts.append(("none", without, "no answer"))
        cells.append(tag("b", f"{without:,}") + _chip("none", "no answer"))
    told = listed(f"{tally.answered_by[name]:,} at {name}" for name in tally.exits)
    chart = charts.flow(
        [(kind, amount, f"{name}: {amount:,}") for kind, amount, name in parts], f"Samples left: {told}"
    )
    labels = "".join(tag("div", cell) for cell in cells)
    # The drawing's columns and the labels' are the same, at any width.
    wide = f"--columns:{len(cells)}"
    return tag(
        "div", tag("div", chart + tag("div", labels, cls="flow-labels"), cls="flow-box", style=wide), cls="scroll"
    )


def _files(tally: Tally) -> str:
    cells = []
    for name in tally.modalities:
        there, opened = tally.present[name], tally.reached(name)
        if there:
            never = f"{there - opened:,} never opened" if there > opened else "all opened"
            title = f"{name}: {opened:,} of {there:,} opened"
            bar = charts.stacked(
                [("ink", opened, "opened"), ("track", there - opened, "never opened")], title, cls="bar"
            )
            words = tag("b", escape(name)) + tag("span", f"{opened:,} of {there:,} opened")
            cells.append(tag("div", tag("p", words) + bar + tag("small", never)))
    return tag("div", "".join(cells), cls="files") if cells else ""


def classes(tally: Tally) -> str:
    """Answers by label, each bar split by the exit that answered."""
    ranked = sorted(tally.by_label.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    if not ranked:
        return ""
    most = sum(ranked[0][1].values())
    rows, many = [], len(tally.exits) > 1
    for label, by_exit in ranked[:CLASSES]:
        total = sum(by_exit.values())
        parts = [(exit_kind(tally, name), by_exit[name], f"{name}: {by_exit[name]:,}") for name in tally.exits]
        title = f"{label}: {listed(f'{by_exit[name]:,} at {name}' for name in tally.exits if by_exit[name])}"
        early = percent(total - by_exit[tally.exits[-1]], total)
        cells = [user(label, 80), charts.stacked(parts, title, whole=most), f"{total:,}"]
        rows.append([*cells, early] if many else cells)
    rest = ranked[CLASSES:]
    more = sum(sum(by_exit.values()) for _, by_exit in rest)
    tail = tag("p", f"And {count(len(rest), 'class')} more, with {count(more, 'answer')}.", cls="more") if rest else ""
    legend = tag("p", "".join(chip(tally, name) for name in tally.exits), cls="legend") if many else ""
    head = ["class", "answers", "#rows", "#early"] if many else ["class", "answers", "#rows"]
    title = "Exits by class" if many else "Answers by class"
    unseen = len(tally.labels) - len(ranked)
    intro = f"{count(unseen, 'label')} of {len(tally.labels):,} got no answer." if unseen > 0 else ""
    return section("classes", title, legend + table(head, rows, cls="classes") + tail, intro)


def confidence(tally: Tally) -> str:
    """One histogram for each exit that answered."""
    names = [name for name in tally.exits if sum(tally.confidence.get(name, []))]
    if not names:
        return ""
    bins = len(tally.confidence[names[0]])
    ranges = [f"{index / bins:.2f}–{(index + 1) / bins:.2f}" for index in range(bins)]
    cells = []
    for name in names:
        counts = tally.confidence[name]
        titles = [f"{span}: {amount:,}" for span, amount in zip(ranges, counts, strict=True)]
        drawing = charts.histogram(counts, f"confidence of {name}, 0 to 1", exit_kind(tally, name), titles)
        ticks = tag("p", "".join(tag("span", tick) for tick in ("0", "0.5", "1")), cls="ticks")
        head = tag("p", chip(tally, name) + tag("span", count(sum(counts), "answer")))
        cells.append(tag("div", head + drawing + ticks))
    filled = [index for index in range(bins) if any(tally.confidence[name][index] for name in names)]
    numbers = table(
        ["confidence", *(f"#{name}" for name in names)],
        [[ranges[index], *(f"{tally.confidence[name][index]:,}" for name in names)] for index in filled],
    )
    fallback = tag("details", tag("summary", "As numbers") + numbers)
    intro = "How sure the answer was, by the exit that gave it. Each chart is scaled to its own tallest column."
    return section("confidence", "Confidence", tag("div", "".join(cells), cls="multiples") + fallback, intro)


def time_parts(run: Mapping[str, Any]) -> dict[str, float]:
    """Where a run's seconds went, the most first; the last is what none of the clocks saw. Of several processes the
    mean."""
    spent: Mapping[str, Any] = run.get("seconds", {})
    processes = _processes(run)
    parts: dict[str, float] = {}
    for name, value in spent.get("segments", {}).items():
        branch = name.split("@")[0]
        words = "fusion head" if branch == "head" else f"{branch} encoder"
        parts[words] = parts.get(words, 0.0) + value / processes
    parts["waiting for media"] = spent.get("waiting", 0.0) / processes
    parts["writing results"] = spent.get("write", 0.0)
    parts = dict(sorted(parts.items(), key=lambda item: -item[1]))
    rest = spent.get("total", 0.0) - sum(parts.values())
    if rest > 0:
        parts["everything else"] = rest
    return {name: value for name, value in parts.items() if value > 0}


def time(run: Mapping[str, Any]) -> str:
    """Where the seconds went, and what bounds the run."""
    parts = time_parts(run)
    whole = sum(parts.values())
    if not whole:
        return ""
    kinds = {name: f"t{min(index, 5)}" for index, name in enumerate(parts)}
    if "everything else" in parts:
        kinds["everything else"] = "track"
    told = [(kinds[name], value, f"{name}: {seconds(value)}") for name, value in parts.items()]
    bar = charts.stacked(told, "Time: " + listed(f"{name} {percent(value, whole)}" for name, value in parts.items()))
    rows = [
        [
            _chip(kinds[name], name),
            seconds(value),
            percent(value, whole),
        ]
        for name, value in parts.items()
    ]
    spent = run.get("seconds", {})
    asides = [bounded_by(parts)]
    if spent.get("decode"):
        where = f"In {_processes(run)} processes" if _processes(run) > 1 else "Beside it"
        asides.append(f"{where}, media were read and decoded for {seconds(spent['decode'])} of processor time.")
    if spent.get("fuse"):
        asides.append(f"Loading and fusing the models took {seconds(spent['fuse'])} before that.")
    content = tag("div", bar, cls="thick") + table(["part", "#time", "#share"], rows, cls="time")
    return section("time", "Time", content, " ".join(asides))


def _processes(run: Mapping[str, Any]) -> int:
    return int(run.get("resolved", {}).get("processes", 1))


def bounded_by(parts: Mapping[str, float]) -> str:
    """What would have to get faster, in a sentence. `parts` as of `time_parts`."""
    whole = sum(parts.values())
    groups = {"waiting for media": 0.0, "writing results": 0.0, "everything else": 0.0, "models": 0.0}
    for name, value in parts.items():
        groups[name if name in groups else "models"] += value
    largest = max(groups, key=lambda name: groups[name])
    share = percent(groups[largest], whole)
    if largest == "models":
        name = max((name for name in parts if name not in groups), key=lambda name: parts[name])
        return f"Computing bounds this run: the models took {share} of the time, the {name} most of all."
    if largest == "waiting for media":
        return f"Reading and decoding media bounds this run: the models waited for it {share} of the time."
    if largest == "writing results":
        return f"Writing results bounds this run: it took {share} of the time."
    return f"Neither models nor media bound this run: {share} of the time went into everything around them."


def failures(tally: Tally) -> str:
    """What could not be used, and why."""
    if not tally.failures and not tally.errors:
        return ""
    failed, partial = tally.status["failed"], tally.status["partial"]
    told = []
    if failed:
        told.append(f"{count(failed, 'sample')} could not be answered")
    if partial:
        told.append(f"{partial:,} {'was' if partial == 1 else 'were'} answered from what was left")
    codes = [[tag("code", escape(code, 60)), number(amount)] for code, amount in tally.errors.most_common()]
    rows = [
        [user(row.id), escape(row.status), "<br>".join(user(part) for part in (row.error or "").split("; "))]
        for row in tally.failures
    ]
    listing = table(["sample", "status", "reason"], rows, cls="failures")
    more = failed + partial - len(rows)
    tail = tag("p", f"And {more:,} more: see the column <code>error</code>.", cls="more") if more > 0 else ""
    intro = f"{listed(told)}. Every one has a row in the results, with its reason." if told else ""
    return section("failures", "What failed", table(["reason", "#files"], codes, cls="codes") + listing + tail, intro)
