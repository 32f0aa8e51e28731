"""What a job tells while it runs: lines, JSON lines, and text that can't command a terminal."""

from __future__ import annotations

import io
import json

import pytest

from mmpipe.jobs import progress
from mmpipe.jobs.progress import Lines, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain größe 靴 👟 👩‍💻 नमस्ते", "plain größe 靴 👟 👩‍💻 नमस्ते"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\nb\r\tc\x00", "a\\nb\\r\\tc\\x00"),
        ("\x9b31m", "\\x9b31m"),  # an escape sequence in one character
        ("txt.\u202egpj", "txt.\\u202egpj"),  # right to left: shows another name
        ("\udcff", "\\udcff"),
        ("a\u00a0b\u3000c", "a\u00a0b\u3000c"),
        ("\u2028\u2066", "\\u2028\\u2066"),
        ("back\\slash", "back\\slash"),
        ("", ""),
    ],
)
def test_text_of_users_can_not_command_a_terminal(text, shown):
    assert visible(text) == shown


def test_line_breaks_of_ours_are_kept_on_request():
    assert visible("a\nb\x1b", "\n") == "a\nb\\x1b"


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_now_and_then_with_rate_and_time_left(clock):
    stream = io.StringIO()
    lines = Lines(stream)
    lines.start(10_000, "predicting")
    for _ in range(8):
        clock[0] += 1
        lines.advance(100)
    lines.say("note: a\x1bb")
    clock[0] += 992
    lines.advance(9200)
    lines.finish()
    assert stream.getvalue().splitlines() == [
        "predicting: 10,000 items",
        "500 of 10,000 items, 100.0 a second, 1:35 left",
        "note: a\\x1bb",
        "10,000 of 10,000 items, 10.0 a second",
        "10,000 of 10,000 items, 10.0 a second",
    ]


def test_json_lines(clock):
    stream = io.StringIO()
    lines = Lines(stream, as_json=True)
    lines.start(8, "predicting")
    clock[0] += 10
    lines.advance(2)
    lines.say("[red]größe\n")
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == [
        {"event": "start", "total": 8, "what": "predicting"},
        {"event": "progress", "done": 2, "total": 8, "items_per_second": 0.2, "seconds_left": 30.0},
        {"event": "note", "text": "[red]größe\n"},
    ]


def test_nothing_done_is_no_division_by_zero(clock):
    stream = io.StringIO()
    lines = Lines(stream)
    lines.start(3, "predicting")
    lines.finish()
    assert stream.getvalue().splitlines()[-1] == "0 of 3 items, 0.0 a second"
