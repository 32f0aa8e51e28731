"""What is printed when a job is done: in 80 columns, whatever the text in it."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pytest
from rich.cells import cell_len

from mmpipe.jobs.job import Summary
from mmpipe.jobs.tally import Shown, Step, Story, Tally
from mmpipe.jobs.terminal import Output, show_listing, show_summary
from mmpipe.media import Limits, Listing
from mmpipe.types import Prediction, Sample

STEPS = (
    Step("image", "shirt", 0.84, ("image",)),
    Step("image+text", "musical instruments, old", 0.92, ("image", "text")),
    Step("all", "coat", 0.9412, ("image", "text", "audio")),
)


def printed(show, *arguments, width=80):
    stream = io.StringIO()
    show(*arguments, console=Output(stream, width))
    lines = stream.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert "\x1b" not in stream.getvalue()
    return lines


def summary(text="A title", item="item-1", **changes):
    """A run of a hundred samples with one story, in which the title was read."""
    tally = Tally(("shirt", "coat"), ("image", "image+text", "all"), ("image", "text", "audio"), rows=100)
    tally.status = Counter({"ok": 97, "partial": 1, "failed": 2})
    tally.answered_by = Counter({"image": 60, "image+text": 30, "all": 8})
    tally.present = Counter({"image": 100, "text": 90, "audio": 0})
    tally.files_opened = Counter({"image": 100, "text": 40})
    used = ("image", "text", "audio")
    prediction = Prediction(item, "ok", label="coat", confidence=0.94, answered_by="all", present=used, used=used)
    shown = Shown(Sample(item, {"text": text}), prediction, STEPS)
    tally.stories = {"settled": Story("settled", shown, (1.0,))}
    for name, value in changes.items():
        setattr(tally, name, value)
    run = {"rows": 100, "items_per_second": 12.34, "seconds": {"total": 8.1, "fuse": 3.0}}
    return Summary(Path("out"), run, tally, 0.05, Limits())


def test_a_summary_in_full():
    lines = printed(show_summary, summary())
    text = "\n".join(lines)
    assert "image              60     60%   ██████████████████" in text
    assert "failed" in text
    assert "files opened: 100 of 100 image, 40 of 90 text" in text
    story = [line for line in lines if line.startswith(("│", "╭"))]
    assert "They disagreed, and the last one settled it: item-1" in story[0]
    assert "“A title”" in story[1]
    assert [line.rstrip("│ ").split()[-2:] for line in story[2:]] == [["go", "on"], ["go", "on"], ["0.941", "answered"]]
    assert len(story) == 5  # a line for each step: none is broken
    assert "100 items in 8.1 s (12.3 a second), after 3.0 s of loading" in lines
    assert lines[-1] == "report       out/report.html"


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize(
    "text",
    ["word " * 60, "靴" * 100, "👟" * 100, "x" * 300, "[bold]a[/bold] [/nonsense]", ":smile: \x1b[2J\x07", "a\nb\tc"],
)
def test_no_text_breaks_the_box(text, width):
    lines = printed(show_summary, summary(text, item=text), width=width)
    box = [line for line in lines if line.startswith(("│", "╭", "╰"))]
    assert len({cell_len(line) for line in box}) == 1
    if width >= 80:
        assert len(box) == 6
    assert ":smile:" in "\n".join(lines) or ":smile:" not in text
    assert "[bold]a[/bold]" in "\n".join(lines) or "[bold]" not in text


def test_a_title_is_read_from_its_file_only_if_the_pipeline_read_it(tmp_path):
    file = tmp_path / "title.txt"
    file.write_text("  Grey\n cotton hoodie ", encoding="utf-8")
    done = summary(file)
    assert any("“Grey cotton hoodie”" in line for line in printed(show_summary, done))
    shown = done.tally.stories["settled"].shown
    unread = Shown(shown.sample, Prediction("a", "ok", used=("image",), skipped=("text",)), STEPS[:1])
    done.tally.stories["settled"] = Story("settled", unread, ())
    text = "\n".join(printed(show_summary, done))
    assert "Grey" not in text
    assert "never opened: text" in text
    file.unlink()
    printed(show_summary, summary(file))


def test_failures_are_listed_with_their_reasons_and_the_rest_is_counted():
    rows = [Prediction(f"[red]{n}\x1b[2J", "failed", error="image:empty: [b]x.jpg: 0 bytes") for n in range(30)]
    lines = printed(show_summary, summary(failures=rows, status=Counter(ok=40, failed=50, partial=10)))
    text = "\n".join(lines)
    assert "50 failed, 10 answered without a broken part" in text
    assert text.count("image:empty: [b]x.jpg: 0 bytes") == 8
    assert "[red]0\\x1b[2J" in text
    assert "and 52 more, in the report" in text


def test_an_empty_run():
    empty = Summary(
        Path("out"),
        {"rows": 0, "items_per_second": 0.0, "seconds": {"total": 0.0, "fuse": 0.0}},
        Tally(("a", "b"), ("all",), ("text",)),
        0.05,
    )
    assert "0 items in 0.0 s (0.0 a second), after 0.0 s of loading" in printed(show_summary, empty)


def test_a_listing():
    samples = [Sample(f"[red]{n}\n", {"text": "t\x1b[2J" * 50, "image": Path(f"/x/{n}.jpg")}) for n in range(9)]
    listing = Listing(
        samples,
        (("a/b.pdf", "unknown suffix .pdf"), ("x.jpg\x1b", "no encoder for image")),
        {"text": 9, "image": 9},
        {"image+text": 8, "": 1},
    )
    text = "\n".join(printed(show_listing, listing, ["image", "text"]))
    assert "9 items: 9 with image, 9 with text" in text
    assert "8  image+text" in text
    assert "1  nothing at all" in text
    assert "[red]4\\n" in text
    assert "[red]5" not in text
    assert "2 files belong to no item:" in text
    assert "  x.jpg\\x1b: no encoder for image" in text


def test_a_terminal_is_not_flooded_and_a_pipe_gets_all(monkeypatch):
    stray = tuple((f"{number}/.DS_Store", "hidden") for number in range(300))
    listing = Listing(
        [Sample("a", {"text": "t"})], (*stray, ("x.jpg", "no encoder for image")), {"text": 1}, {"text": 1}
    )
    assert sum("DS_Store: hidden" in line for line in printed(show_listing, listing, ["text"])) == 300
    monkeypatch.setattr(Output, "is_terminal", True)
    stream = io.StringIO()
    show_listing(listing, ["text"], console=Output(stream, 80))
    told = stream.getvalue()
    assert len(told.splitlines()) < 25
    assert "and 295 more hidden: 295 .DS_Store" in told
    assert "x.jpg: no encoder for image" in told
    assert "check … | less" in told.splitlines()[-1]


def test_a_share_is_counted_as_it_is_written():
    """29 of 100 are 29%: in binary, 0.29 times 100 is less than 29."""
    for rows in range(1, 400):
        for percent in range(101):
            failed = percent * rows // 100
            for count, expected in ((failed, 0), (failed + 1, 3)):
                if count <= rows:
                    status = Counter(ok=rows - count, failed=count)
                    tally = Tally(("a", "b"), ("all",), ("text",))
                    tally.rows, tally.status = rows, status
                    assert Summary(Path(), {}, tally, percent / 100).exit_code() == expected, (count, rows, percent)
