"""A plan for people: every segment, wait and exit is there, nothing overlaps, and names stay words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from support.explained import plan
from support.parts import PARTS, fused

from mmpipe.graphs.cut import cut
from mmpipe.graphs.draw import as_svg, as_text, as_trace, size
from mmpipe.graphs.draw_svg import edges_of
from mmpipe.graphs.fuse import ExitSpec, Probe
from mmpipe.graphs.plan import Plan

SVG = "{http://www.w3.org/2000/svg}"


def deep() -> Plan:
    """A plan with exits inside the image's encoder: segments of one row, of which each carries something on."""
    probes = [
        ExitSpec(f"image.layer{layer}", ("image",), probe=Probe("image", layer, torch.ones(5, 16), torch.zeros(5)))
        for layer in (1, 2)
    ]
    return cut(fused(PARTS, [*probes, ExitSpec("image+text", ("image", "text"))])).plan


def drawn(made: Plan, **seconds: float) -> ElementTree.Element:
    return ElementTree.fromstring(as_svg(made, seconds=seconds))


def groups(root: ElementTree.Element, kind: str) -> dict[str, ElementTree.Element]:
    """Title → the rectangle or path of that class."""
    found = {}
    for group in root.iter(f"{SVG}g"):
        title, shape = group.find(f"{SVG}title"), group.find(f"*[@class='{kind}']")
        if title is not None and shape is not None:
            found[title.text or ""] = shape
    return found


def test_text_says_every_segment_step_and_wait() -> None:
    made = plan()
    text = as_text(made)
    first, *rest = text.splitlines()
    assert first == "3 stages, 6 segments, 2 lanes, 64 slots"
    assert "stage 1, exit image+text (sees image, text)" in rest
    assert any(
        re.fullmatch(r"  head@2 +\d+ nodes  presence, mean, div, mean_1 → .*  \[every live row\]", r) for r in rest
    )
    for stage_plan in made.stage_plans:
        assert f"{stage_plan.name}: 6 steps, {size(stage_plan.scratch_bytes)} of scratch" in rest
        for step in stage_plan.steps:
            own = re.compile(rf"  ({step.stream})? +{step.name}( |$)")
            line = next(line for line in rest if own.match(line) and "node" not in line)
            assert step.waits == tuple(re.findall(r"after (\S+)", line))
            assert line.endswith("⏎") == (step.name in stage_plan.ends)
    assert all(line == line.rstrip() for line in rest)


def test_text_of_a_stream_is_in_its_order() -> None:
    stage_plan = plan().stage_plans[0]
    block = as_text(plan()).split(f"{stage_plan.name}: ")[1].split("\n\n")[0].splitlines()[1:]
    by_stream: dict[str, list[str]] = {}
    stream = ""
    for line in block:
        words = line.split()
        if not line.startswith("     "):
            stream, *words = words
        by_stream.setdefault(stream, []).append(words[0])
    assert by_stream == {s: [x.name for x in stage_plan.steps if x.stream == s] for s in stage_plan.streams}


def test_text_before_it_is_scheduled() -> None:
    text = as_text(replace(plan(), stage_plans=(), exits=()))
    assert "exit" not in text
    assert "scratch" not in text


def test_svg_has_a_box_for_each_segment_and_none_overlap() -> None:
    made = plan()
    boxes = groups(drawn(made), "box")
    assert [title.split(" · ")[0] for title in boxes] == [segment.name for segment in made.segments]
    places = [(float(box.get("x", "")), float(box.get("y", ""))) for box in boxes.values()]
    assert len({*places}) == len(places)
    by_name = dict(zip((segment.name for segment in made.segments), places, strict=True))
    for segment in made.segments:
        for other in made.segments:
            if (segment.stage, segment.branch == "head") < (other.stage, other.branch == "head"):
                assert by_name[segment.name][0] < by_name[other.name][0]
            assert (segment.branch == other.branch) == (by_name[segment.name][1] == by_name[other.name][1])


@pytest.mark.parametrize("build", [plan, deep])
def test_svg_draws_what_is_read_and_lines_cross_no_box(build: Callable[[], Plan]) -> None:
    made = build()
    root = drawn(made)
    lines = [group for group in root.iter(f"{SVG}g") if group.get("class") == "edge"]
    told = Counter(line.findtext(f"{SVG}title") for line in lines)
    assert told == Counter(f"{', '.join(edge.values)} → {edge.target}" for edge in edges_of(made))
    text = next(segment.name for segment in made.segments if segment.branch == "text")
    assert told[f"text.ids, text.mask → {text}"] == 1
    assert told[f"presence → {made.segments[-1].name}"] == 1
    boxes = [
        tuple(float(box.get(key, "")) for key in ("x", "y", "width", "height")) for box in groups(root, "box").values()
    ]
    for line in lines:
        numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", line.find(f"{SVG}path").get("d"))]  # type: ignore[union-attr, arg-type]
        for (ax, ay), (bx, by) in pairwise(zip(numbers[::2], numbers[1::2], strict=True)):
            for x, y, width, height in boxes:
                aside = max(ax, bx) <= x or min(ax, bx) >= x + width
                above = max(ay, by) <= y or min(ay, by) >= y + height
                assert aside or above, (line.findtext(f"{SVG}title"), (ax, ay), (bx, by))


def test_svg_has_room_under_a_row_for_its_tracks() -> None:
    tops = sorted({float(box.get("y", "")) for box in groups(drawn(deep()), "box").values()})
    image, text, audio, _ = tops
    assert text - image > audio - text  # three segments of the image's row carry something down, one of the text's


def test_svg_marks_exits_at_the_box_that_answers() -> None:
    made = plan()
    root = drawn(made)
    boxes = groups(root, "box")
    arrows = groups(root, "exit")
    assert [title.partition(":")[0] for title in arrows] == ["exit image", "exit image+text", "exit all"]
    for arrow, name in zip(arrows.values(), ("head@0", "head@1", "head@2"), strict=True):
        box = next(box for title, box in boxes.items() if title.startswith(name))
        start = float(re.match(r"M(\S+)", arrow.get("d", "")).group(1))  # type: ignore[union-attr]
        assert start == pytest.approx(float(box.get("x", "")) + float(box.get("width", "")) / 2)


def test_svg_heats_the_slowest() -> None:
    seconds = {"image@0": 0.3, "head@0": 0.001, "text@1": 0.1}
    boxes = groups(drawn(plan(), **seconds), "box")
    heat = {
        title.split(" · ")[0]: float((box.get("style") or "").removeprefix("fill-opacity:"))
        for title, box in boxes.items()
    }
    assert heat["image@0"] > heat["text@1"] > heat["head@0"] >= heat["audio@2"]
    text = as_svg(plan(), seconds=seconds)
    assert ">300 ms<" in text
    assert "image@0 · 300 ms, 75% of all segments" in text
    assert ">&lt;1%<" in text
    assert " ms" not in as_svg(plan())


def test_svg_needs_nothing_and_names_stay_words() -> None:
    made = plan()
    hostile = "<script>alert(1)</script>&\"'"
    exits = (replace(made.exits[0], name=hostile), *made.exits[1:])
    segments = (replace(made.segments[0], name=hostile), *made.segments[1:])
    text = as_svg(replace(made, exits=exits, segments=segments), seconds={hostile: 1.0})
    assert "<script" not in text
    titles = [title.text or "" for title in ElementTree.fromstring(text).iter(f"{SVG}title")]
    assert sum(hostile in title for title in titles) >= 3
    assert re.findall(r"https?:[^\"']+|url\(|@import", text) == ["http://www.w3.org/2000/svg"]


def test_svg_of_a_pipeline_that_only_embeds() -> None:
    made = plan()
    encoders = tuple(replace(segment, stage=0) for segment in made.segments if segment.branch != "head")
    root = drawn(replace(made, segments=encoders, exits=()))
    assert len(groups(root, "box")) == 3
    assert groups(root, "exit") == {}


def span(step: str, stream: str, start: float, end: float, **more: Any) -> Any:
    return SimpleNamespace(
        **{"step": step, "stream": stream, "start": start, "end": end, "lane": 0, "run": 0, "rows": 8} | more
    )


def test_trace_is_what_perfetto_reads() -> None:
    trace = as_trace(
        [
            span("image@0", "image", 100.002, 100.005, run=3, lane=1, rows=7),
            span("in:image@0", "in", 100.0, 100.002),
        ]
    )
    assert json.loads(json.dumps(trace)) == trace
    events = trace["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {1: "in", 2: "image"}
    done = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in done] == ["in:image@0", "image@0"]
    assert [event["ts"] for event in done] == pytest.approx([0, 2000], abs=0.01)  # microseconds
    assert [event["dur"] for event in done] == pytest.approx([2000, 3000], abs=0.01)
    assert names[done[1]["tid"]] == "image"
    assert done[1]["args"] == {"run": 3, "lane": 1, "rows": 7}
    assert [event["cat"] for event in done] == ["in", "run"]
    assert {event["pid"] for event in events} == {1}
    assert [event["ph"] for event in as_trace([])["traceEvents"]] == ["M"]


SIZES = {
    0: "0 B",
    999: "999 B",
    1000: "1 KiB",
    6656: "6.5 KiB",
    100 << 10: "100 KiB",
    1 << 20: "1 MiB",
    5 << 30: "5 GiB",
}


def test_size() -> None:
    assert {amount: size(amount) for amount in SIZES} == SIZES
