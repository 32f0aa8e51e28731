"""Progress: a bar on a terminal, lines elsewhere, JSON lines on request. Always on standard error."""

from __future__ import annotations

import json
import sys
import time
import unicodedata
from typing import IO, Any, Protocol

_KEPT = "\u200c\u200d"  # joiners: without them families of emoji, and some scripts, fall apart
_LINE_SECONDS = 5.0  # between two lines where there is no terminal


def visible(text: str, keep: str = "") -> str:
    """Text that can't command a terminal: control characters, half characters and changes of direction as escapes.

    File names and labels are other people's text. `keep`: characters to leave alone, such as a line break.
    """
    if text.isprintable():
        return text
    return "".join(
        mark
        if mark.isprintable() or mark in _KEPT or mark in keep or unicodedata.category(mark) == "Zs"
        else mark.encode("unicode_escape").decode()
        for mark in text
    )


class Progress(Protocol):
    """What a job tells while it runs."""

    def start(self, total: int, what: str) -> None: ...
    def advance(self, count: int) -> None: ...
    def say(self, text: str) -> None: ...
    def finish(self) -> None: ...


class Silent:
    """Nothing, for use from Python."""

    def start(self, total: int, what: str) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def finish(self) -> None:
        pass


class Lines:
    """A line now and then: plain text, or JSON objects with `event`."""

    def __init__(self, stream: IO[str] | None = None, *, as_json: bool = False) -> None:
        self._stream, self._json = stream or sys.stderr, as_json
        self._total = self._done = 0
        self._began = self._told = 0.0

    def start(self, total: int, what: str) -> None:
        self._total, self._done = total, 0
        self._began = self._told = time.monotonic()
        self._write({"event": "start", "total": total, "what": what}, f"{what}: {total:,} items")

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if count and now - self._told >= _LINE_SECONDS:
            self._told = now
            self._status()

    def say(self, text: str) -> None:
        self._write({"event": "note", "text": text}, text)

    def finish(self) -> None:
        self._status()

    def _status(self) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = self._done / seconds
        left = (self._total - self._done) / rate if rate else None
        text = f"{self._done:,} of {self._total:,} items, {rate:.1f} a second" + (
            f", {_clock(left)} left" if left is not None and self._done < self._total else ""
        )
        event = {"event": "progress", "done": self._done, "total": self._total, "items_per_second": round(rate, 3)}
        self._write({**event, "seconds_left": None if left is None else round(left, 1)}, text)

    def _write(self, event: dict[str, Any], text: str) -> None:
        print(json.dumps(event) if self._json else visible(text, "\n"), file=self._stream, flush=True)


class Bar:
    """A bar with rate and time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task: Any = None
        self._began = 0.0
        self._done = 0

    def start(self, total: int, what: str) -> None:
        self._began, self._done = time.monotonic(), 0
        self._task = self._bar.add_task(what, total=total, rate="")
        self._bar.start()

    def advance(self, count: int) -> None:
        self._done += count
        rate = self._done / max(time.monotonic() - self._began, 1e-9)
        self._bar.update(self._task, advance=count, rate=f"{rate:.1f}/s")

    def say(self, text: str) -> None:
        self._console.print(visible(text, "\n"), style="dim", highlight=False, markup=False)

    def finish(self) -> None:
        self._bar.stop()


def for_stream(*, as_json: bool = False) -> Progress:
    """The kind of progress that suits standard error."""
    if as_json:
        return Lines(as_json=True)
    return Bar() if sys.stderr.isatty() else Lines()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
