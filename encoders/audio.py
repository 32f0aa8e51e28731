"""Sound: resampled and windowed on the host; log-mel and the transformer in the module.

Shape suffixes: B batch, S samples.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmpipe.encoders.base import BuiltEncoder, EncoderError, layers_path, output_dim
from mmpipe.encoders.hf import Source, pretrained
from mmpipe.encoders.mel import DecibelMel, MelSettings, WhisperMel

RESAMPLER = "soxr HQ"
MARGIN_S = 0.25  # sound kept beyond the window while resampling: far longer than the resampler's filter


@dataclass(frozen=True)
class Window:
    """(float32 mono samples [n], rate in Hz) → {"sound": float32 [samples]}.

    Longer sound: the first window. Shorter: repeated whole times, then zeros ("repeatpad"), repeated and cut
    ("repeat"), or zeros ("pad").
    """

    rate_hz: int
    samples: int
    padding: str
    max_seconds: float

    def __call__(self, media: tuple[Any, int]) -> dict[str, Tensor]:
        sound, rate_hz = media
        sound = np.ascontiguousarray(sound, dtype=np.float32)
        if sound.ndim != 1 or not sound.size:
            raise EncoderError(f"sound must be mono samples [n] with n above 0, not of shape {sound.shape}")
        if rate_hz <= 0:
            raise EncoderError(f"a sample rate of {rate_hz} Hz is impossible")
        if rate_hz != self.rate_hz:
            sound = _resample(sound[: math.ceil((self.max_seconds + MARGIN_S) * rate_hz)], rate_hz, self.rate_hz)
        sound = sound[: min(self.samples, max(1, round(self.max_seconds * self.rate_hz)))]
        if self.padding == "repeat" and sound.size < self.samples:
            sound = np.resize(sound, self.samples)
        times = self.samples // sound.size if self.padding == "repeatpad" else 1
        padded = np.zeros(self.samples, np.float32)
        padded[: times * sound.size].reshape(times, sound.size)[:] = sound
        return {"sound": torch.from_numpy(padded)}


def tone(rate_hz: int) -> tuple[NDArray[np.float32], int]:
    """The example sound that capture runs on: one second."""
    seconds = np.arange(rate_hz, dtype=np.float32) / rate_hz
    return np.asarray(0.1 * np.sin(2 * np.pi * 440 * seconds, dtype=np.float32), np.float32), rate_hz


def _resample(sound: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    import soxr

    resampled: NDArray[np.float32] = soxr.resample(sound, from_hz, to_hz, quality="HQ")
    return resampled if resampled.size else np.zeros(1, np.float32)  # a sound shorter than one sample at to_hz


class ClapAudio(nn.Module):
    """Sound [B, S] at the model's rate → [B, dim], projected, not normalised."""

    def __init__(self, mel: DecibelMel, encoder: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.mel, self.encoder, self.projection = mel, encoder, projection

    def forward(self, sound: Tensor) -> Tensor:
        out: Tensor = self.projection(self.encoder(input_features=self.mel(sound)).pooler_output)
        return out


class AlwaysFused(nn.Module):
    """CLAP's fusing patch embedding with every sample fused: alone, each one is, in the reference too.

    Its input is the mel of the one window; the reference stacks it four times: one global, three local.
    """

    def __init__(self, patches: Any) -> None:
        super().__init__()
        self.whole, self.local, self.blend, self.norm = (
            patches.proj,
            patches.mel_conv2d,
            patches.fusion_model,
            patches.norm,
        )
        self.flatten, self.patch_stride = patches.flatten, patches.patch_stride

    def forward(self, mel: Tensor, _is_longer: Any = None) -> Tensor:
        whole = self.whole(mel)
        one = self.local(mel)
        local = torch.cat([one, one, one], dim=-1)
        local = nn.functional.pad(local, (0, whole.shape[-1] - local.shape[-1]))
        patches = self.blend(whole, local)
        out: Tensor = self.norm(patches.flatten(2).transpose(1, 2) if self.flatten else patches)
        return out


class WhisperAudio(nn.Module):
    """Sound [B, S] at the model's rate → [B, dim]: the encoder's last state, averaged over all of the window."""

    def __init__(self, mel: WhisperMel, encoder: nn.Module) -> None:
        super().__init__()
        self.mel, self.encoder = mel, encoder

    def forward(self, sound: Tensor) -> Tensor:
        out: Tensor = self.encoder(self.mel(sound)).last_hidden_state.mean(dim=1)
        return out


def load_audio(source: Source, max_seconds: float | None) -> BuiltEncoder:
    """`hf:` audio models: CLAP (with prompts) and Whisper's encoder."""
    kind = source.config().get("model_type")
    processor = source.optional("preprocessor_config.json", "processor_config.json")
    processor = processor.get("feature_extractor", processor)
    if kind not in ("clap", "whisper"):
        raise EncoderError(f"{source.model}: no audio encoder for model_type '{kind}'; there are clap, whisper")
    if not processor:
        raise EncoderError(f"{source.model}: {source.folder} has no preprocessor_config.json")
    try:
        return (_load_clap if kind == "clap" else _load_whisper)(source, processor, max_seconds)
    except KeyError as error:
        raise EncoderError(f"{source.model}: preprocessor_config.json lacks {error}") from error


def _load_clap(source: Source, processor: dict[str, Any], max_seconds: float | None) -> BuiltEncoder:
    import transformers

    from mmpipe.encoders.text import paired_prompts

    fused = processor["truncation"] == "fusion"
    settings = MelSettings(
        rate_hz=int(processor["sampling_rate"]),
        n_fft=int(processor["fft_window_size"]),
        hop=int(processor["hop_length"]),
        n_mels=int(processor["feature_size"]),
        low_hz=float(processor["frequency_min"]),
        high_hz=float(processor["frequency_max"]),
        scale="htk" if fused else "slaney",
        area_normalised=not fused,
    )
    model = pretrained(transformers.ClapModel, source)
    encoder = model.audio_model
    if fused != encoder.audio_encoder.enable_fusion:
        raise EncoderError(f"{source.model}: config.json and preprocessor_config.json disagree on fusion")
    if fused:
        encoder.audio_encoder.patch_embed = AlwaysFused(encoder.audio_encoder.patch_embed)
        encoder.audio_encoder.enable_fusion = False
    window_s = float(processor["max_length_s"])
    notes = [f"sound beyond {_seconds(window_s, max_seconds):g} s is not heard: the first window is used"]
    if fused:
        notes.append("this model was made to fuse crops of a long sound with its whole; here all are the first window")
    module = ClapAudio(DecibelMel(settings), encoder, model.audio_projection)
    count = len(model.config.audio_config.depths)
    return _built(
        source,
        module,
        Window(
            settings.rate_hz, round(window_s * settings.rate_hz), processor["padding"], _seconds(window_s, max_seconds)
        ),
        settings,
        layers=layers_path(module, count),
        prompts=paired_prompts(source, model),
        logit_scale=float(model.logit_scale_a.exp()),
        notes=notes,
    )


def _load_whisper(source: Source, processor: dict[str, Any], max_seconds: float | None) -> BuiltEncoder:
    import transformers

    if processor.get("dither") or processor.get("do_normalize"):
        raise EncoderError(f"{source.model}: dither and do_normalize in preprocessor_config.json are not supported")
    settings = MelSettings(
        rate_hz=int(processor["sampling_rate"]),
        n_fft=int(processor["n_fft"]),
        hop=int(processor["hop_length"]),
        n_mels=int(processor["feature_size"]),
        low_hz=0.0,
        high_hz=8000.0,  # the reference's own constant, whatever the rate
        scale="slaney",
        area_normalised=True,
    )
    encoder = pretrained(transformers.WhisperModel, source).encoder
    window_s = float(processor["chunk_length"])
    module = WhisperAudio(WhisperMel(settings), encoder)
    return _built(
        source,
        module,
        Window(settings.rate_hz, round(window_s * settings.rate_hz), "pad", _seconds(window_s, max_seconds)),
        settings,
        layers=layers_path(module, len(encoder.layers)),
        notes=[
            f"sound beyond {_seconds(window_s, max_seconds):g} s is not heard: the first window is used",
            "the embedding is the mean of the encoder's last state over the whole window, silence included",
        ],
    )


def _built(source: Source, module: nn.Module, window: Window, settings: MelSettings, **fields: Any) -> BuiltEncoder:
    if window.padding not in ("repeatpad", "repeat", "pad"):
        raise EncoderError(f"{source.model}: no padding '{window.padding}'; there are repeatpad, repeat, pad")
    example = tone(settings.rate_hz)
    return BuiltEncoder(
        modality="audio",
        dim=output_dim(module, window(example)),
        module=module,
        prepare=window,
        example=example,
        preprocessing=asdict(window) | asdict(settings) | {"resampler": RESAMPLER},
        max_seconds=window.max_seconds,
        margin_seconds=MARGIN_S,
        files=source.files(),
        **fields,
    )


def _seconds(window_s: float, asked: float | None) -> float:
    return window_s if asked is None else min(asked, window_s)
