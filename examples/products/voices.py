"""Spoken notes: espeak-ng through ctypes, and the noise around it.

espeak-ng keeps state from one utterance to the next (filters, phases, its random numbers), and neither a new seed
nor a restart clears all of it. So the process that loaded and seeded it never speaks: each call forks a child that
does. What a voice says then depends on the request alone. POSIX only, for that reason.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

SAMPLE_RATE_HZ = 16_000
MIN_SECONDS, MAX_SECONDS = 1.5, 3.5
MAX_SAMPLES = int(MAX_SECONDS * SAMPLE_RATE_HZ)  # 56_000 samples
MIN_SAMPLES = int(MIN_SECONDS * SAMPLE_RATE_HZ)  # 24_000 samples
LONGEST_SILENCE_SECONDS = 0.25  # before and after the words

ACCENTS = ("en", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# A voice is an accent and a variant; no variant is in two splits. Left out: whispers, robots, choirs, very loud ones.
VARIANTS = {
    "train": _words(
        """Alex Alicia Andrea Andy Annie Denis Diogo Gene Henrique Jacky Lee Mario Michael Mike Reed RicishayMax Nguyen
        adam anika aunty belinda benjamin boris caleb ed edward f1 f3 f5 grandma gustave ian john linda m1 m3 m5 m7
        marcelo michel paul pedro rob steph travis"""
    ),
    "tune": _words("Gene2 Hugo RicishayMax2 david edward2 f2 grandpa m2 m6 max pablo robert steph3 victor"),
    "test": _words("Marco RicishayMax3 f4 iven kaukovalta m4 m8 mike2 miguel norbert quincy sandro steph2 zac"),
}

_BACKGROUND = (
    "the next train to the coast leaves from platform four in ten minutes",
    "could you pass me the salt please, and the water as well",
    "they say it will rain on Thursday but the weekend looks fine",
    "I told him twice already, and he still didn't call the office",
    "two coffees and one tea, that makes seven pounds forty altogether",
    "the children have gone to the park with their grandmother",
    "there is a meeting at nine and another one after lunch",
    "turn left at the church and then carry on down the hill",
)
_BABBLE_VOICES = 12
_PEAK = 0.6  # of full scale
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER
_SYNCHRONOUS, _CHARACTERS_ARE_UTF8 = 2, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

Sound = NDArray[np.float32]


class SpeechMissing(RuntimeError):
    """No espeak-ng library can be loaded. The message says what to install."""


@dataclass(frozen=True)
class Note:
    """All that decides the bytes of one spoken note."""

    sentence: str
    accent: str
    variant: str
    words_per_minute: int
    pitch: int  # 0 to 99, espeak's scale
    snr_db: float
    noise_shares: tuple[float, float, float]  # babble, pink, white; of the noise's power
    seed: int

    @property
    def voice(self) -> str:
        return f"{self.accent}+{self.variant}"


@cache
def _library() -> tuple[ctypes.CDLL, int]:
    """The loaded library and the rate it speaks at, Hz. Prefers the package espeakng-loader to the system's."""
    try:
        import espeakng_loader  # type: ignore[import-untyped]

        path, data = espeakng_loader.get_library_path(), os.path.dirname(espeakng_loader.get_data_path())
    except ImportError:
        path, data = ctypes.util.find_library("espeak-ng"), None
    remedy = "pip install 'mmpipe[demo]' (espeakng-loader), or apt install libespeak-ng1"
    if path is None:
        raise SpeechMissing(f"no espeak-ng library: {remedy}")
    if not hasattr(os, "fork"):
        raise SpeechMissing("notes need a system with fork (Linux, macOS)")
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise SpeechMissing(f"espeak-ng does not load ({error}): {remedy}") from error
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
        ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    rate_hz = library.espeak_Initialize(_SYNCHRONOUS, 500, data.encode() if data else None, 0)
    if rate_hz <= 0:
        raise SpeechMissing(f"espeak-ng finds no voices in {data or 'its own folder'}: {remedy}")
    if hasattr(library, "espeak_ng_SetRandSeed"):  # since 1.52; the ones before take the clock
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    return library, rate_hz


def _speak_here(voice: str, sentence: str, words_per_minute: int, pitch: int) -> bytes:
    library, _ = _library()
    pieces: list[bytes] = []

    @_CALLBACK  # type: ignore[untyped-decorator]
    def collect(samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    library.espeak_SetSynthCallback(collect)
    library.espeak_SetVoiceByName(voice.encode())
    for parameter, value in ((_RATE, words_per_minute), (_VOLUME, 100), (_PITCH, pitch), (_RANGE, 50)):
        library.espeak_SetParameter(parameter, value, 0)
    text = sentence.encode()
    library.espeak_Synth(text, len(text) + 1, 0, 1, 0, _CHARACTERS_ARE_UTF8, None, None)
    library.espeak_Synchronize()
    return b"".join(pieces)


def speak(voice: str, sentence: str, words_per_minute: int, pitch: int) -> Sound:
    """→ 16 kHz mono samples without the silence at either end, peak 1."""
    _, rate_hz = _library()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(_speak_here(voice, sentence, words_per_minute, pitch))
            status = 0
        finally:
            os._exit(status)  # no clean-up of what belongs to the parent
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        raw = pipe.read()
    _, status = os.waitpid(child, 0)
    spoken = np.frombuffer(raw, "<i2").astype(np.float32) / 32768
    if status or not spoken.any():
        raise SpeechMissing(f"espeak-ng said nothing in voice {voice} (status {status})")
    spoken = soxr.resample(spoken, rate_hz, SAMPLE_RATE_HZ).astype(np.float32)
    loud = np.flatnonzero(np.abs(spoken) > 0.01 * np.abs(spoken).max())
    spoken = spoken[loud[0] : loud[-1] + 1]
    return np.asarray(spoken / np.abs(spoken).max(), np.float32)


@cache
def _background(split: str) -> tuple[Sound, ...]:
    """Other people's talk, in voices of the same split."""
    return tuple(
        speak(f"{ACCENTS[i % len(ACCENTS)]}+{VARIANTS[split][i]}", _BACKGROUND[i % len(_BACKGROUND)], 150 + 5 * i, 50)
        for i in range(_BABBLE_VOICES)
    )


def _unit_power(sound: Sound) -> Sound:
    return sound / max(float(np.sqrt(np.mean(np.square(sound)))), 1e-9)


def noise(split: str, samples: int, shares: tuple[float, float, float], random: np.random.Generator) -> Sound:
    """Babble, pink and white noise, mixed by their shares of the power → [samples], power 1."""
    babble = np.zeros(samples, np.float32)
    talkers = _background(split)
    for k in random.choice(len(talkers), size=5, replace=False):
        babble += np.roll(np.resize(_unit_power(talkers[k]), samples), int(random.integers(samples)))
    white = random.standard_normal(samples).astype(np.float32)
    spectrum = np.fft.rfft(random.standard_normal(samples))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))  # power falls as 1/f
    pink = np.fft.irfft(spectrum, samples).astype(np.float32)
    mix = sum(np.sqrt(share) * _unit_power(kind) for share, kind in zip(shares, (babble, pink, white), strict=True))
    return _unit_power(np.asarray(mix, np.float32))


def render(note: Note, split: str) -> NDArray[np.int16]:
    """→ 16 kHz mono samples, 1.5 to 3.5 s. What would be too long is said faster."""
    random = np.random.default_rng(note.seed)
    words_per_minute = note.words_per_minute
    spoken = speak(note.voice, note.sentence, words_per_minute, note.pitch)
    while len(spoken) > MAX_SAMPLES and words_per_minute < 400:
        words_per_minute = int(words_per_minute * 1.15)
        spoken = speak(note.voice, note.sentence, words_per_minute, note.pitch)
    spoken = spoken[:MAX_SAMPLES]
    silence = int(random.integers(int(LONGEST_SILENCE_SECONDS * SAMPLE_RATE_HZ)))
    length = min(max(len(spoken) + 2 * silence, MIN_SAMPLES), MAX_SAMPLES)
    start = int(random.integers(length - len(spoken) + 1))
    clean = np.zeros(length, np.float32)
    clean[start : start + len(spoken)] = _unit_power(spoken)
    sound = clean + noise(split, length, note.noise_shares, random) * np.float32(10 ** (-note.snr_db / 20))
    return np.asarray(np.round(sound / np.abs(sound).max() * _PEAK * 32767), np.int16)
