"""The explain page: the slowest thing first, numbers that add up, nothing that leaves its element."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.explained import explained

from mmpipe.explain import drawings
from mmpipe.explain.page import render
from mmpipe.explain.words import duration, rate

HOSTILE = "<script>document.title='taken'</script>\"><img src=x>"


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return explained()


@pytest.fixture(scope="module")
def text(facts: dict[str, Any]) -> str:
    return render(facts)


def section(text: str, name: str) -> str:
    found = re.search(rf'<section aria-labelledby="{name}">.*?</section>', text, re.DOTALL)
    return found.group() if found else ""


def widths(svg: str) -> list[float]:
    return [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)%"', svg)]


def test_the_verdict_is_the_heading(text: str, facts: dict[str, Any]) -> None:
    (heading,) = re.findall("<h1>(.*?)</h1>", text)
    assert heading == facts["verdict"].replace("'", "&#x27;")
    before_sections = text.partition("<section")[0]
    assert all(words in before_sections for words in facts["advice"])
    assert "Samples left: 167 (33%) at image, 228 (45%) at image+text and 117 (23%) at all." in before_sections


def test_the_bar_splits_the_wall_time(text: str, facts: dict[str, Any]) -> None:
    (bar,) = re.findall(r'<div class="thick wall">(.*?)</div>', text)
    names = re.findall("<title>(.*?)</title>", bar)[1:]
    assert [name.partition(":")[0] for name in names] == [
        "image@0", "text@1", "audio@2", "other segments", "waiting for media", "everything else",
    ]  # fmt: skip
    assert sum(widths(bar)) == pytest.approx(100, abs=0.01)
    spent = facts["seconds"]
    assert sum(widths(bar)[:4]) == pytest.approx(100 * spent["compute"] / spent["wall"], abs=0.01)
    assert widths(bar)[4] == pytest.approx(100 * spent["waiting"] / spent["wall"], abs=0.01)


def test_segments_stand_by_time_with_both_bars(text: str, facts: dict[str, Any]) -> None:
    rows = re.findall("<tr>(.*?)</tr>", section(text, "segments"))[1:]
    by_time = sorted(facts["segments"], key=lambda segment: -segment["seconds"])
    assert len(rows) == len(by_time) == 6
    for row, segment in zip(rows, by_time, strict=True):
        assert f">{segment['name']}<" in row
        assert widths(row) == pytest.approx([100 * segment["share"], 100 * segment["products_share"]], abs=0.01)
        assert duration(segment["seconds"]) in row
    assert "image@0 takes the most: 71% of all segments&#x27; time." in text
    assert "Its matrix products alone would take 83% of that" in text


def test_a_branch_has_one_colour_everywhere(text: str) -> None:
    for branch, kind in {"image": "x0", "text": "x1", "audio": "x2", "head": "ink"}.items():
        assert f'<i class="swatch {kind}"></i><span>{branch}@' in section(text, "segments")
        assert f'<i class="swatch {kind}"></i><span>{branch}<' in section(text, "timeline")
        assert f'<rect class="buffer {kind}' in section(text, "pool")
    assert '<rect class="x2"' in section(text, "timeline")


def test_the_graph_stands_as_it_was_given(text: str, facts: dict[str, Any]) -> None:
    assert facts["svg"] in section(text, "graph")


def test_the_timeline_has_a_row_for_each_stream_and_worker(text: str, facts: dict[str, Any]) -> None:
    rows = re.findall(r'<div class="row[^"]*"><span>(.*?)</span><svg.*?</svg></div>', section(text, "timeline"))
    assert rows == ["stream in", "stream image", "stream out", "stream head", "stream text", "stream audio"] + [
        f"decode {branch} {worker}" for branch in ("audio", "image", "text") for worker in (0, 1)
    ]
    first = facts["timeline"]["spans"][0]
    words = f"{first['step']}: {duration(first['end'] - first['start'])}, 32 rows · run 0, lane 0"
    assert f"<title>{words}</title>" in section(text, "timeline")
    assert "all of it" in section(text, "timeline")


def span(run: int, start: float, step: str = "image@0") -> dict[str, Any]:
    return {"step": step, "stream": "s", "lane": 0, "run": run, "rows": 1, "start": start, "end": start + 1}


def test_a_long_timeline_is_cut_to_its_first_runs() -> None:
    spans = [span(run, 10 * run + step) for run in range(7) for step in range(90)]
    decoding = [{"branch": "image", "worker": 0, "start": float(at), "end": at + 0.5} for at in range(500)]
    view = drawings.window({"spans": spans, "decoding": decoding})
    assert {one["run"] for one in view.spans} == {0, 1, 2, 3}
    assert (view.start, view.end) == (0, 120)
    assert len(view.decoding) == 120
    assert view.left_out == "the first 4 runs of 7"
    alone = drawings.window({"spans": spans[:90] * 6, "decoding": []})
    assert (len(alone.spans), alone.left_out) == (540, "")  # one run is never cut
    text = render(explained(timeline={"spans": spans, "decoding": decoding}))
    assert "of the run: the first 4 runs of 7." in section(text, "timeline")


def test_the_memory_map_is_where_the_buffers_are() -> None:
    buffers = [
        {"name": "image@0/in/pixels", "bytes": 600, "offset": 0, "first": 0, "last": 1},
        {"name": "image@0/out/mean", "bytes": 200, "offset": 600, "first": 1, "last": 2},
        {"name": "head@0/in/mean", "bytes": 400, "offset": 0, "first": 3, "last": 3},
    ]
    stage = {"name": "stage 0", "scratch_bytes": 1000, "lower_bound": 800, "unshared": 1200, "buffers": buffers}
    stage["steps"] = ["in:image@0", "image@0", "out:image@0", "in:head@0"]
    text = drawings.memory_map(stage, lambda branch: branch)
    places = re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)%" width="([\d.]+)%" height="([\d.]+)%"', text)
    assert [tuple(map(float, place)) for place in places] == [(0, 40, 50, 60), (25, 20, 50, 20), (75, 60, 25, 40)]
    assert re.findall(r'class="buffer (\w+)( written)?"', text) == [("image", ""), ("image", " written"), ("head", "")]
    assert re.findall(r'<line [^>]*y1="([\d.]+)%"', text) == ["20.000"]
    assert "1000 B" not in text
    assert "1 KiB, 25.0% above the least possible; without sharing it would be 1.2 KiB, 1.2 times as much." in text
    assert re.findall("<small>(.*?)</small>", text) == ["600 B", "800 B", "200 B", "400 B"]
    assert drawings.memory_map(stage | {"steps": []}, str) == ""


def test_every_fact_is_told(text: str, facts: dict[str, Any]) -> None:
    for auto in facts["autos"]:
        assert all(auto[key].replace("'", "&#x27;") in section(text, "autos") for key in ("key", "value", "why"))
    for path in facts["not_taken"]:
        assert path["what"] in section(text, "not-taken")
        assert path["why"] in section(text, "not-taken")
    assert re.findall(r"<tr><td>(\w+)</td>", section(text, "memory"))[:2] == ["weights", "decoding"]
    assert all(name in section(text, "memory") for name in facts["memory"])
    assert "77 nodes fewer" in section(text, "passes")
    footer = text.partition("<footer>")[2]
    assert all(words in footer for words in (*facts["notes"], *facts["versions"].values(), facts["machine"]))
    assert all(words in footer for words in facts["fingerprints"].values())


def test_what_was_not_measured_has_no_section() -> None:
    empty: dict[str, Any] = {key: [] for key in ("autos", "not_taken", "segments", "advice", "notes")}
    empty |= {key: {} for key in ("memory", "passes", "fingerprints", "answered_by")}
    empty["seconds"] = dict.fromkeys(("wall", "compute", "waiting", "decode_core", "other"), 0.0)
    empty |= {"items": 0, "items_per_second": 0.0, "svg": "", "pool": {"stages": []}}
    text = render(explained(**empty, timeline={"spans": [], "decoding": []}))
    assert "<section" not in text
    assert "<h1>" in text


def everywhere(value: Any, words: str) -> Any:
    """Every text of the facts replaced, keys too."""
    if isinstance(value, dict):
        return {words if key in ("image", "fold constants", "weights", "torch") else key: everywhere(item, words)
                for key, item in value.items()}  # fmt: skip
    if isinstance(value, list):
        return [everywhere(item, words) for item in value]
    return words if isinstance(value, str) else value


def test_names_stay_words(facts: dict[str, Any]) -> None:
    text = render(everywhere(facts, HOSTILE) | {"svg": facts["svg"]})
    assert "<script" not in text
    assert "<img" not in text
    assert text.count("&lt;script&gt;") > 100


def test_one_file_without_network_and_scripts(text: str) -> None:
    assert re.findall(r"<script|<link|<img|@import|url\(|\son\w+=", text) == []
    assert {*re.findall(r"https?://[^\"' <]+", text)} == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text.replace("&#x27;", "'")


DURATIONS = {
    0: "0",
    1.23e-5: "12.3 µs",
    4.2e-4: "420 µs",
    9.996e-4: "1 ms",
    0.0123: "12.3 ms",
    3.2: "3.2 s",
}


def test_words_of_small_numbers() -> None:
    assert {amount: duration(amount) for amount in DURATIONS} == DURATIONS
    rates = {0.0: "–", 3.2: "3.2 GFLOP/s", 158.4: "158 GFLOP/s", 4100.0: "4.1 TFLOP/s"}
    assert {amount: rate(amount) for amount in rates} == rates
