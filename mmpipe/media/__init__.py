"""Folders and manifests → samples; limits; decoding; work ahead of its consumer. Imports no torch."""

from mmpipe.media.ahead import Ahead, Here
from mmpipe.media.content import Content, content_of, is_unchanged
from mmpipe.media.decode import estimate_bytes, label, load, picture_size, sound_seconds
from mmpipe.media.find import SUFFIXES, Listing, Samples, find
from mmpipe.media.limits import Limits
from mmpipe.media.room import Room
from mmpipe.media.views import View

__all__ = [
    "SUFFIXES",
    "Ahead",
    "Content",
    "Here",
    "Limits",
    "Listing",
    "Room",
    "Samples",
    "View",
    "content_of",
    "estimate_bytes",
    "find",
    "is_unchanged",
    "label",
    "load",
    "picture_size",
    "sound_seconds",
]
