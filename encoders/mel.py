"""Log-mel spectrograms: frames, a window, a Fourier transform, mel filters.

Frequencies that no mel filter looks at are left out; so are those at the edges that would make their number no multiple
of a vector's length, where there are others to fill it up with.

Shape suffixes: B batch, S samples, T frames, N frame length, K frequencies kept, M mel filters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_VECTOR = 16  # float32 numbers
FLOOR = 1e-10  # the reference clips mel power here before taking its logarithm


@dataclass(frozen=True)
class MelSettings:
    """What a log-mel spectrogram is made of; frequencies in Hz, lengths in samples."""

    rate_hz: int
    n_fft: int
    hop: int
    n_mels: int
    low_hz: float
    high_hz: float
    scale: str  # "slaney" | "htk"
    area_normalised: bool

    def __post_init__(self) -> None:
        if self.n_fft % 2:
            raise ValueError(f"n_fft is {self.n_fft}; it must be even")
        if self.scale not in ("slaney", "htk"):
            raise ValueError(f"no mel scale '{self.scale}'; there are slaney, htk")


def mel_filters_KM(settings: MelSettings) -> NDArray[np.float64]:
    """Triangular filters [n_fft/2 + 1, n_mels] over the frequencies of the transform."""
    to_mel, to_hz = _SCALES[settings.scale]
    edges_hz = to_hz(np.linspace(to_mel(settings.low_hz), to_mel(settings.high_hz), settings.n_mels + 2))
    bins_hz = np.linspace(0, settings.rate_hz // 2, settings.n_fft // 2 + 1)[:, None]
    low_hz, mid_hz, high_hz = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    rising, falling = (bins_hz - low_hz) / (mid_hz - low_hz), (high_hz - bins_hz) / (high_hz - mid_hz)
    filters: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling))
    return filters * 2.0 / (high_hz - low_hz) if settings.area_normalised else filters


def _htk_mel(hz: float) -> float:
    return 2595.0 * math.log10(1.0 + hz / 700.0)


def _htk_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(700.0 * (10.0 ** (mel / 2595.0) - 1.0))


# Slaney's scale: 3 mel per 200 Hz up to 1 kHz, then 27 mel for each factor of 6.4.
_KNEE_HZ, _KNEE_MEL, _LOG_STEP = 1000.0, 15.0, math.log(6.4) / 27.0


def _slaney_mel(hz: float) -> float:
    return hz * 3.0 / 200.0 if hz < _KNEE_HZ else _KNEE_MEL + math.log(hz / _KNEE_HZ) / _LOG_STEP


def _slaney_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(mel < _KNEE_MEL, mel * 200.0 / 3.0, _KNEE_HZ * np.exp(_LOG_STEP * (mel - _KNEE_MEL)))


_SCALES: dict[str, tuple[Callable[[float], float], Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = {
    "htk": (_htk_mel, _htk_hz),
    "slaney": (_slaney_mel, _slaney_hz),
}


class MelPower(nn.Module):
    """Sound [B, S] → mel power [B, S/hop + 1, M]: centred frames, reflected at both ends, periodic Hann window."""

    def __init__(self, settings: MelSettings) -> None:
        super().__init__()
        self.n_fft, self.hop = settings.n_fft, settings.hop
        filters_KM = mel_filters_KM(settings)
        kept = np.flatnonzero(filters_KM.any(axis=1))
        self.first, self.last = int(kept[0]), int(kept[-1]) + 1
        more = min(-(self.last - self.first) % _VECTOR, self.n_fft // 2 + 1 - self.last)  # their filters are zero
        self.last += more
        window_N = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.n_fft) / self.n_fft)
        self.window_N: Tensor
        self.mel_KM: Tensor
        for name, matrix in (("window_N", window_N), ("mel_KM", filters_KM[self.first : self.last])):
            self.register_buffer(name, torch.from_numpy(matrix).to(torch.float32), persistent=False)

    def forward(self, sound_BS: Tensor) -> Tensor:
        half = self.n_fft // 2
        padded_BS = nn.functional.pad(sound_BS.unsqueeze(1), (half, half), mode="reflect").squeeze(1)
        frames_BTN = padded_BS.unfold(-1, self.n_fft, self.hop) * self.window_N
        spectrum_BTK = torch.fft.rfft(frames_BTN)[..., self.first : self.last]
        re_BTK, im_BTK = torch.view_as_real(spectrum_BTK).unbind(-1)
        return (re_BTK * re_BTK + im_BTK * im_BTK) @ self.mel_KM


class DecibelMel(nn.Module):
    """Sound [B, S] → [B, 1, T, M] in decibels: what CLAP hears."""

    def __init__(self, settings: MelSettings) -> None:
        super().__init__()
        self.power = MelPower(settings)

    def forward(self, sound_BS: Tensor) -> Tensor:
        return (10.0 * torch.log10(self.power(sound_BS).clamp(min=FLOOR))).unsqueeze(1)


class WhisperMel(nn.Module):
    """Sound [B, S] → [B, M, S/hop]: log10, at most 8 below each sample's own maximum, (x + 4) / 4; no last frame."""

    def __init__(self, settings: MelSettings) -> None:
        super().__init__()
        self.power = MelPower(settings)

    def forward(self, sound_BS: Tensor) -> Tensor:
        log_BTM = torch.log10(self.power(sound_BS)[:, :-1].clamp(min=FLOOR))
        floor_B11 = log_BTM.amax(dim=(1, 2), keepdim=True) - 8.0
        return ((torch.maximum(log_BTM, floor_B11) + 4.0) / 4.0).transpose(1, 2)
