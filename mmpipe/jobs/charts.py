"""Charts as inline SVG: numbers in, markup out. They hold no words but titles, so that they stretch to any width.

A part is (class, amount, title); its class gives the colour: x0, x1, … for exits, others in report.css.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmpipe.jobs.markup import escape, tag

Part = tuple[str, float, str]

_FLOW_WIDTH, _STREAM, _FALL = 1000.0, 116.0, 22.0  # units of the drawing; vertical ones are CSS pixels
_THINNEST = 2.0  # what is there is seen, however small


def stacked(parts: Sequence[Part], title: str, *, whole: float | None = None, cls: str = "bar") -> str:
    """One horizontal bar; its length is the sum of the parts out of `whole`, by default all of it."""
    total = sum(amount for _, amount, _ in parts)
    at, rects = 0.0, []
    for kind, amount, words in parts:
        if amount > 0:
            width = 100 * amount / total
            rects.append(
                f'<rect class="{kind}" x="{at:.3f}%" width="{width:.3f}%" height="100%">{_title(words)}</rect>'
            )
            at += width
    style = f"width:{100 * total / whole:.3f}%" if whole else None
    return _svg("".join(rects), title, cls=cls, style=style)


def meter(share: float, title: str, kind: str) -> str:
    """A share of one, 0..1, on a track."""
    width = 100 * min(max(share if share == share else 0.0, 0.0), 1.0)
    return _svg(f'<rect class="{kind}" width="{width:.2f}%" height="100%"/>', title, cls="meter")


def histogram(counts: Sequence[int], title: str, kind: str, bin_titles: Sequence[str]) -> str:
    """Columns side by side, scaled to the tallest."""
    tallest = max([*counts, 1])
    bars = "".join(
        f'<rect class="{kind}" x="{index + 0.08:.2f}" y="{100 - height:.2f}" width=".84" height="{height:.2f}">'
        f"{_title(words)}</rect>"
        for index, (amount, words) in enumerate(zip(counts, bin_titles, strict=True))
        if amount and (height := max(100 * amount / tallest, 2.5))
    )
    return _svg(bars, title, cls="histogram", box=f"0 0 {len(counts)} 100")


def flow(parts: Sequence[Part], title: str) -> str:
    """A stream from the left; at each column one part of it falls to the ground line and ends there.

    Column 0 is where the stream starts; part i ends at the left edge of column i + 1 of len(parts) + 1 equal ones.
    """
    whole = sum(amount for _, amount, _ in parts) or 1.0
    thick = [max(_STREAM * amount / whole, _THINNEST) if amount else 0.0 for _, amount, _ in parts]
    ground = sum(thick) + _FALL + max(thick, default=0.0)
    column = _FLOW_WIDTH / (len(parts) + 1)
    drawn = [f'<rect class="source" width="6" height="{sum(thick):.2f}"/>']
    top = sum(thick)
    for index, (kind, _, words) in enumerate(parts):
        if not thick[index]:
            continue
        top -= thick[index]  # the part that leaves first flows lowest, so that nothing crosses
        end, height = (index + 1) * column, thick[index]
        start, middle, low = end - column * 0.8, end - column * 0.4, ground - height
        drawn.append(
            f'<path class="{kind} ribbon" d="M6 {top:.2f}H{start:.2f}C{middle:.2f} {top:.2f} {middle:.2f} {low:.2f} '
            f"{end:.2f} {low:.2f}V{ground:.2f}C{middle:.2f} {ground:.2f} {middle:.2f} {top + height:.2f} "
            f'{start:.2f} {top + height:.2f}H6Z">{_title(words)}</path>'
            f'<rect class="{kind}" x="{end:.2f}" y="{low:.2f}" width="6" height="{height:.2f}"/>'
        )
    return _svg("".join(drawn), title, cls="flow", box=f"0 0 {_FLOW_WIDTH:.0f} {ground:.1f}", height=round(ground))


def waveform(peaks: Sequence[float], title: str) -> str:
    """Peaks 0..1, mirrored at the middle line."""
    tallest = max([*peaks, 1e-9])
    halves = [max(48 * peak / tallest, 1.0) for peak in peaks]
    bars = "".join(
        f'<rect x="{index + 0.2:.1f}" y="{50 - half:.1f}" width=".6" height="{2 * half:.1f}"/>'
        for index, half in enumerate(halves)
    )
    return _svg(bars, title, cls="waveform", box=f"0 0 {len(peaks)} 100")


def _svg(content: str, title: str, *, cls: str, box: str | None = None, **attributes: str | int | None) -> str:
    stretch = {"viewBox": box, "preserveAspectRatio": "none"} if box else {}
    label = _title(title)
    return tag("svg", label + content, cls=cls, role="img", aria_label=title, **stretch, **attributes)


def _title(words: str) -> str:
    return f"<title>{escape(words)}</title>" if words else ""
