"""More of a medium than an encoder looks at first: parts of a picture, later windows of a sound, the rest of a text.

A `View` is a medium like any other: `media.load` decodes its source within the same limits, no more of a sound than
its window, and gives the part. The same source has the same views, always.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmpipe.errors import MediaError

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[float, float, float, float]

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_NEWS = 0.1  # a window that brings less than this of itself that is new is no view of its own


@dataclass(frozen=True)
class View:
    """A part of a medium. `source`: what `media.load` takes.

    start: where it begins, in a sound in seconds, in a text in characters. box: left, top, right and bottom of the
    part of a picture, as shares of its width and height. mirrored: left and right of a picture change places.
    """

    source: Any
    start: float = 0.0
    box: Box = WHOLE
    mirrored: bool = False


def _zoom(scale: float, x: float, y: float) -> Box:
    """A part of `scale` of both sides; x, y: where it lies in what is left, 0 to 1."""
    left, top = (1 - scale) * x, (1 - scale) * y
    return left, top, left + scale, top + scale


# After the whole picture and the ends of a long one: its mirror image, its middle, that mirrored, corners.
_PARTS: tuple[tuple[Box, bool], ...] = (
    (WHOLE, True),
    (_zoom(0.875, 0.5, 0.5), False),
    (_zoom(0.875, 0.5, 0.5), True),
    *((_zoom(scale, x, y), False) for scale in (0.875, 0.75, 0.6) for y in (0, 1) for x in (0, 1)),
    *((_zoom(0.5, x, y), False) for y in (0, 0.5, 1) for x in (0, 0.5, 1)),
)
_LONG = 1.25  # longer side to shorter, from which on encoders that look at the middle square miss the ends


def of_picture(source: Any, count: int, size: tuple[int, int] | None) -> list[Any]:
    """The picture itself, then parts of it, `count` in all. size: width and height; None: not known."""
    parts = [*(_ends(*size) if size is not None else ()), *_PARTS]
    return [source, *(View(source, box=box, mirrored=mirrored) for box, mirrored in parts[: count - 1])]


def _ends(width: int, height: int) -> list[tuple[Box, bool]]:
    """The squares at both ends of a picture that is much longer than wide, or wider than long."""
    square = min(width, height) / max(width, height)
    if square > 1 / _LONG:
        return []
    if width > height:
        return [((0.0, 0.0, square, 1.0), False), ((1 - square, 0.0, 1.0, 1.0), False)]
    return [((0.0, 0.0, 1.0, square), False), ((0.0, 1 - square, 1.0, 1.0), False)]


def of_sound(source: Any, count: int, seconds: float | None, window_seconds: float | None) -> list[Any]:
    """The sound itself, of which its first window is heard, then windows spread over the rest of it.

    seconds: how long it is; None: not known. window_seconds: how much is heard at once; None: all.
    """
    if seconds is None or window_seconds is None:
        return [source]
    starts = _starts(seconds, window_seconds, count)
    return [source, *(View(source, start=start) for start in starts[1:])]


def of_text(source: Any, text: str, count: int, reads: Callable[[str], int]) -> list[Any]:
    """The text itself, of which the first part is read, then parts spread over the rest of it.

    source: what `text` was loaded from. reads: how many characters of a text are read at once.
    """
    window = reads(text)
    if not any(mark.isalnum() for mark in text[window:]):  # an encoder may pass over what ends a sentence
        return [source]
    starts = _starts(len(text.rstrip()), window, count)[1:]
    return [source, *(View(source, start=at) for at in dict.fromkeys(_word_start(text, int(s)) for s in starts) if at)]


def _starts(length: float, window: float, count: int) -> list[float]:
    """Where windows begin: from the start to the end of the whole, evenly, as many as cover it, `count` at most."""
    if window <= 0 or length <= window:
        return [0.0]
    needed = 1 + math.ceil((length - window) / window - _NEWS)
    number = min(count, needed)
    return [step * (length - window) / (number - 1) for step in range(number)] if number > 1 else [0.0]


def _word_start(text: str, at: int) -> int:
    """`at`, or where the word begins that it would cut; `at` in writing without spaces."""
    longest = 40  # characters of a word
    for place in range(at, max(0, at - longest), -1):
        if text[place - 1].isspace():
            return place
    return at


def shorter_share(view: View) -> float:
    """The smaller one of the shares of a picture's width and height that a view of it has."""
    left, top, right, bottom = view.box
    return min(right - left, bottom - top)


def part_of_picture(picture: Image.Image, view: View) -> Image.Image:
    """The view's part of a decoded picture. Raises MediaError where that has no pixels."""
    from PIL import Image

    width, height = picture.size
    left, top = round(view.box[0] * width), round(view.box[1] * height)
    right, bottom = round(view.box[2] * width), round(view.box[3] * height)
    if right <= left or bottom <= top:
        raise MediaError("image", "empty", f"{width} x {height} pixels: too small for a part of it")
    part = picture.crop((left, top, right, bottom))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.mirrored else part


def part_of_text(text: str, view: View) -> str:
    """The view's part of a loaded text. Raises MediaError where that holds nothing."""
    part = text[int(view.start) :]
    if not part.strip():
        raise MediaError("text", "empty", "nothing left of the text")
    return part
