"""The report of a calibration: what is promised, at what saving, and where it is weak; one file without network.

render ─► header · risk against saving · exits · reliability · classes · footer
            it draws with jobs/charts.py and writes with jobs/markup.py
"""

from __future__ import annotations

from pathlib import Path

from mmpipe.calibrating import words
from mmpipe.calibrating.certifying import Result, Told
from mmpipe.errors import OutputError
from mmpipe.jobs import charts
from mmpipe.jobs.markup import count, document, escape, percent, seconds, table, tag, user
from mmpipe.jobs.report_sections import section
from mmpipe.jobs.shards import replacing

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_COLOURS = 8  # x0 to x7 of the report's style
_CLASSES = 30
_WIDE, _HIGH = 1000.0, 300.0  # units of the curve's drawing


def write_page(path: Path, result: Result, title: str) -> None:
    """Write the report to `path`, which appears whole or not at all. OutputError where it can't."""
    try:
        with replacing(path) as temporary:
            temporary.write_text(render(result, title), encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error


def render(result: Result, title: str) -> str:
    """The whole document."""
    return document(
        f"{title} – mmpipe calibrate",
        (_header(result, title), _curve(result), _exits(result), _reliability(result), _classes(result)),
        _footer(result),
        policy=_POLICY,
        styles=(("mmpipe.jobs", "report.css"), ("mmpipe.calibrating", "page.css")),
    )


def _chip(index: int, name: str) -> str:
    breakable = escape(name, 60).replace("+", "+<wbr>").replace(".", ".<wbr>")
    return tag("span", tag("i", cls=f"swatch x{index % _COLOURS}") + tag("span", breakable), cls="chip")


def _header(result: Result, title: str) -> str:
    certified, calibration = result.certified, result.calibration
    told = [text for text in (words.promise(result), words.accuracy(result), words.second_look(result)) if text]
    figures = [
        (
            "may differ, at most",
            words.share(certified.max_disagreement),
            f"{words.share(certified.certainty)} certainty",
        ),
        ("differed in the test", words.share(certified.observed), f"of {count(len(certified.split.test), 'item')}"),
        ("of the time saved", words.share(certified.saving), "at the costs measured in this pass"),
    ]
    if calibration.expected is not None:
        spent = calibration.expected
        aside = f"{seconds(spent.seconds_full)} in full"
        figures.append(("an item", seconds(spent.seconds_with_exits), aside))
    cells = "".join(
        tag("div", tag("dt", escape(name)) + tag("dd", tag("b", escape(value)) + tag("span", escape(aside))))
        for name, value, aside in figures
    )
    return tag(
        "header",
        tag("p", user(title) + tag("span", "mmpipe calibrate"), cls="eyebrow")
        + tag("h1", escape(words.verdict(result), 400))
        + "".join(tag("p", escape(text, 900), cls="lede") for text in told)
        + tag("dl", cells, cls="figures"),
        cls="calibrated",
    )


def _curve(result: Result) -> str:
    """Observed disagreement against saving, point by point of the path that was tested."""
    certified = result.certified
    tested = len(certified.split.test)
    if not len(certified.path_KE):
        return ""
    risk_K, saving_K = certified.errors_K / max(tested, 1), certified.saving_K
    top = max(1.25 * certified.max_disagreement, min(float(risk_K.max()), 3 * certified.max_disagreement)) or 1.0
    right = max(float(saving_K.max()), 1e-9)

    def place(k: int) -> tuple[float, float]:
        x = _WIDE * max(float(saving_K[k]), 0.0) / right
        return x, _HIGH * (1 - min(float(risk_K[k]) / top, 1.0))

    points = [place(k) for k in range(len(risk_K))]
    limit = _HIGH * (1 - certified.max_disagreement / top)
    drawn = [f'<path class="bound" d="M0 {limit:.1f}H{_WIDE:.0f}"/>']
    drawn.append(f'<path class="way" d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>')
    for k, (x, y) in enumerate(points):
        kind = "chosen" if k == certified.point else "passed" if k < certified.passed else "failed"
        told = f"saves {words.share(float(saving_K[k]))}, {int(certified.errors_K[k]):,} of {tested:,} differ"
        drawn.append(
            f'<rect class="{kind}" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" rx="5">'
            f"<title>{escape(told)}</title></rect>"
        )
    title = f"Disagreement against saving; the limit is {words.share(certified.max_disagreement)}"
    svg = tag(
        "svg",
        f"<title>{escape(title)}</title>" + "".join(drawn),
        cls="curve",
        role="img",
        aria_label=title,
        viewBox=f"-10 -10 {_WIDE + 20:.0f} {_HIGH + 20:.0f}",
    )
    axis = tag("p", tag("span", "saves nothing") + tag("span", f"saves {words.share(right)}"), cls="ticks curve-ticks")
    legend = tag(
        "p",
        "".join(
            tag("span", tag("i", cls=f"swatch {kind}") + tag("span", name), cls="chip")
            for kind, name in (("chosen", "chosen"), ("passed", "certified"), ("failed", "not certified"))
        ),
        cls="legend",
    )
    intro = (
        f"Each point is one set of thresholds, from the surest on the left. {count(certified.passed, 'point')} of "
        f"{len(risk_K):,} passed, one after the other until the first that didn't; the dashed line is the limit of "
        f"{words.share(certified.max_disagreement)}. A point must lie well below it to pass."
    )
    return section("curve", "Disagreement against saving", svg + axis + legend, intro)


def _exits(result: Result) -> str:
    tested = len(result.certified.split.test)
    rows = []
    for index, one in enumerate(result.exits):
        lower = "nobody leaves" if one.threshold is None else f"{one.threshold:.4f}"
        part = charts.meter(one.left / max(tested, 1), f"{one.left:,} of {tested:,}", f"x{index % _COLOURS}")
        rows.append(
            [
                _chip(index, one.name),
                escape(lower),
                f"{one.temperature:.2f}",
                f"{one.looked_at:,}",
                tag("div", part + tag("b", percent(one.left, tested)), cls="sure"),
                f"{one.left:,}",
                f"{one.differed:,}",
            ]
        )
    head = ["exit", "#threshold", "#temperature", "#looked at", "answers", "#items", "#differ"]
    intro = f"On the {count(tested, 'item')} that the thresholds were tested on: {escape(words.left(result))}."
    return section("exits", "Where each exit lies", table(head, rows), intro)


def _reliability(result: Result) -> str:
    """Per exit: how sure it was, its threshold, and how often it agreed where it was so sure."""
    cells = []
    for index, one in enumerate(result.exits):
        bins = len(one.confidence)
        titles = [f"{i / bins:.2f}–{(i + 1) / bins:.2f}: {amount:,}" for i, amount in enumerate(one.confidence)]
        kind = f"x{index % _COLOURS}"
        drawing = charts.histogram(one.confidence, f"confidence of {one.name}, 0 to 1", kind, titles)
        ticks = tag("p", "".join(tag("span", tick) for tick in ("0", "0.5", "1")), cls="ticks")
        place = "nobody leaves" if one.threshold is None else f"leaves from {one.threshold:.3f}"
        top = tag("p", _chip(index, one.name) + tag("span", place))
        cells.append(tag("div", top + drawing + ticks + _agreement(one)))
    intro = (
        "How sure each exit is of the items that it looks at; below, how often it agrees with the full pipeline where "
        "its largest probability lies between these bounds. Well tempered, the two are close."
    )
    return section("reliability", "Reliability", tag("div", "".join(cells), cls="multiples"), intro)


def _agreement(one: Told) -> str:
    rows = [
        [
            f"{index / len(one.agreement):.1f}–{(index + 1) / len(one.agreement):.1f}",
            f"{n:,}",
            f"{sure:.3f}",
            f"{agree:.3f}",
        ]
        for index, (n, sure, agree) in enumerate(one.agreement)
        if n
    ]
    return table(["probability", "#items", "#mean", "#agree"], rows, cls="agreement")


def _classes(result: Result) -> str:
    rows = []
    for one in result.classes[:_CLASSES]:
        rate = one.errors / one.items
        rows.append(
            [
                user(result.scores.labels[one.label], 80),
                f"{one.items:,}",
                f"{one.errors:,}",
                words.share(rate),
                f"{words.share(one.low)} – {words.share(one.high)}",
            ]
        )
    if not rows:
        return ""
    intro = (
        "By the full pipeline's label, on the test items. The promise is about all items together: a class may be "
        "worse off. Intervals are exact, of 95%, each for its class alone."
    )
    head = ["class", "#items", "#differ", "#share", "#interval"]
    return section("classes", "Worst classes", table(head, rows, cls="worst"), intro)


def _footer(result: Result) -> str:
    scores, certified = result.scores, result.certified
    parts = certified.split
    rows = [
        ["model (without its exits)", tag("code", escape(scores.model))],
        ["number type, backend", escape(f"{scores.dtype}, {' and '.join(scores.backends)}")],
        ["items", escape(f"{scores.count:,}: {len(parts.learn):,} to learn from, {len(parts.test):,} to test on")],
        ["items without any answer", f"{scores.dropped:,}"],
        ["confidence", escape(result.calibration.confidence)],
        *[[escape(f"seconds of {name}"), f"{value:.6f}"] for name, value in scores.seconds.items()],
    ]
    method = (
        "Temperatures, order and thresholds come from the items to learn from. Learn then Test: the thresholds were "
        "tested on the others, from conservative down, by exact binomial p-values, until the first that failed."
    )
    return tag(
        "footer",
        tag(
            "details",
            tag("summary", "Method and figures") + tag("p", method) + table(["", ""], rows, cls="settings"),
            open="",
        ),
    )
