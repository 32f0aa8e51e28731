"""Folders and manifests → samples; limits; decoding; work ahead of its consumer. Imports no torch."""

from mmpipe.media.ahead import Ahead, Here
from mmpipe.media.decode import estimate_bytes, load, sound_seconds
from mmpipe.media.find import SUFFIXES, Listing, Samples, find
from mmpipe.media.limits import Limits
from mmpipe.media.views import View

__all__ = [
    "SUFFIXES",
    "Ahead",
    "Here",
    "Limits",
    "Listing",
    "Samples",
    "View",
    "estimate_bytes",
    "find",
    "load",
    "sound_seconds",
]
