"""What a medium is, as a hash: equal hashes, equal media, whatever the file is called."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, replace
from typing import Any

from mmpipe.errors import MediaError
from mmpipe.media.decode import is_file, opened
from mmpipe.media.limits import Limits
from mmpipe.media.views import View

_CHUNK = 1 << 18  # bytes read at once
_MOST_BYTES = 64_000_000  # reading more takes longer than encoding what is heard of it
_FRESH_SECONDS = 2.0  # a file as young as this may be written to within one tick of its clock


@dataclass(frozen=True)
class Content:
    """The hash of a medium, and of a file what tells whether it has been written to since."""

    digest: bytes
    stamp: tuple[int, ...] | None = None
    fresh: bool = False


def content_of(modality: str, source: Any, limits: Limits = Limits()) -> Content | None:  # noqa: B008 - frozen
    """What `load` would decode, as a hash of its bytes. A file is read, within `limits`, and not decoded.

    None for what has no bytes to tell it by (a PIL image, a list), for more than 64 MB of them, and for what can't be
    read: `load` says why. Never raises.
    """
    try:
        if isinstance(source, View):
            part = repr((source.start, source.box, source.mirrored)).encode()
            whole = content_of(modality, source.source, limits)
            return None if whole is None else replace(whole, digest=_hash(b"view " + part, whole.digest))
        if isinstance(source, str) and modality == "text":
            return Content(_hash(b"text", source.encode("utf-8", "surrogatepass")))
        if is_file(source):
            return _of_file(modality, source, limits)
        if modality == "audio" and isinstance(source, tuple) and len(source) == 2:
            sound, rate = source
            plain = isinstance(rate, int | float) or hasattr(rate, "dtype")
            return _of_array(sound, f"sound {float(rate)}".encode()) if plain else None
        return _of_array(source, b"array")
    except MediaError:
        return None
    except Exception:  # noqa: BLE001 - whatever a user's object does, load says what is wrong
        return None


def is_unchanged(modality: str, source: Any, content: Content, limits: Limits = Limits()) -> bool:  # noqa: B008
    """Whether a file is still what was hashed: else what was decoded in between may be something else."""
    if content.stamp is None:
        return True
    try:
        if _stamp(os.stat(source.source if isinstance(source, View) else source)) != content.stamp:
            return False
    except OSError:
        return False
    return not content.fresh or content_of(modality, source, limits) == content


def _of_file(modality: str, source: Any, limits: Limits) -> Content | None:
    with opened(modality, source, limits) as (file, size_bytes):
        if size_bytes > _MOST_BYTES:
            return None
        if isinstance(source, bytes | bytearray | memoryview):
            return Content(_hash(b"bytes", source))
        status = os.fstat(file.fileno())
        digest = hashlib.sha256(b"file\0")
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        fresh = time.time() - status.st_mtime < _FRESH_SECONDS
        return Content(digest.digest(), _stamp(status), fresh)


def _of_array(source: Any, kind: bytes) -> Content | None:
    if source.nbytes > _MOST_BYTES:
        return None
    if hasattr(source, "detach") and hasattr(source, "numpy"):  # a tensor: torch is not imported here
        kind += b" tensor"  # whose first dimension may be channels where an array's is rows
        source = source.detach().cpu().numpy()
    import numpy as np  # not needed where samples are only found

    if not isinstance(source, np.ndarray) or source.dtype.hasobject:
        return None
    about = f"{source.dtype.str} {source.shape}".encode()
    return Content(_hash(kind + b" " + about, np.ascontiguousarray(source).tobytes()))


def _hash(kind: bytes, data: bytes | bytearray | memoryview) -> bytes:
    digest = hashlib.sha256(kind + b"\0")
    digest.update(data)
    return digest.digest()


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
