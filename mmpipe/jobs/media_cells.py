"""Media of a shown sample → cells of HTML: a thumbnail, the words, a waveform with a player. Never an exception.

Only what the pipeline used is opened; the rest is said to be unopened, and stays so.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpipe.errors import MediaError
from mmpipe.jobs import charts
from mmpipe.jobs.markup import escape, seconds, tag, user
from mmpipe.media import Limits, load

if TYPE_CHECKING:
    import numpy as np

    from mmpipe.types import Prediction, Sample

THUMBNAIL_PIXELS = 160  # the longer side
PLAYER_BYTES = 300_000  # a larger sound file gets its waveform only
EMBEDDED_BYTES = 2_000_000  # of data URIs in one page; what comes later goes without
_FOR_PICTURES = 500_000  # of those, which sounds must leave
_WAVE_SECONDS, _WAVE_BARS = 60.0, 72
_PLAYABLE = {
    ".wav": "audio/wav",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
    ".oga": "audio/ogg",
    ".opus": "audio/ogg",
    ".flac": "audio/flac",
    ".m4a": "audio/mp4",
    ".aac": "audio/aac",
    ".webm": "audio/webm",
}


@dataclass
class MediaCells:
    """Makes cells, and keeps count of the bytes that they put into the page.

    With thumbnails=False no medium is opened and nothing of its content is shown.
    """

    thumbnails: bool
    limits: Limits
    left_bytes: int = EMBEDDED_BYTES

    def cell(self, sample: Sample, prediction: Prediction, modality: str) -> str:
        """The cell of one modality, whatever became of it; nothing where the sample hasn't got it."""
        if modality in prediction.used:
            if not self.thumbnails:
                return _note(modality, "opened", "used")
            return self._shown(sample, modality)
        if modality in prediction.failed:
            return _note(modality, "could not be used", "broken")
        if modality in prediction.skipped:
            return _note(modality, "not opened", "unopened")
        return ""

    def _shown(self, sample: Sample, modality: str) -> str:
        try:
            source = sample.media[modality]
            if modality == "image":
                return self._image(source, sample.id)
            if modality == "text":
                return tag("figure", tag("blockquote", user(load("text", source, limits=self.limits))), cls="cell text")
            return self._sound(source)
        except MediaError as error:
            return _note(modality, f"can’t be shown: {error.code.replace('_', ' ')}", "broken")
        except Exception:  # noqa: BLE001 - a report is told without what it can't show
            return _note(modality, "can’t be shown", "broken")

    def _image(self, source: Any, name: str) -> str:
        picture = load("image", source, limits=self.limits, smallest_side=2 * THUMBNAIL_PIXELS)
        picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        buffer = BytesIO()
        picture.save(buffer, "JPEG", quality=82, optimize=True)
        uri = self._uri("image/jpeg", buffer.getvalue())
        if uri is None:
            return _note("image", "left out to keep this page small", "used")
        width, height = picture.size
        return tag(
            "figure", f'<img src="{uri}" width="{width}" height="{height}" alt="{escape(name)}">', cls="cell image"
        )

    def _sound(self, source: Any) -> str:
        samples, rate_hz = load("audio", source, limits=self.limits, max_seconds=_WAVE_SECONDS)
        length_seconds = len(samples) / rate_hz
        length = f"first {seconds(_WAVE_SECONDS)}" if length_seconds >= _WAVE_SECONDS else seconds(length_seconds)
        drawing = charts.waveform(_peaks(samples), f"the sound's level over time, {length}")
        return tag("figure", drawing + self._player(source) + tag("figcaption", length), cls="cell audio")

    def _player(self, source: Any) -> str:
        kind = _PLAYABLE.get(source.suffix.lower()) if isinstance(source, Path) else None
        if kind is None or source.stat().st_size > PLAYER_BYTES:
            return ""
        uri = self._uri(kind, source.read_bytes(), leave_bytes=_FOR_PICTURES)
        return "" if uri is None else f'<audio controls preload="metadata" src="{uri}"></audio>'

    def _uri(self, kind: str, content: bytes, leave_bytes: int = 0) -> str | None:
        """The content as a data URI, while there is room for it."""
        encoded = base64.b64encode(content).decode("ascii")
        if len(encoded) > self.left_bytes - leave_bytes:
            return None
        self.left_bytes -= len(encoded)
        return f"data:{kind};base64,{encoded}"


def _peaks(samples: np.ndarray[Any, np.dtype[np.float32]]) -> list[float]:
    import numpy as np

    parts = np.array_split(np.abs(samples), min(_WAVE_BARS, len(samples)))
    return [float(part.max()) for part in parts]


def _note(modality: str, words: str, kind: str) -> str:
    return tag("figure", tag("b", escape(modality)) + tag("span", escape(words)), cls=f"cell note {kind}")
