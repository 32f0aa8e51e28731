"""What one file may cost before it is refused unopened."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Upper bounds on single files. Checked on sizes and headers, before anything is decoded; the length of a sound
    whose header doesn't tell it (Matroska, MP3) when as much has been decoded as is heard, or as the bound allows.

    A medium above its bound raises MediaError `too_large`; it never ends a job. Units are decimal.
    """

    image_megapixels: float = 100.0  # width x height, 10^6 pixels
    file_megabytes: float = 512.0  # any file, 10^6 bytes
    text_kilobytes: float = 1024.0  # a text, 10^3 bytes
    audio_minutes: float = 240.0  # the whole recording, also where only its beginning is read
