"""The small encoders that ship with mmpipe: photo, title and note, trained by examples/products/train.py.

They exist so that a first run needs no download: each is far below a million parameters and reads only what the
products demo has, a picture of one article, a short title, a few spoken words. They are built as big encoders are: a
host part that makes tensors of fixed shapes, and a module of plain tensor operations.

Shapes: B batch, C channel, H height, W width (photo) or embedding width (title), T word, K piece of a word, N sample,
F frame, M mel band, D embedding.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mmpipe.encoders.base import BuiltEncoder, EncoderError

DIM = 64  # of every embedding here

PHOTO_SIDE = 28  # pixels
PHOTO_CHANNELS = (32, 64, 128)  # of the three layers

TITLE_WORDS = 24  # what follows is not read
TITLE_PIECES = 12  # ids a word: itself and its first 11 character trigrams
TITLE_BUCKETS = 4096  # ids; 0 is padding
LONGEST_KEPT = 32  # characters of a word whose ids are kept
TITLE_WIDTH = 64
TITLE_HEADS = 4
TITLE_LAYERS = 2

SAMPLE_RATE_HZ = 16_000
HOP = 256  # samples, 16 ms
WINDOW = 2 * HOP  # 512 samples, 32 ms
NOTE_HOPS = 219
NOTE_SAMPLES = NOTE_HOPS * HOP  # 56_064 samples
NOTE_SECONDS = NOTE_SAMPLES / SAMPLE_RATE_HZ  # 3.504 s
MARGIN_SECONDS = 0.1  # of sound kept beyond the window while resampling: more than the filter's tail
SHORTEST_NOTE_SAMPLES = 16 * HOP  # 4_096 samples, the least window to ask for
BINS = WINDOW // 2 + 1  # 257 frequencies, 31.25 Hz apart
MEL_BANDS = 64
MEL_LOWEST_HZ, MEL_HIGHEST_HZ = 60.0, 7600.0
LOG_RANGE = 6.0  # decades of power kept below the loudest band of a note
NOTE_WIDTH = 128
NOTE_LAYERS = 5
NOTE_HALVED_BEFORE = 1  # the layer from which on there are half as many frames


class PhotoNet(nn.Module):
    """photo uint8 [B, 1, 28, 28] → [B, 64]: three layers of two 3×3 convolutions each, then the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = 1 / 127.5, -1.0
        widths = (1, *PHOTO_CHANNELS)
        self.layers = nn.ModuleList(
            nn.Sequential(
                *([nn.MaxPool2d(2)] if i else []),
                nn.Conv2d(widths[i], widths[i + 1], 3, padding=1, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
                nn.ReLU(),
                nn.Conv2d(widths[i + 1], widths[i + 1], 3, padding=1, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
                nn.ReLU(),
            )
            for i in range(len(PHOTO_CHANNELS))
        )
        self.out = nn.Linear(PHOTO_CHANNELS[-1], DIM)

    def forward(self, photo: Tensor) -> Tensor:
        x_BCHW = photo.to(torch.float32) * self.scale + self.shift
        for layer in self.layers:
            x_BCHW = layer(x_BCHW)
        return cast(Tensor, self.out(x_BCHW.mean(dim=(2, 3))))


class TitleLayer(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(TITLE_WIDTH), nn.LayerNorm(TITLE_WIDTH)
        self.qkv, self.mix = nn.Linear(TITLE_WIDTH, 3 * TITLE_WIDTH), nn.Linear(TITLE_WIDTH, TITLE_WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(TITLE_WIDTH, 2 * TITLE_WIDTH), nn.GELU(), nn.Linear(2 * TITLE_WIDTH, TITLE_WIDTH)
        )

    def forward(self, x_BTW: Tensor, bias_B11T: Tensor) -> Tensor:
        words, share = x_BTW.shape[1], TITLE_WIDTH // TITLE_HEADS
        q, k, v = (
            part.reshape(-1, words, TITLE_HEADS, share).transpose(1, 2)
            for part in self.qkv(self.norm_attention(x_BTW)).chunk(3, dim=-1)
        )
        weights = (q @ k.transpose(-1, -2) * share**-0.5 + bias_B11T).softmax(dim=-1)
        x_BTW = x_BTW + self.mix((weights @ v).transpose(1, 2).reshape(-1, words, TITLE_WIDTH))
        return cast(Tensor, x_BTW + self.mlp(self.norm_mlp(x_BTW)))


class TitleNet(nn.Module):
    """pieces int64 [B, T, K], mask int64 [B, T] → [B, 64]: the sum of a word's pieces, two layers, masked mean."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = nn.Embedding(TITLE_BUCKETS, TITLE_WIDTH, padding_idx=0)
        self.places = nn.Parameter(torch.randn(TITLE_WORDS, TITLE_WIDTH) * 0.02)
        self.layers = nn.ModuleList(TitleLayer() for _ in range(TITLE_LAYERS))
        self.norm, self.out = nn.LayerNorm(TITLE_WIDTH), nn.Linear(TITLE_WIDTH, DIM)

    def forward(self, pieces: Tensor, mask: Tensor) -> Tensor:
        mask_BT = mask.to(torch.float32)
        x_BTW = self.pieces(pieces).sum(dim=2) + self.places[: pieces.shape[1]]
        bias_B11T = ((mask_BT - 1) * 1e4)[:, None, None, :]  # finite: a title without words must not become NaN
        for layer in self.layers:
            x_BTW = layer(x_BTW, bias_B11T)
        x_BTW = self.norm(x_BTW) * mask_BT[:, :, None]
        return cast(Tensor, self.out(x_BTW.sum(dim=1) / mask_BT.sum(dim=1, keepdim=True).clamp_min(1.0)))


def mel_filters() -> Tensor:
    """[257, 64] float32: triangles evenly spaced on the mel scale, 2595 · log10(1 + f / 700)."""
    low, high = (2595 * np.log10(1 + f / 700) for f in (MEL_LOWEST_HZ, MEL_HIGHEST_HZ))
    corners_hz = 700 * (10 ** (np.linspace(low, high, MEL_BANDS + 2) / 2595) - 1)
    bins_hz = np.arange(BINS)[:, None] * SAMPLE_RATE_HZ / WINDOW
    rising = (bins_hz - corners_hz[:-2]) / (corners_hz[1:-1] - corners_hz[:-2])
    falling = (corners_hz[2:] - bins_hz) / (corners_hz[2:] - corners_hz[1:-1])
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling)).astype(np.float32))


def fourier_basis() -> Tensor:
    """[512, 514] float32: Hann window times cosines, then sines, of the 257 frequencies."""
    n = np.arange(WINDOW)[:, None]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / WINDOW)
    angle = 2 * np.pi * n * np.arange(BINS) / WINDOW
    return torch.from_numpy(np.concatenate([hann * np.cos(angle), hann * np.sin(angle)], axis=1).astype(np.float32))


class NoteLayer(nn.Module):
    """Depthwise then pointwise convolution over time, added to what came in; first half the frames, if asked."""

    def __init__(self, halve: bool) -> None:
        super().__init__()
        self.halve = halve
        self.depthwise = nn.Conv1d(NOTE_WIDTH, NOTE_WIDTH, 9, padding=4, groups=NOTE_WIDTH, bias=False)
        self.pointwise = nn.Conv1d(NOTE_WIDTH, NOTE_WIDTH, 1, bias=False)
        self.norm_depthwise, self.norm_pointwise = nn.BatchNorm1d(NOTE_WIDTH), nn.BatchNorm1d(NOTE_WIDTH)

    def forward(self, x_BCF: Tensor) -> Tensor:
        if self.halve:
            x_BCF = nn.functional.max_pool1d(x_BCF, 2)
        y_BCF = torch.relu(self.norm_depthwise(self.depthwise(x_BCF)))
        return torch.relu(x_BCF + self.norm_pointwise(self.pointwise(y_BCF)))


class NoteNet(nn.Module):
    """samples float32 [B, N], 16 kHz, N a multiple of the hop → [B, 64]: log-mel, five layers, attention over time."""

    basis: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("basis", fourier_basis(), persistent=False)
        self.register_buffer("filters", mel_filters(), persistent=False)
        self.stem = nn.Sequential(
            nn.Conv1d(MEL_BANDS, NOTE_WIDTH, 5, stride=2, padding=2, bias=False), nn.BatchNorm1d(NOTE_WIDTH), nn.ReLU()
        )
        self.layers = nn.ModuleList(NoteLayer(halve=i == NOTE_HALVED_BEFORE) for i in range(NOTE_LAYERS))
        self.attention = nn.Conv1d(NOTE_WIDTH, 1, 1)
        self.out = nn.Linear(NOTE_WIDTH, DIM)

    def log_mel(self, samples: Tensor) -> Tensor:
        """[B, N] → [B, M, F], between -1 and 1: each note relative to its own loudest band."""
        hops_BFH = samples.reshape(-1, samples.shape[1] // HOP, HOP)
        frames_BFN = torch.cat([hops_BFH[:, :-1], hops_BFH[:, 1:]], dim=-1)
        cosine_BFK, sine_BFK = (frames_BFN @ self.basis).chunk(2, dim=-1)
        power_BFM = (cosine_BFK * cosine_BFK + sine_BFK * sine_BFK) @ self.filters
        log_BMF = power_BFM.clamp_min(1e-8).log10().transpose(1, 2)
        loudest_B11 = log_BMF.amax(dim=(1, 2), keepdim=True)
        return (log_BMF - loudest_B11).clamp_min(-LOG_RANGE) * (2 / LOG_RANGE) + 1

    def from_log_mel(self, x_BMF: Tensor) -> Tensor:
        """What follows `log_mel`; training augments in between."""
        x_BCF = self.stem(x_BMF)
        for layer in self.layers:
            x_BCF = layer(x_BCF)
        # as `self.attention(x_BCF)`; but with one output channel oneDNN treats the last rows of a small batch apart
        scores_B1F = (x_BCF * self.attention.weight).sum(dim=1, keepdim=True) + self.attention.bias
        weights_B1F = scores_B1F.softmax(dim=-1)
        return cast(Tensor, self.out((x_BCF * weights_B1F).sum(dim=-1)))

    def forward(self, samples: Tensor) -> Tensor:
        return self.from_log_mel(self.log_mel(samples))


def prepare_photo(image: Any) -> dict[str, Tensor]:
    """PIL image, RGB or L → photo uint8 [1, 28, 28], grey, squeezed to a square."""
    from PIL import Image

    small = image.convert("L").resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BOX)
    return {"photo": torch.from_numpy(np.array(small, np.uint8)[None])}


def word_ids(word: str) -> tuple[int, ...]:
    """A lower-case word → up to 12 ids in 1 … 4095: crc32 of itself and of its trigrams, with < and > at its ends."""
    return _kept_ids(word) if len(word) <= LONGEST_KEPT else _ids(word)


def _ids(word: str) -> tuple[int, ...]:
    marked = f"<{word}>"
    trigrams = (marked[i : i + 3] for i in range(min(len(marked) - 2, TITLE_PIECES - 1)))
    return tuple(zlib.crc32(piece.encode()) % (TITLE_BUCKETS - 1) + 1 for piece in (marked, *trigrams))


_kept_ids = lru_cache(maxsize=8192)(_ids)  # titles share most of their words


def prepare_title(text: str, max_words: int = TITLE_WORDS) -> dict[str, Tensor]:
    """str → pieces int64 [T, 12] and mask int64 [T]; punctuation parts words, a hyphen within one doesn't."""
    cleaned = "".join(c if c.isalnum() or c == "-" else " " for c in text.lower())
    words = [word.strip("-") for word in cleaned.split()]
    pieces = np.zeros((max_words, TITLE_PIECES), np.int64)
    mask = np.zeros(max_words, np.int64)
    for t, word in enumerate([word for word in words if word][:max_words]):
        ids = word_ids(word)
        pieces[t, : len(ids)] = ids
        mask[t] = 1
    return {"pieces": torch.from_numpy(pieces), "mask": torch.from_numpy(mask)}


def prepare_note(sound: tuple[Any, int], window_samples: int = NOTE_SAMPLES) -> dict[str, Tensor]:
    """(float32 mono [n], Hz) → samples float32 [N] at 16 kHz: the first window, zeros after a shorter sound."""
    samples, rate_hz = np.asarray(sound[0], np.float32), sound[1]
    if rate_hz != SAMPLE_RATE_HZ and samples.size:
        import soxr

        needed = int(np.ceil((window_samples / SAMPLE_RATE_HZ + MARGIN_SECONDS) * rate_hz))
        samples = soxr.resample(samples[:needed], rate_hz, SAMPLE_RATE_HZ).astype(np.float32)
    window = np.zeros(window_samples, np.float32)
    window[: min(samples.size, window_samples)] = samples[:window_samples]
    return {"samples": torch.from_numpy(window)}


@dataclass(frozen=True)
class _Kind:
    modality: str
    net: Callable[[], nn.Module]


_KINDS = {
    "photo": _Kind("image", PhotoNet),
    "title": _Kind("text", TitleNet),
    "note": _Kind("audio", NoteNet),
}


def save(path: Path, name: str, module: nn.Module) -> None:
    """Write the weights of PhotoNet, TitleNet or NoteNet as `load` reads them."""
    from safetensors.torch import save_file

    state = {key: value.contiguous() for key, value in module.state_dict().items() if "num_batches" not in key}
    save_file(state, str(path), metadata={"mmpipe.tiny": name})


def load(
    name: str,
    modality: str,
    *,
    weights: Path | None,
    max_tokens: int | None = None,
    max_seconds: float | None = None,
) -> BuiltEncoder:
    """`name` is photo, title or note; `weights` the safetensors file that `save` wrote.

    `max_tokens` (title, words) and `max_seconds` (note) shorten what is read, never lengthen it.
    Raises EncoderError: an unknown name, the wrong modality, no weights, weights that don't fit, too many words.
    """
    kind = _KINDS.get(name)
    if kind is None:
        raise EncoderError(f"tiny:{name} is not known; there are {', '.join(f'tiny:{known}' for known in _KINDS)}")
    if kind.modality != modality:
        raise EncoderError(f"tiny:{name} reads {kind.modality}, not {modality}")
    if weights is None:
        raise EncoderError(f"tiny:{name} needs a weights file: tiny models are not random")
    module = kind.net()
    _load_weights(module, name, weights)
    preprocessing: dict[str, Any] = {"model": f"tiny:{name}"}
    if name == "photo":
        from PIL import Image

        preprocessing |= {"side": PHOTO_SIDE, "mode": "L", "resample": "box", "scale": 1 / 127.5, "shift": -1.0}
        example: Any = Image.new("RGB", (4 * PHOTO_SIDE, 4 * PHOTO_SIDE), "white")
        return BuiltEncoder(
            modality=modality, dim=DIM, module=module, prepare=prepare_photo, example=example,
            preprocessing=preprocessing, layers="layers", smallest_side=2 * PHOTO_SIDE,
            grey=True,
        )  # fmt: skip
    if name == "title":
        words = TITLE_WORDS if max_tokens is None else max_tokens
        if not 1 <= words <= TITLE_WORDS:
            raise EncoderError(f"tiny:title: max_tokens {words} is not between 1 and {TITLE_WORDS}", "max_tokens")
        preprocessing |= {"max_words": words, "pieces": TITLE_PIECES, "buckets": TITLE_BUCKETS}
        return BuiltEncoder(
            modality=modality, dim=DIM, module=module, prepare=partial(prepare_title, max_words=words),
            example="a title of five words", preprocessing=preprocessing, layers="layers", mask="mask",
            notes=(f"words after the first {words} are not read",),
        )  # fmt: skip
    seconds = NOTE_SECONDS if max_seconds is None else min(max_seconds, NOTE_SECONDS)
    window_samples = int(seconds * SAMPLE_RATE_HZ) // HOP * HOP
    if window_samples < SHORTEST_NOTE_SAMPLES:
        least = SHORTEST_NOTE_SAMPLES / SAMPLE_RATE_HZ
        raise EncoderError(f"tiny:note: max_seconds {seconds} is below {least}", "max_seconds")
    preprocessing |= {"sample_rate_hz": SAMPLE_RATE_HZ, "window_samples": window_samples, "resampler": "soxr HQ"}
    return BuiltEncoder(
        modality=modality, dim=DIM, module=module, prepare=partial(prepare_note, window_samples=window_samples),
        example=(np.zeros(SAMPLE_RATE_HZ, np.float32), SAMPLE_RATE_HZ), preprocessing=preprocessing, layers="layers",
        max_seconds=window_samples / SAMPLE_RATE_HZ, margin_seconds=MARGIN_SECONDS,
        notes=(f"sound after the first {window_samples / SAMPLE_RATE_HZ:.1f} s is not heard",),
    )  # fmt: skip


def _load_weights(module: nn.Module, name: str, weights: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(weights), framework="pt") as file:
            found = (file.metadata() or {}).get("mmpipe.tiny")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise EncoderError(f"tiny:{name}: {weights.name} can't be read as safetensors: {error}") from error
    if found != name:
        raise EncoderError(f"tiny:{name}: {weights.name} holds {f'tiny:{found}' if found else 'another model'}")
    state = module.state_dict()
    wanted = {key: value.shape for key, value in state.items() if "num_batches" not in key}
    if wanted != {key: value.shape for key, value in tensors.items()}:
        odd = sorted(set(wanted) ^ set(tensors)) or [key for key in wanted if wanted[key] != tensors[key].shape]
        raise EncoderError(f"tiny:{name}: {weights.name} does not fit: {', '.join(odd[:3])}")
    module.load_state_dict(tensors, strict=False)
