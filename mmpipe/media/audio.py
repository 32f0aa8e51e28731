"""Sounds → (float32 mono samples [n], rate in Hz): soundfile first, PyAV for what it can't read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

from mmpipe.errors import MediaError
from mmpipe.media.image import numpy_of
from mmpipe.media.limits import Limits

if TYPE_CHECKING:
    import numpy as np

    Sound = tuple[np.ndarray[Any, np.dtype[np.float32]], int]

_BLOCK_VALUES = 1 << 20  # frames x channels decoded at a time
_MAX_CHANNELS = 64
_OGG_PAGE_BYTES = 27 + 255 + 255 * 255  # at most
_UNKNOWN_FRAMES = 1 << 62  # libsndfile's way to say that a header doesn't tell
_STREAMED_BYTES = 0x7FFF_0000  # a WAV whose header says at least this was written to a pipe: its length isn't known
_AV_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,aac,mp3,ogg,flac,wav,aiff,matroska,webm,asf,amr,caf,ac3,eac3"
_AV_SLACK_FRAMES = 4096  # what an encoder's delay may take from the length in the header
_ESTIMATED_RATE_HZ = 48_000
_HIGHEST_RATE_HZ = 1_000_000  # of a sound; what a broken header says may be anything


def from_file(
    file: BinaryIO,
    size_bytes: int,
    limits: Limits,
    max_seconds: float | None,
    start_seconds: float = 0.0,
    reserve: Callable[[int], None] = lambda count: None,
) -> Sound:
    """The sound of a file that is within its size limit; max_seconds from start_seconds on only. Raises MediaError.

    reserve: called with the bytes that it takes at its peak, before it is decoded.
    """
    try:
        sound = _soundfile(file)
    except Exception:  # noqa: BLE001 - whatever it is, PyAV may know the format
        reserve(_peak_bytes(None, size_bytes, limits, max_seconds))
        return _from_av(file, limits, max_seconds, start_seconds)
    with sound:
        reserve(_peak_bytes(sound, size_bytes, limits, max_seconds))
        counted = sound.format != "MP3" or _is_counted(_start(file, 1 << 16))
        if counted or not _has_av():
            return _from_soundfile(sound, file, size_bytes, limits, max_seconds, start_seconds, counted)
    # libsndfile guesses such a file's length from its first bit rate, and reads no further than its guess.
    return _from_av(file, limits, max_seconds, start_seconds)


def file_seconds(file: BinaryIO) -> float | None:
    """How long its header says that a file's sound is; None where it doesn't. Raises what a decoder raises."""
    try:
        with _soundfile(file) as sound:
            if 0 <= sound.frames < _UNKNOWN_FRAMES:
                return float(sound.frames / sound.samplerate)
            return None
    except Exception:  # noqa: BLE001 - a format of PyAV's
        import av

        file.seek(0)
        with av.open(file, options={"format_whitelist": _AV_FORMATS}) as container:
            return None if container.duration is None else float(container.duration / av.time_base)


def from_memory(source: Any, limits: Limits, max_seconds: float | None, start_seconds: float = 0.0) -> Sound:
    """(samples, rate_hz) as mono float32. Whole numbers are scaled by their type's range. Raises MediaError."""
    import numpy as np

    if hasattr(source, "shape"):
        raise MediaError("audio", "no_rate", "samples without a rate: give (samples, rate_hz)")
    if not isinstance(source, tuple | list) or len(source) != 2 or not hasattr(source[0], "shape"):
        text = f"a {type(source).__name__} is no sound: give a path, bytes or (samples, rate_hz)"
        if isinstance(source, tuple | list) and len(source) == 2:
            text = f"samples in a {type(source[0]).__name__}: give an array or a tensor of them, and the rate"
        raise MediaError("audio", "unsupported", text)
    samples, rate = source
    if hasattr(rate, "shape") and rate.shape == ():
        rate = rate.item()
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not 1 <= rate <= _HIGHEST_RATE_HZ:
        text = f"the rate is a number of samples per second, at most {_HIGHEST_RATE_HZ:,}: give (samples, rate_hz)"
        raise MediaError("audio", "no_rate", text)
    rate_hz = round(float(rate))
    shape = tuple(samples.shape)
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] > _MAX_CHANNELS):
        text = f"shape {list(shape)}: samples are [n] or [channels, n] with at most {_MAX_CHANNELS} channels"
        raise MediaError("audio", "unsupported", text)
    _check_length(shape[-1], rate_hz, limits)
    skipped = round(start_seconds * rate_hz)
    values = numpy_of(samples[..., skipped : skipped + _wanted(shape[-1], rate_hz, max_seconds)], "audio")
    kind = values.dtype
    if kind == np.uint8:
        values = (values.astype(np.float32) - 128) / 128
    elif np.issubdtype(kind, np.signedinteger):
        values = values.astype(np.float32) / -float(np.iinfo(kind).min)
    elif not np.issubdtype(kind, np.floating):
        raise MediaError("audio", "unsupported", f"numbers of the type {kind} are no samples")
    with np.errstate(invalid="ignore", over="ignore"):
        values = values.astype(np.float32, copy=False)
    mono = _mean(values) if values.ndim == 2 and values.size else values.reshape(-1)
    return _finished(np.ascontiguousarray(mono), rate_hz)


def estimate_file_bytes(file: BinaryIO, size_bytes: int, limits: Limits, max_seconds: float | None) -> int:
    """Peak bytes of `from_file`."""
    try:
        with _soundfile(file) as sound:
            return _peak_bytes(sound, size_bytes, limits, max_seconds)
    except Exception:  # noqa: BLE001 - a format of PyAV's
        return _peak_bytes(None, size_bytes, limits, max_seconds)


def _peak_bytes(sound: Any, size_bytes: int, limits: Limits, max_seconds: float | None) -> int:
    """The mono samples, and one block of all channels. Without a sound: a guess, as of 6 kB a second, 48 kbit/s."""
    rate_hz, channels, frames = _ESTIMATED_RATE_HZ, 2, 8 * size_bytes
    if sound is not None:
        rate_hz, channels = int(sound.samplerate), int(sound.channels)
        frames = int(sound.frames) if 0 <= sound.frames < _UNKNOWN_FRAMES else frames
    longest_seconds = min(limits.audio_minutes * 60, math.inf if max_seconds is None else max_seconds)
    frames = int(min(frames, longest_seconds * rate_hz))
    return 8 * frames + 4 * min(frames * channels, _BLOCK_VALUES)


def _check_rate(rate_hz: int) -> None:
    if rate_hz < 1:
        raise MediaError("audio", "corrupt", "its header gives no sample rate")
    if rate_hz > _HIGHEST_RATE_HZ:
        raise MediaError("audio", "corrupt", f"its header gives a rate of {rate_hz:,} Hz, over {_HIGHEST_RATE_HZ:,}")


def estimate_memory_bytes(source: Any) -> int:
    """Peak bytes of `from_memory`: of what is added to what is there."""
    size = 1
    for length in source[0].shape:
        size *= int(length)
    return 8 * size


class _Buffer(BytesIO):
    """Bytes for libsndfile, which follows broken headers to places before the start and would print a traceback."""

    def seek(self, offset: int, whence: int = 0) -> int:
        return super().seek(max(0, offset) if whence == 0 else offset, whence)


def _soundfile(file: BinaryIO) -> Any:
    """Real (unbuffered) files go by their descriptor: libsndfile then reads without calling back into Python."""
    import soundfile

    if isinstance(file, BytesIO):
        return soundfile.SoundFile(_Buffer(file.getvalue()))  # the same bytes, which neither of them copies
    file.seek(0)
    return soundfile.SoundFile(file.fileno(), closefd=False)


def _is_at_end(sound: Any, file: BinaryIO, size_bytes: int) -> bool:
    """Whether libsndfile has read all there is."""
    return bool((sound.name if isinstance(file, BytesIO) else file).tell() >= size_bytes)


def _from_soundfile(
    sound: Any,
    file: BinaryIO,
    size_bytes: int,
    limits: Limits,
    max_seconds: float | None,
    start_seconds: float,
    counted: bool,
) -> Sound:

    rate_hz, channels = int(sound.samplerate), int(sound.channels)
    _check_rate(rate_hz)
    told = 0 <= sound.frames < _UNKNOWN_FRAMES and sound.format != "MP3"  # an MP3's is a guess from its bit rate
    longest = int(limits.audio_minutes * 60 * rate_hz) + 1
    if told:
        _check_length(sound.frames, rate_hz, limits)
        longest = sound.frames
    max_seconds = None if max_seconds is None else start_seconds + max_seconds
    wanted = _wanted(longest, rate_hz, max_seconds)
    blocks: list[np.ndarray[Any, np.dtype[np.float32]]] = []
    got = round(start_seconds * rate_hz)  # frames up to here, read or passed over
    try:
        if got:
            sound.seek(got)
        while got < wanted:
            block = sound.read(min(wanted - got, _BLOCK_VALUES // channels + 1), dtype="float32", always_2d=True)
            if not len(block):
                break
            got += len(block)
            blocks.append(_mean(block.T))
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise MediaError("audio", "unreadable", error.strerror or "can't be read") from error
        if _is_at_end(sound, file, size_bytes):
            raise MediaError("audio", "truncated", "the file ends before the sound does") from error
        raise MediaError("audio", "corrupt", "the file is damaged") from error
    declared = _declared_frames(sound, told and counted, counted, got)
    if got < _wanted(declared, rate_hz, max_seconds):
        text = f"the file ends after {got / rate_hz:.1f} s of {declared / rate_hz:.1f}"
        raise MediaError("audio", "truncated", text)
    if (
        sound.format == "OGG"
        and got < _wanted(longest + 1, rate_hz, max_seconds)
        and not _ogg_is_whole(file, size_bytes)
    ):
        raise MediaError("audio", "truncated", f"the stream breaks off after {got / rate_hz:.1f} s")
    _check_length(got, rate_hz, limits)
    return _finished(_joined(blocks), rate_hz)


def _ogg_is_whole(file: BinaryIO, size_bytes: int) -> bool:
    """Whether the last page is there to its end, and says that it ends its stream. libsndfile takes the last one that
    it finds for the end. Source: RFC 3533, section 6."""
    file.seek(max(0, size_bytes - 2 * _OGG_PAGE_BYTES))
    tail = file.read(2 * _OGG_PAGE_BYTES)
    page = tail[tail.rfind(b"OggS") :]
    if not page.startswith(b"OggS") or len(page) < 27:
        return False
    segments = page[27 : 27 + page[26]]
    return bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(segments)


def _declared_frames(sound: Any, told: bool, counted: bool, got: int) -> int:
    """How many frames the header promised. libsndfile shortens a WAV's or AIFF's to what is there; its log tells."""
    if sound.format == "MP3":
        return int(sound.frames * 0.98) if counted else got  # padding makes the count inexact by a few frames
    cut = re.search(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    if cut and 0 < int(cut[2]) < int(cut[1]) < _STREAMED_BYTES:
        return int(sound.frames * int(cut[1]) / int(cut[2]))
    return int(sound.frames) if told else got


def _is_counted(start: bytes) -> bool:
    """Whether an MP3's first frame, behind any ID3 block, says how many follow."""
    at = 0
    if start[:3] == b"ID3" and len(start) > 10:
        at = 10 + (start[6] << 21 | start[7] << 14 | start[8] << 7 | start[9])
    first = start[at : at + 512]
    return b"Xing" in first or b"Info" in first


def _has_av() -> bool:
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def _from_av(file: BinaryIO, limits: Limits, max_seconds: float | None, start_seconds: float) -> Sound:

    try:
        import av
    except ImportError as error:
        text = "not a sound that soundfile can read: for m4a, aac and others, pip install 'mmpipe[av]'"
        raise MediaError("audio", "unsupported", text) from error
    file.seek(0)
    blocks: list[np.ndarray[Any, np.dtype[np.float32]]] = []
    got = rate_hz = declared = 0
    max_seconds = None if max_seconds is None else start_seconds + max_seconds
    try:
        # A list of formats, because others (playlists) make FFmpeg open files and addresses of the sender's choice.
        with av.open(file, options={"format_whitelist": _AV_FORMATS}) as container:
            if not container.streams.audio:
                raise MediaError("audio", "unsupported", "there is no sound in it")
            stream = container.streams.audio[0]
            rate_hz = int(stream.codec_context.sample_rate)
            _check_rate(rate_hz)
            if stream.duration is not None and stream.time_base is not None:
                declared = int(stream.duration * stream.time_base * rate_hz)
                _check_length(declared, rate_hz, limits)
            is_exact = container.format.name.startswith("mov")  # in others it is a guess from the bit rate
            longest = int(limits.audio_minutes * 60 * rate_hz) + 1
            wanted = _wanted(longest, rate_hz, max_seconds)
            resampler = av.AudioResampler(format="fltp")
            for frame in container.decode(stream):
                for planar in [frame] if frame.format.name == "fltp" else resampler.resample(frame):
                    rate_hz = int(planar.sample_rate)
                    _check_rate(rate_hz)
                    block = _mean(planar.to_ndarray())
                    passed = max(0, round(start_seconds * rate_hz) - got)
                    got += len(block)
                    if passed < len(block):  # what is passed over is not kept
                        blocks.append(block[passed:])
                if got >= wanted:
                    break
    except (MediaError, MemoryError):
        raise
    except Exception as error:
        raise _av_error(error, _start(file, 16), got, rate_hz) from error
    if is_exact and got < _wanted(int(0.98 * declared) - _AV_SLACK_FRAMES, rate_hz, max_seconds):
        text = f"the file ends after {got / rate_hz:.1f} s of {declared / rate_hz:.1f}"
        raise MediaError("audio", "truncated", text)
    _check_length(got, rate_hz, limits)
    wanted = max(0, wanted - round(start_seconds * rate_hz))
    return _finished(_joined(blocks)[:wanted], rate_hz)


def _av_error(error: Exception, head: bytes, got: int, rate_hz: int) -> MediaError:
    if isinstance(error, OSError) and type(error).__module__ == "builtins" and error.errno:
        return MediaError("audio", "unreadable", error.strerror or "can't be read")
    if got:
        return MediaError("audio", "truncated", f"the sound breaks off after {got / rate_hz:.1f} s")
    if head[4:8] == b"ftyp":  # its index is at the end
        return MediaError("audio", "truncated", "an MPEG-4 file that lacks a part: not wholly copied?")
    if head[:4] in (b"RIFF", b"fLaC", b"OggS", b"FORM", b"caff") or head[:3] == b"ID3":
        return MediaError("audio", "corrupt", "begins like a sound file, but its header can't be read")
    return MediaError("audio", "unsupported", "not a sound of a known kind")


def _wanted(frames: int, rate_hz: int, max_seconds: float | None) -> int:
    return frames if max_seconds is None else min(frames, max(1, round(max_seconds * rate_hz)))


def _check_length(frames: int, rate_hz: int, limits: Limits) -> None:
    if frames > limits.audio_minutes * 60 * rate_hz:
        minutes = frames / rate_hz / 60
        raise MediaError("audio", "too_large", f"{minutes:.1f} minutes, over the limit of {limits.audio_minutes:g}")


def _start(file: BinaryIO, count: int) -> bytes:
    """The first bytes; whoever decodes the file by its descriptor finds it where it was."""
    at = file.tell()
    file.seek(0)
    start = file.read(count)
    file.seek(at)
    return start


def _mean(channels_CN: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The channels' mean [n]. Channel by channel: numpy's own mean of so short an axis takes thirty times longer."""
    import numpy as np

    mono_N: np.ndarray[Any, np.dtype[np.float32]] = channels_CN[0]
    if len(channels_CN) > 1:
        with np.errstate(invalid="ignore", over="ignore"):
            mono_N = mono_N + channels_CN[1]
            for channel_N in channels_CN[2:]:
                mono_N += channel_N
            mono_N /= np.float32(len(channels_CN))
    return mono_N


def _joined(blocks: list[np.ndarray[Any, np.dtype[np.float32]]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    import numpy as np

    if len(blocks) == 1:
        return np.ascontiguousarray(blocks[0])
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def _finished(mono: np.ndarray[Any, np.dtype[np.float32]], rate_hz: int) -> Sound:
    import numpy as np

    if not mono.size:
        raise MediaError("audio", "empty", "no samples")
    if not np.isfinite(mono).all():
        raise MediaError("audio", "not_finite", "holds samples that are no number")
    return mono, rate_hz
