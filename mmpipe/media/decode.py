"""One medium → what an encoder prepares from: a picture, a text, a sound. Whatever is wrong is a MediaError.

Nothing is decoded before its size is known from the file system and from its header, and is within `Limits`.
"""

from __future__ import annotations

import codecs
import contextlib
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any, BinaryIO

from mmpipe.errors import MediaError
from mmpipe.media import audio, image
from mmpipe.media.limits import Limits
from mmpipe.media.views import View, part_of_picture, part_of_text, shorter_share

_UNKNOWN_BYTES = 1 << 16  # estimate for what can't be looked into: it will fail early, or is small
_ADDRESS = re.compile(r"(^|/)(https?|s3|gs|ftp):/")  # in a path it has one slash left
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def load(
    modality: str,
    source: Any,
    *,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    max_seconds: float | None = None,
    smallest_side: int | None = None,
    reserve: Callable[[int], None] = lambda count: None,
    grey: bool = False,
) -> Any:
    """The decoded medium.

    image → PIL.Image in RGB, upright (EXIF), alpha on white, the first frame; colour profiles are left alone.
    text → str, from UTF-8 or from UTF-16 with a byte order mark.
    audio → (float32 samples [n], the channels' mean; rate in Hz). With max_seconds only the beginning is decoded.

    smallest_side: a JPEG may be decoded smaller than it is (a half, a quarter, an eighth), as long as the shorter side
    of what is looked at keeps so many pixels. It is faster, and its pixels are means of the exact ones. None: exactly.

    grey: a file's picture that is grey stays grey, in mode L. In RGB its three channels would be the same.

    reserve: called with the bytes that a picture or a sound takes at its peak, as its header says, before it is
    decoded; with those that a large file takes to be opened before that, and both are held. It may wait.

    source: a Path or bytes; a str, which is the text itself, else a path; a PIL image; an array or tensor of pixels
    ([h, w], [h, w, c] or [c, h, w]; whole numbers 0..255 or floats 0..1); (samples [n] or [channels, n], rate_hz); a
    View of any of these: that part of it.

    Raises MediaError(modality, code, text) and nothing else. code is one of not_found, is_folder, unreadable
    (permission, broken disk), empty, too_large, truncated, corrupt, unsupported, not_text, not_finite, no_rate. text
    names the file without its folder.
    """
    try:
        if isinstance(source, View) and modality != "audio":
            side = None if smallest_side is None else math.ceil(smallest_side / shorter_share(source))
            whole = load(modality, source.source, limits=limits, smallest_side=side, reserve=reserve, grey=grey)
            return part_of_picture(whole, source) if modality == "image" else part_of_text(whole, source)
        start_seconds, source = (source.start, source.source) if isinstance(source, View) else (0.0, source)
        if isinstance(source, str) and modality == "text":
            return _checked_text(source, limits)
        if is_file(source):
            with opened(modality, source, limits) as (file, size_bytes):
                if modality == "image":
                    return image.from_file(file, size_bytes, limits, smallest_side, reserve, grey)
                if modality == "text":
                    return _text_from_file(file, size_bytes, limits)
                return audio.from_file(file, size_bytes, limits, max_seconds, start_seconds, reserve)
        if modality != "text":
            reserve(estimate_bytes(modality, source))
        if modality == "image":
            return image.from_memory(source, limits)
        if modality == "audio":
            return audio.from_memory(source, limits, max_seconds, start_seconds)
        raise MediaError(modality, "unsupported", f"a {type(source).__name__} is no text: give a str, bytes or a Path")
    except MemoryError:
        raise MediaError(modality, "too_large", f"{label(modality, source)}not enough memory to decode it") from None
    except MediaError as error:
        raise MediaError(modality, error.code, label(modality, source) + error.text) from error.__cause__


def estimate_bytes(
    modality: str,
    source: Any,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    max_seconds: float | None = None,
    smallest_side: int | None = None,
    reserve: Callable[[int], None] = lambda count: None,
) -> int:
    """About how many bytes `load` will take at its peak, from the header; few where that isn't known. Never raises.

    reserve: called with what a large file takes to be opened, which that header asks for, before it is.
    """
    if isinstance(source, View):  # a window of a sound is no longer than its first
        side = None if smallest_side is None else math.ceil(smallest_side / shorter_share(source))
        return estimate_bytes(modality, source.source, limits, max_seconds, side, reserve)
    try:
        if isinstance(source, str) and modality == "text":
            return 4 * len(source) + _UNKNOWN_BYTES
        if not is_file(source):
            of_memory: Callable[[Any], int] = (
                image.estimate_memory_bytes if modality == "image" else audio.estimate_memory_bytes
            )
            return of_memory(source) + _UNKNOWN_BYTES
        if modality == "text":  # the bytes, and up to four for each of them as text
            size_bytes = os.stat(source).st_size if isinstance(source, str | os.PathLike) else memoryview(source).nbytes
            return 5 * min(size_bytes, int(limits.text_kilobytes * 1e3)) + _UNKNOWN_BYTES
        with opened(modality, source, limits) as (file, size_bytes):
            if modality == "image":
                return image.estimate_file_bytes(file, size_bytes, limits, smallest_side, reserve) + _UNKNOWN_BYTES
            return audio.estimate_file_bytes(file, size_bytes, limits, max_seconds) + _UNKNOWN_BYTES
    except Exception:  # noqa: BLE001 - load says what is wrong; this is only a guess
        return _UNKNOWN_BYTES


def picture_size(source: Any, limits: Limits = Limits()) -> tuple[int, int] | None:  # noqa: B008 - frozen
    """Width and height of a picture, upright, from its header; None where it can't be used. Never raises."""
    try:
        if not is_file(source):
            return image.memory_size(source)
        with opened("image", source, limits) as (file, _):
            return image.file_size(file, limits)
    except Exception:  # noqa: BLE001 - load says what is wrong
        return None


def sound_seconds(source: Any, limits: Limits = Limits()) -> float | None:  # noqa: B008 - frozen
    """How long a sound is, from its header; None where that doesn't tell, or the sound can't be used. Never raises."""
    try:
        if not is_file(source):
            return float(source[0].shape[-1]) / float(source[1])
        with opened("audio", source, limits) as (file, _):
            return audio.file_seconds(file)
    except Exception:  # noqa: BLE001 - load says what is wrong
        return None


def is_file(source: Any) -> bool:
    """Whether a source is a file's path or content: bytes to decode."""
    return isinstance(source, str | os.PathLike | bytes | bytearray | memoryview)


def label(modality: str, source: Any) -> str:
    """`name: ` of a file, without its folder; nothing for what is in memory."""
    if not isinstance(source, str | os.PathLike) or (isinstance(source, str) and modality == "text"):
        return ""
    name = os.path.basename(os.fsdecode(source).rstrip("/"))
    return f"{os.fsencode(name).decode('utf-8', 'backslashreplace')}: " if name else ""


@contextlib.contextmanager
def opened(modality: str, source: Any, limits: Limits) -> Iterator[tuple[BinaryIO, int]]:
    """(file, its size in bytes), checked: a regular file, not empty, within the limit."""
    limit_megabytes = (
        min(limits.file_megabytes, limits.text_kilobytes / 1e3) if modality == "text" else limits.file_megabytes
    )

    def check(size_bytes: int) -> None:
        if size_bytes == 0:
            raise MediaError(modality, "empty", "0 bytes")
        if size_bytes > limit_megabytes * 1e6:
            unit = f"{size_bytes / 1e6:.1f} MB, over the limit of {limit_megabytes:g} MB"
            raise MediaError(modality, "too_large", unit)

    if isinstance(source, bytes | bytearray | memoryview):
        check(memoryview(source).nbytes)
        yield BytesIO(source), memoryview(source).nbytes
        return
    try:
        status = os.stat(source)
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(modality, "is_folder", "a folder, not a file")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise MediaError(modality, "unsupported", "a pipe, socket or device, not a file")
        check(status.st_size)
        # libsndfile reads by descriptor, and a buffer above it would not know where that has moved.
        file = open(source, "rb", buffering=0 if modality == "audio" else -1)  # noqa: SIM115 - closed below
    except PermissionError:
        raise MediaError(modality, "unreadable", "permission denied") from None
    except (FileNotFoundError, NotADirectoryError):
        link = " (a link to nothing)" if os.path.islink(source) else ""
        remote = ": addresses on the web are not fetched" if _ADDRESS.search(os.fsdecode(source)) else ""
        raise MediaError(modality, "not_found", f"no such file{link}{remote}") from None
    except OSError as error:
        raise MediaError(modality, "unreadable", error.strerror or "can't be opened") from error
    except (ValueError, TypeError) as error:  # a NUL in the name, a path of bytes
        raise MediaError(modality, "not_found", "no such file: not a file name") from error
    with file:
        yield file, status.st_size


def _text_from_file(file: BinaryIO, size_bytes: int, limits: Limits) -> str:
    try:
        raw = file.read(size_bytes)
    except OSError as error:
        raise MediaError("text", "unreadable", error.strerror or "can't be read") from error
    encoding = next((name for bom, name in _BOMS if raw.startswith(bom)), "utf-8")
    try:
        return _checked_text(raw.decode(encoding), limits)
    except UnicodeDecodeError as error:
        at = f"byte 0x{raw[error.start]:02x} at {error.start} is not {'UTF-8' if '8' in encoding else 'UTF-16'}"
        raise MediaError("text", "not_text", f"{at}: save the file as UTF-8") from None


def _checked_text(text: str, limits: Limits) -> str:
    if "\0" in text:
        raise MediaError("text", "not_text", "holds NUL characters: a binary file, or UTF-16 without a byte order mark")
    if not text or text.isspace():
        raise MediaError("text", "empty", "no text, or only spaces")
    limit_bytes = limits.text_kilobytes * 1e3
    try:
        size_bytes = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise MediaError("text", "not_text", "holds half a character (a lone surrogate)") from None
    # The bytes of UTF-16 were held against the limit already; as UTF-8 they may be half as many again.
    if size_bytes > limit_bytes * 1.5 or (len(text) > limit_bytes):
        raise MediaError(
            "text", "too_large", f"{size_bytes / 1e3:.1f} kB, over the limit of {limits.text_kilobytes:g} kB"
        )
    return text
