"""A plan's segments as one SVG: what runs at which stage, what it reads, where samples may leave.

              stage 0          stage 1
    image     ▭──────╮                          a row for each branch, the head's last
    text             │         ▭─────╮
    head             ╰──▭ ↓          ╰──▭ ↓     the head stands right of the encoders of its stage: all arrows go right
                      image            all      an exit leaves downwards

A line that is not straight leaves its source to the right, runs on a track under its row, and rises or falls in the
gap before its target: gaps and tracks hold no boxes, so that no line crosses one. The drawing takes its ink from
`currentColor` and its heat from the variable --heat; it needs nothing from outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape

from mmpipe.graphs.plan import HEAD, Plan, Segment

BOX_WIDTH, BOX_HEIGHT = 132.0, 62.0
GAP = 54.0  # between columns: what lines rise and fall in
MARGIN, HEADER, FOOTER = 14.0, 46.0, 44.0
LABELS = 124.0  # the branches' names and inputs at the left
ROW_GAP, TRACK = 14.0, 9.0
CORNER = 6.0

_STYLE = """
.mmplan { display: block; width: 100%; max-width: calc(1.25 * var(--natural)); height: auto; color: inherit;
  font: 12px system-ui, sans-serif; }
.mmplan text { fill: currentColor; }
.mmplan .name { font-weight: 600; font-size: 13px; }
.mmplan .soft { opacity: .72; }
.mmplan .band { fill: currentColor; fill-opacity: .045; }
.mmplan .box { fill: var(--heat, #d2690a); stroke: currentColor; stroke-opacity: .45; }
.mmplan .share { fill: var(--heat, #d2690a); }
.mmplan .edges { opacity: .55; }
.mmplan .line { fill: none; stroke: currentColor; stroke-width: 1.4; }
.mmplan .input { stroke-dasharray: 2 4; stroke-linecap: round; }
.mmplan .tip { fill: currentColor; }
.mmplan .exit { fill: none; stroke: currentColor; stroke-width: 2; }
.mmplan .exit-tip { fill: currentColor; }
.mmplan .hit { fill: none; stroke: transparent; stroke-width: 9; pointer-events: stroke; }
.mmplan .edge:hover .line { stroke-width: 3.5; }
"""


@dataclass(frozen=True)
class Edge:
    """What one target reads from one source. The source is a segment's name, or a row's for the caller's inputs."""

    source: str
    target: str
    values: tuple[str, ...]
    is_input: bool


def edges_of(plan: Plan) -> list[Edge]:
    """Who reads what from whom, in the plan's order. The caller's inputs are drawn from the row of their branch."""
    writer = {value: segment.name for segment in plan.segments for value in segment.writes}
    found: list[Edge] = []
    for segment in plan.segments:
        given: dict[str, list[str]] = {}
        for value in segment.inputs:
            given.setdefault(_owner(plan, value), []).append(value)
        read: dict[str, list[str]] = {}
        for value in segment.reads:
            read.setdefault(writer[value], []).append(value)
        found += [Edge(row, segment.name, tuple(values), True) for row, values in given.items()]
        found += [Edge(source, segment.name, tuple(values), False) for source, values in read.items()]
    return found


def as_svg(plan: Plan, *, seconds: Mapping[str, float] = {}) -> str:
    """The segments as a graph. `seconds`: segment → measured time; a box is as strong as its share of them."""
    return "".join(_Drawing(plan, seconds).parts())


def _owner(plan: Plan, value: str) -> str:
    return next((branch.name for branch in plan.branches if value in branch.inputs), HEAD)


class _Drawing:
    """Places boxes and tracks once, then draws. Columns: inputs, then for each stage encoders and head."""

    def __init__(self, plan: Plan, seconds: Mapping[str, float]) -> None:
        self.plan, self.seconds = plan, seconds
        self.whole = sum(seconds.get(segment.name, 0.0) for segment in plan.segments)
        used = dict.fromkeys(segment.branch for segment in plan.segments)
        self.rows = [b.name for b in plan.branches if b.name in used] + ([HEAD] if HEAD in used else [])
        self.columns = sorted({(segment.stage, segment.branch == HEAD) for segment in plan.segments})
        self.edges = edges_of(plan)
        self.tracks = self._tracks()
        lanes = {row: 1 + max((t for (r, _), t in self.tracks.items() if r == row), default=-1) for row in self.rows}
        self.tops: dict[str, float] = {}
        y = MARGIN + HEADER
        for row in self.rows:
            self.tops[row] = y
            y += BOX_HEIGHT + ROW_GAP + TRACK * lanes[row]
        self.bottom = y
        self.height = y + (FOOTER if plan.exits else MARGIN)
        self.width = self._left(len(self.columns)) - GAP + 2 * MARGIN

    def _left(self, column: int) -> float:
        return MARGIN + LABELS + GAP + column * (BOX_WIDTH + GAP)

    def _column(self, segment: Segment) -> int:
        return self.columns.index((segment.stage, segment.branch == HEAD))

    def _row(self, source: str) -> str:
        return source if source in self.rows else self.plan.segment(source).branch

    def _is_straight(self, edge: Edge) -> bool:
        """Whether the target is the next box in the source's row."""
        target = self.plan.segment(edge.target)
        if target.branch != self._row(edge.source):
            return False
        start = -1 if edge.is_input else self._column(self.plan.segment(edge.source))
        return not any(
            s.branch == target.branch and start < self._column(s) < self._column(target) for s in self.plan.segments
        )

    def _tracks(self) -> dict[tuple[str, str], int]:
        """(row, source) → the number of its track under the row. One source's lines share one."""
        found: dict[tuple[str, str], int] = {}
        for edge in self.edges:
            if not self._is_straight(edge):
                row = self._row(edge.source)
                found.setdefault((row, edge.source), sum(other == row for other, _ in found))
        return found

    def parts(self) -> Iterator[str]:
        words = f"{len(self.plan.segments)} segments in {self.plan.stages} stages"
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="mmplan" role="img" aria-label="{words}" '
            f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" style="--natural:{self.width:.0f}px">'
            f"<title>{words}</title><style>{_STYLE}</style>"
        )
        yield from self._bands()
        yield f'<g class="edges">{"".join(map(self._edge, self.edges))}</g>'
        for segment in self.plan.segments:
            yield self._box(segment)
        yield from self._exits()
        yield "</svg>"

    def _bands(self) -> Iterator[str]:
        """A band for each stage, with its name and its exit's, and the branches' names at the left."""
        for stage in range(self.plan.stages):
            here = [column for column, (number, _) in enumerate(self.columns) if number == stage]
            if not here:
                continue
            left = self._left(here[0]) - 8
            width = self._left(here[-1]) + BOX_WIDTH + 8 - left
            exit_ = self.plan.exits[stage].name if self.plan.exits else ""
            aside = f'<tspan class="soft"> · {_cut(exit_, width / 7 - 10)}</tspan>' if exit_ else ""
            yield (
                f"<g><title>stage {stage}{escape(f', exit {exit_}' if exit_ else '')}</title>"
                f'<rect class="band" x="{left:.1f}" y="{MARGIN}" width="{width:.1f}" rx="8" '
                f'height="{self.bottom - MARGIN:.1f}"/>'
                f'<text x="{left + 12:.1f}" y="{MARGIN + 24}">'
                f'<tspan class="name">stage {stage}</tspan>{aside}</text></g>'
            )
        for row in self.rows:
            middle = self.tops[row] + BOX_HEIGHT / 2
            values = sorted({v for e in self.edges if e.is_input and e.source == row for v in e.values})
            short = ", ".join(value.removeprefix(f"{row}.") for value in values)
            yield (
                f"<g><title>{escape(row)}: {escape(', '.join(values))}</title>"
                f'<text class="name" x="{MARGIN}" y="{middle - 3:.1f}">{_cut(row, 17)}</text>'
                f'<text class="soft" x="{MARGIN}" y="{middle + 13:.1f}">{_cut(short, 20)}</text></g>'
            )

    def _box(self, segment: Segment) -> str:
        left, top = self._left(self._column(segment)), self.tops[segment.branch]
        spent = self.seconds.get(segment.name)
        share = spent / self.whole if spent is not None and self.whole else 0.0
        told = [segment.name, f"{segment.nodes:,} nodes", f"writes {', '.join(segment.writes)}"]
        measured = ""
        if spent is not None:
            percent = "<1%" if 0 < share < 0.005 else f"{share:.0%}"
            told.insert(1, f"{_milliseconds(spent)}, {percent} of all segments")
            measured = (
                f'<text x="{left + 10:.1f}" y="{top + 51:.1f}">{_milliseconds(spent)}</text>'
                f'<text x="{left + BOX_WIDTH - 10:.1f}" y="{top + 51:.1f}" text-anchor="end">{escape(percent)}</text>'
                f'<rect class="share" x="{left:.1f}" y="{top + BOX_HEIGHT - 4:.1f}" width="{BOX_WIDTH * share:.1f}" '
                f'height="4"/>'
            )
        return (
            f"<g><title>{escape(' · '.join(told))}</title>"
            f'<rect class="box" x="{left:.1f}" y="{top:.1f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" '
            f'style="fill-opacity:{0.06 + 0.5 * share:.2f}"/>'
            f'<text class="name" x="{left + 10:.1f}" y="{top + 19:.1f}">{_cut(segment.name, 17)}</text>'
            f'<text class="soft" x="{left + 10:.1f}" y="{top + 35:.1f}">{segment.nodes:,} nodes</text>{measured}</g>'
        )

    def _edge(self, edge: Edge) -> str:
        target = self.plan.segment(edge.target)
        into = [other for other in self.edges if other.target == edge.target]
        # Lines arrive in the order of where they come from, so that they don't cross before the box.
        into.sort(key=lambda other: (self.rows.index(self._row(other.source)), not self._is_straight(other)))
        port = into.index(edge)
        x, top = self._left(self._column(target)), self.tops[target.branch]
        y = top + BOX_HEIGHT * (port + 1) / (len(into) + 1)
        row = self._row(edge.source)
        source = -1 if edge.is_input else self._column(self.plan.segment(edge.source))
        begin = self._left(source) + BOX_WIDTH
        middle = self.tops[row] + BOX_HEIGHT / 2
        turn = x - 14 - 6 * port if row != target.branch else x - 14 - 6 * (len(into) - 1 - port)
        if self._is_straight(edge):
            points = [(begin, middle), (turn, middle), (turn, y), (x, y)]
        else:
            track = self.tops[row] + BOX_HEIGHT + 9 + TRACK * self.tracks[row, edge.source]
            points = [(begin, middle), (begin + 9, middle), (begin + 9, track), (turn, track), (turn, y), (x, y)]
        path = _rounded(points)
        return (
            f'<g class="edge"><title>{escape(", ".join(edge.values))} → {escape(edge.target)}</title>'
            f'<path class="hit" d="{path}"/><path class="line{" input" if edge.is_input else ""}" d="{path}"/>'
            f'<path class="tip" d="M{x:.1f} {y:.1f}l-7 -3.5v7z"/></g>'
        )

    def _exits(self) -> Iterator[str]:
        """An arrow out of the box that writes an exit's logits."""
        for exit_ in self.plan.exits:
            segment = next(segment for segment in self.plan.segments if exit_.value in segment.writes)
            x, y = self._left(self._column(segment)) + BOX_WIDTH / 2, self.tops[segment.branch] + BOX_HEIGHT
            end = self.bottom + 12
            yield (
                f"<g><title>exit {escape(exit_.name)}: sees {escape(', '.join(exit_.sees))}</title>"
                f'<path class="exit" d="M{x:.1f} {y:.1f}V{end:.1f}"/>'
                f'<path class="exit-tip" d="M{x:.1f} {end + 6:.1f}l-5 -8h10z"/>'
                f'<text class="name" x="{x:.1f}" y="{end + 22:.1f}" text-anchor="middle">'
                f"{_cut(exit_.name, 24)}</text></g>"
            )


def _rounded(points: list[tuple[float, float]]) -> str:
    """A path of straight lines along the axes, with its corners rounded."""
    kept = [p for p, before in zip(points, [None, *points], strict=False) if p != before]
    made = [f"M{kept[0][0]:.1f} {kept[0][1]:.1f}"]
    for before, (x, y), after in zip(kept, kept[1:], kept[2:], strict=False):
        (ax, ay), (bx, by) = (_towards((x, y), other) for other in (before, after))
        made.append(f"L{ax:.1f} {ay:.1f}Q{x:.1f} {y:.1f} {bx:.1f} {by:.1f}")
    made.append(f"L{kept[-1][0]:.1f} {kept[-1][1]:.1f}")
    return "".join(made)


def _towards(point: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """The point a corner's radius away from `point`, at most half way to `other`; the two share a coordinate."""
    dx, dy = other[0] - point[0], other[1] - point[1]
    length = abs(dx) + abs(dy)
    part = min(CORNER / length, 0.5)
    return point[0] + dx * part, point[1] + dy * part


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.0995 else f"{1e3 * seconds:.2g} ms"


def _cut(text: str, length: float) -> str:
    """Escaped, and cut to what a box has room for; its title says it whole."""
    return escape(text if len(text) <= length else text[: max(1, int(length) - 1)] + "…")
