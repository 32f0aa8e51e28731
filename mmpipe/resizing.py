"""Pictures resized as Pillow resizes them, to the bit, by code of our own (resize.cpp): three times as fast.

It is compiled once on a machine, where a job is long enough to win that back, and kept. In what order Pillow takes its
two passes, which decides the last bit, is a version's own affair: it is found out by asking, and where no order that is
known gives this Pillow's bits, Pillow resizes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import torch
from PIL import Image
from torch import Tensor

from mmpipe import media
from mmpipe.encoders.image import RESAMPLING, Part, ResizeCrop, by_pillow, lent
from mmpipe.graphs.artefacts import kept
from mmpipe.graphs.backends import Unlowerable
from mmpipe.graphs.backends.compiler import compiled, loaded, named
from mmpipe.tuned import WON_BACK
from mmpipe.types import Sample

SECONDS = 1.5  # that compiling takes, about
_SAVED_S = 8e-9  # of a core, for each pixel of a picture
_LOOKED_AT = 32  # pictures of a job whose sizes are read, to know what it would save
_SOURCE = Path(__file__).with_name("resize.cpp")
_FLAGS = ("-O2", "-ffp-contract=off")  # no contraction: the factors' last bits would be the compiler's choice
_FILTERS = ("bilinear", "bicubic")
_AT_ONCE = 1 << 20  # pixels that are copied of a picture whose own memory is in several pieces
_ELONGATED = 50  # times as long as wide: Pillow knows more orders for such

_Side = tuple[int, int]  # of a picture, and of what it becomes
Order = Callable[[_Side, _Side], bool]  # (across, down) → whether to go down first

_ORDERS: tuple[Order, ...] = (
    lambda across, down: down[1] < down[0] and down[0] - down[1] > 2 * (across[0] - across[1]),  # Pillow 13
    lambda across, down: False,  # before
)
# across and down: what the orders tell apart, and what there is: smaller, larger, as it is
_ASKED: tuple[tuple[_Side, _Side], ...] = (
    ((61, 24), (47, 18)),
    ((40, 24), (64, 32)),
    ((40, 24), (65, 32)),
    ((47, 18), (61, 24)),
    ((16, 24), (90, 40)),
    ((16, 24), (30, 40)),
    ((24, 24), (70, 32)),
    ((70, 32), (24, 24)),
    ((300, 36), (200, 24)),
    ((9, 12), (400, 300)),
    ((400, 100), (9, 12)),
)


class _Resizing:
    """What this process has of it."""

    library: Any = None
    content = b""  # of the library
    down_first: Order = _ORDERS[-1]
    why_not = "no job was long enough yet to win back compiling it"
    failed = False  # for good


_lock = threading.Lock()
_state = _Resizing()


@dataclass(frozen=True)
class Resized:
    """What `crop` does, by native code where this process has it."""

    crop: ResizeCrop

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        return self.crop(image, by_pillow if _state.library is None else _resized)


def why_not() -> str:
    """Why Pillow resizes in this process, or ""."""
    return "" if _state.library is not None else _state.why_not


def take(folder: Path | None) -> None:
    """Load what `folder` keeps, if it does. Waits for no compiler."""
    if folder is not None and (folder / _name()).is_file():
        with contextlib.suppress(_NotKept):
            adopt(lambda: kept(folder, _name(), _not_kept, tell=lambda text: None))


def settle(folder: Path | None, samples: Sequence[Sample], limits: media.Limits, cores: int) -> None:
    """Before a job of these: load it, and compile it first where that is won back."""
    take(folder)
    if _state.library is not None or _state.failed or not samples:
        return
    drawn = random.Random(0).sample(range(len(samples)), min(_LOOKED_AT, len(samples)))
    found = [media.picture_size(samples[row].media.get("image"), limits) for row in drawn]
    pixels = sum(size[0] * size[1] for size in found if size is not None) / len(drawn)
    saved = len(samples) * pixels * _SAVED_S / cores
    if saved >= WON_BACK * SECONDS:
        load(folder)
    else:
        told = f"these {len(samples):,} samples would save {saved:.1f} s, compiling takes {SECONDS:g} s, once"
        _state.why_not = told


def load(folder: Path | None) -> None:
    """Compile it, or take what `folder` keeps; once a process, also where it fails: then `why_not` says so."""
    adopt(lambda: kept(folder, _name(), lambda: compiled([_SOURCE], _FLAGS)))


def content() -> bytes:
    """The library that this process has, for another one to `adopt`; empty: none."""
    return _state.content


def adopt(made: Callable[[], bytes]) -> None:
    """Load a library, where this process has none and none failed."""
    with _lock:
        if _state.library is not None or _state.failed:
            return
        try:
            if platform.system() != "Linux":
                raise Unlowerable("native code is for Linux")
            found = made()
            library = _typed(loaded(found))
            _state.down_first = _order(library)
            _state.content, _state.library = found, library
        except Unlowerable as error:
            _state.failed, _state.why_not = True, str(error)


def _typed(library: Any) -> Any:
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.reach.argtypes = [ctypes.c_int, *[number] * 4, *[ctypes.POINTER(number)] * 2]
    for one in (library.across, library.down):
        one.argtypes = [pointer, number, number, ctypes.c_int, *[number] * 5, pointer]
    return library


class _NotKept(Exception):
    pass


def _not_kept() -> bytes:
    raise _NotKept


@functools.cache
def _name() -> str:
    return named(f"resize-{platform.machine()}", [_SOURCE], _FLAGS)


def _order(library: Any) -> Order:
    """In which this Pillow takes its passes. Raises Unlowerable where its bits are none that are known."""
    for order in _ORDERS:
        if all(_alike(library, order, *sides, name) for sides in _ASKED for name in _FILTERS):
            return order
    raise Unlowerable(f"Pillow {PIL.__version__} resizes to other bits than native code does")


def _alike(library: Any, order: Order, across: _Side, down: _Side, name: str) -> bool:
    levels = torch.randint(256, (down[0], across[0], 3), generator=torch.Generator().manual_seed(0))
    levels[: down[0] // 2] = levels[: down[0] // 2] // 128 * 255  # sums beyond black and white
    image = Image.fromarray(levels.to(torch.uint8).numpy())
    size, part = (across[1], down[1]), (1, 2, across[1] - 1, down[1] - 3)
    found = _through(library, order, image, size, part, name)
    return found is not None and torch.equal(found, by_pillow(image, size, part, name))


def _resized(image: Image.Image, size: tuple[int, int], part: Part, resample: str) -> Tensor:
    """As `by_pillow`."""
    found = None
    if resample in _FILTERS and min(size) > 0 and max(image.size) <= _ELONGATED * min(image.size):
        found = _through(_state.library, _state.down_first, image, size, part, resample)
    return by_pillow(image, size, part, resample) if found is None else found


def _through(
    library: Any, order: Order, image: Image.Image, size: tuple[int, int], part: Part, resample: str
) -> Tensor | None:
    """None: this Pillow lends nobody its pixels. Raises MemoryError."""
    across, down = zip(image.size, size, strict=True)
    number = int(RESAMPLING[resample])
    left, top, right, bottom = part
    begin_x, end_x = _reach(library, number, across, left, right)
    begin_y, end_y = _reach(library, number, down, top, bottom)
    whole = (begin_x, begin_y, end_x, end_y)
    width, height = right - left, bottom - top
    found = torch.empty(height, width, 4, dtype=torch.uint8)

    def go_across(from_: Tensor, to: Tensor) -> None:
        _done(library.across(*_rows(from_), len(from_), number, *across, left, width, begin_x, to.data_ptr()))

    def go_down(from_: Tensor, to: Tensor) -> None:
        _done(library.down(*_rows(from_), from_.shape[1], number, *down, top, height, begin_y, to.data_ptr()))

    if order(across, down):
        between = torch.empty(height, end_x - begin_x, 4, dtype=torch.uint8)
        for at, piece in _pieces(image, whole, rows=False):
            if piece is None:
                return None
            columns = torch.empty(height, piece.shape[1], 4, dtype=torch.uint8)
            go_down(piece, columns)
            between[:, at : at + piece.shape[1]] = columns
        go_across(between, found)
    else:
        between = torch.empty(end_y - begin_y, width, 4, dtype=torch.uint8)
        for at, piece in _pieces(image, whole, rows=True):
            if piece is None:
                return None
            go_across(piece, between[at:])
        go_down(between, found)
    return found[:, :, :3].permute(2, 0, 1)


def _reach(library: Any, number: int, side: _Side, first: int, last: int) -> tuple[int, int]:
    begin, end = ctypes.c_long(), ctypes.c_long()
    _done(library.reach(number, *side, first, last - first, begin, end))
    return begin.value, end.value


def _done(failed: int) -> None:
    if failed:
        raise MemoryError("not enough memory to resize a picture")


def _rows(pixels_HW4: Tensor) -> tuple[int, int]:
    return pixels_HW4.data_ptr(), pixels_HW4.stride(0)


def _pieces(image: Image.Image, part: Part, *, rows: bool) -> Iterator[tuple[int, Tensor | None]]:
    """Where each begins in `part`, and its pixels [height, width, 4]: one that is Pillow's own, or copies of some rows
    (else columns), one after the other."""
    left, top, right, bottom = part
    whole = lent(image)
    if whole is not None:
        yield 0, whole[top:bottom, left:right]
        return
    first, last, other = (top, bottom, right - left) if rows else (left, right, bottom - top)
    step = max(1, _AT_ONCE // other)
    for at in range(first, last, step):
        end = min(last, at + step)
        yield at - first, lent(image.crop((left, at, right, end) if rows else (at, top, end, bottom)))
