"""fit.html: how a head was trained and what it is worth; one file without network and scripts.

render ─► header · baselines · subsets · exits · training · confusion · reliability · footer
            it draws with jobs/charts.py and writes with jobs/markup.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmpipe.fitting import words
from mmpipe.fitting.embedding import Embedded
from mmpipe.fitting.measuring import BINS, Measured, Reliability
from mmpipe.fitting.splitting import Split
from mmpipe.fitting.training import MAX_DISAGREEMENT, Fitted
from mmpipe.jobs import charts
from mmpipe.jobs.markup import count, document, escape, number, percent, seconds, table, tag, user
from mmpipe.jobs.report_sections import section

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_COLOURS = 8  # x0 to x7 of the report's style
_CLASSES = 20  # labels of which the confusion is drawn
_WIDE, _HIGH = 1000.0, 260.0  # units of the curve's drawing


@dataclass(frozen=True)
class Told:
    """All that the report tells of."""

    title: str
    labels: Sequence[str]
    fitted: Fitted
    measured: Measured
    split: Split
    embedded: Embedded
    seed: int
    notes: Sequence[str]


def render(told: Told) -> str:
    """The whole document."""
    return document(
        f"{told.title} – mmpipe fit",
        (
            _header(told),
            _baselines(told),
            _subsets(told),
            _exits(told),
            _training(told),
            _confusion(told),
            _reliability(told),
        ),
        _footer(told),
        policy=_POLICY,
        styles=(("mmpipe.jobs", "report.css"), ("mmpipe.fitting", "page.css")),
    )


def _chip(index: int, name: str) -> str:
    breakable = escape(name, 60).replace("+", "+<wbr>").replace(".", ".<wbr>")
    return tag("span", tag("i", cls=f"swatch x{index % _COLOURS}") + tag("span", breakable), cls="chip")


def _header(told: Told) -> str:
    measured, split = told.measured, told.split
    low, high = measured.full.interval
    figures = [
        ("right, of the test part", f"{measured.full.accuracy:.1%}", f"95%: {100 * low:.1f} to {100 * high:.1f}"),
        ("mean over labels", f"{measured.balanced:.1%}", count(len(told.labels), "label")),
        ("calibration error", f"{measured.reliability.error:.1%}", "confidence less accuracy"),
        ("samples trained on", f"{len(split.training):,}", f"{len(split.validation):,} to choose by"),
        ("samples to measure with", f"{len(split.test):,}", "no part in training or choosing"),
    ]
    cells = "".join(
        tag("div", tag("dt", escape(name)) + tag("dd", tag("b", escape(value)) + tag("span", escape(aside))))
        for name, value, aside in figures
    )
    return tag(
        "header",
        tag("p", user(told.title) + tag("span", "mmpipe fit"), cls="eyebrow")
        + tag("h1", escape(words.verdict(measured), 400))
        + tag("dl", cells, cls="figures"),
        cls="fitted",
    )


def _baselines(told: Told) -> str:
    measured = told.measured
    rows = [["<b>this head</b>", _meter(measured.full.accuracy, "x0"), words.accuracy(measured.full), "", ""]]
    for one in measured.baselines:
        rows.append(
            [
                escape(one.name),
                _meter(one.score.accuracy, "ink"),
                words.accuracy(one.score),
                f"{one.better:,} to {one.worse:,}",
                f"{one.p_value:.2g}",
            ]
        )
    intro = (
        "Each baseline was fitted on the same samples, its penalty chosen by the same others, and then fitted once "
        "more on both; all answer the same test part. Whoever lacks a modality gets the commonest label from it alone. "
        "“Only one right” counts the "
        "samples that just the head, or just the baseline, got right; p is the two-sided sign test of these."
    )
    head = ["", "", "#accuracy", "#only one right", "#p"]
    return section("baselines", "Against baselines", table(head, rows, cls="compared"), intro)


def _meter(share: float, kind: str) -> str:
    return charts.meter(share, percent(share), kind)


def _subsets(told: Told) -> str:
    rows = [
        [_chip(index, one.name), _meter(one.score.accuracy, f"x{index % _COLOURS}"), f"{one.score.count:,}",
         words.accuracy(one.score), f"{one.reliability.error:.1%}" if one.score.count else "–"]
        for index, one in enumerate(told.measured.subsets)
    ]  # fmt: skip
    intro = "The same head, shown only these modalities, on the test samples that have all of them."
    head = ["modalities", "", "#samples", "#accuracy", "#calibration error"]
    return section("subsets", "Every subset of modalities", table(head, rows, cls="compared"), intro)


def _exits(told: Told) -> str:
    measured = told.measured
    rows = [
        [_chip(index, left.name), "–" if left.threshold is None else f"{left.threshold:.4f}", f"{left.gated:,}",
         f"{left.left:,}", percent(left.left, left.gated), f"{left.differ:,}", words.accuracy(left.score)]
        for index, left in enumerate(measured.exits)
    ]  # fmt: skip
    if not rows:
        return ""
    intro = (
        "Thresholds were chosen on the validation part, which the head had not seen then, so that all exits together "
        f"differ from the full pipeline on at most {MAX_DISAGREEMENT:.0%} of it; the figures are of the test part. "
        "They promise nothing: <code>mmpipe calibrate</code> does. With these exits "
        f"{words.accuracy(measured.with_exits)} are right, without {words.accuracy(measured.full)}."
        + (f" {escape(broken)}." if (broken := words.exits_broken(measured)) else "")
    )
    head = ["exit", "#threshold", "#looked at", "#left", "#share", "#differ from full", "#accuracy, of all looked at"]
    return section("exits", "Exits", table(head, rows), intro)


def _training(told: Told) -> str:
    result = told.fitted.result
    first = 0 if told.fitted.kind == "transformer" else 1  # the transformer's history begins with its start
    if len(result.history) < 2:
        words_ = "This head has one best answer, found by regression: there are no epochs to show."
        return section("training", "Training", tag("p", words_))
    lines = {
        "training loss": ("x1", [epoch.training_loss for epoch in result.history]),
        "validation loss": ("x0", [epoch.validation_loss for epoch in result.history]),
    }
    top = 1.05 * max(max(values) for _, values in lines.values())
    step = _WIDE / (len(result.history) - 1)
    drawn = []
    for name, (kind, values) in lines.items():
        points = " L".join(f"{i * step:.1f} {_HIGH * (1 - value / top):.1f}" for i, value in enumerate(values))
        drawn.append(f'<path class="{kind} line" d="M{points}"><title>{name}</title></path>')
    drawn.append(f'<path class="mark" d="M{result.best_epoch * step:.1f} 0V{_HIGH:.0f}"><title>kept</title></path>')
    title = f"Losses over {len(result.history)} epochs; epoch {result.best_epoch + first} was kept"
    svg = tag("svg", f"<title>{title}</title>" + "".join(drawn), cls="curve", role="img", aria_label=title,
              viewBox=f"-6 -6 {_WIDE + 12:.0f} {_HIGH + 12:.0f}")  # fmt: skip
    legend = tag("p", "".join(_chip(1 - i, f"{name}, 0 to {top:.2f}") for i, name in enumerate(lines)), cls="legend")
    axis = tag(
        "p", tag("span", f"epoch {first}") + tag("span", f"epoch {len(result.history) - 1 + first}"), cls="ticks"
    )
    rows = [
        [f"{i + first}", f"{e.training_loss:.4f}", f"{e.validation_loss:.4f}", f"{e.validation_accuracy:.1%}"]
        for i, e in enumerate(result.history)
    ]
    numbers = table(["epoch", "#training loss", "#validation loss", "#validation accuracy"], rows)
    intro = (
        f"Mean cross entropy over every subset of modalities. Epoch {result.best_epoch + first}, the dashed line, lost "
        "least on the validation part, and stays. Each label weighs the same, however rare it is."
    )
    return section(
        "training", "Training", svg + axis + legend + tag("details", tag("summary", "As numbers") + numbers), intro
    )


def _confusion(told: Told) -> str:
    labels, confusion = told.labels, told.measured.confusion
    ranked = sorted(range(len(labels)), key=lambda i: -sum(confusion[i]))[:_CLASSES]
    shown = sorted(ranked)
    rows = []
    for true in shown:
        whole = sum(confusion[true])
        cells = [user(labels[true], 40)]
        for answered in shown:
            amount = confusion[true][answered]
            kind = "x0" if true == answered else "x2"
            words_ = f"{labels[true]} answered as {labels[answered]}: {amount:,} of {whole:,}"
            cells.append(f"{amount:,}" + charts.meter(amount / whole, words_, kind) if amount else "")
        cells.append(percent(confusion[true][true], whole))
        rows.append(cells)
    head = ["true", *(f"#{labels[i][:14]}" for i in shown), "#right"]
    intro = "Test samples by their true label (rows) and the head's answer (columns)."
    if len(labels) > len(shown):
        intro += f" The {len(shown)} labels with the most samples, of {len(labels):,}."
    return section("confusion", "Confusion", table(head, rows, cls="confusion"), intro)


def _reliability(told: Told) -> str:
    measured = told.measured
    drawn: list[tuple[str, Reliability]] = [(f"exit {left.name}", left.reliability) for left in measured.exits]
    drawn += [(one.name, one.reliability) for one in measured.subsets]
    cells = [
        tag("div", tag("p", _chip(index, name) + tag("span", f"error {one.error:.1%}")) + _diagram(name, one, index))
        for index, (name, one) in enumerate(drawn)
        if sum(one.counts)
    ]
    intro = (
        "How often the answer is right (height) where the confidence is so (from left to right, 0 to 1). On the dashed "
        "line the two agree; below it the head is surer than it should be. Bars of few samples are pale."
    )
    return section("reliability", "Reliability", tag("div", "".join(cells), cls="multiples"), intro)


def _diagram(name: str, one: Reliability, index: int) -> str:
    width, bars = 100 / BINS, []
    for i, (n, sure, right) in enumerate(zip(one.counts, one.confidences, one.accuracies, strict=True)):
        if n:
            told = f"{n:,} samples, confidence {sure:.2f}, right {right:.2f}"
            height = max(100 * right, 0.8)
            bars.append(
                f'<rect class="x{index % _COLOURS}" x="{i * width + 0.6:.1f}" y="{100 - height:.2f}" '
                f'width="{width - 1.2:.1f}" height="{height:.2f}" opacity="{1.0 if n >= 10 else 0.4}">'
                f"<title>{escape(told)}</title></rect>"
            )
    line = '<path class="mark" d="M0 100L100 0"/>'
    return tag("svg", f"<title>{escape(name)}</title>" + "".join(bars) + line, cls="reliability", role="img",
               aria_label=f"reliability of {name}", viewBox="0 0 100 100")  # fmt: skip


def _footer(told: Told) -> str:
    fitted, embedded = told.fitted, told.embedded
    weights = fitted.class_weights_L
    rows = [
        ["head", escape(f"{fitted.kind} {dict(fitted.options) or ''}")],
        ["embedding sizes", escape(", ".join(f"{name} {dim}" for name, dim in embedded.dims.items()))],
        ["embedding took", seconds(embedded.seconds)],
        ["weights of labels", f"{number(float(weights.min()))} to {number(float(weights.max()))} (balanced)"],
        ["probes", escape(", ".join(f"{n}: penalty {p.penalty:g}" for n, p in fitted.probes.items()) or "none")],
        ["seed", f"{told.seed}"],
    ]
    notes = "".join(tag("li", escape(note, 600)) for note in told.notes)
    parts = tag("details", tag("summary", "Notes") + tag("ul", notes), open="") if notes else ""
    return tag(
        "footer", parts + tag("details", tag("summary", "Method and figures") + table(["", ""], rows, cls="settings"))
    )
