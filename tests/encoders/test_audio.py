"""Audio encoders and log-mel against the reference feature extractors, on the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import soxr
import torch

from mmpipe.encoders import EncoderError, load
from mmpipe.encoders.audio import Window
from mmpipe.encoders.mel import DecibelMel, MelPower, MelSettings, WhisperMel, mel_filters_KM

RATE = 16000
CLAP = MelSettings(48000, 1024, 480, 64, 50.0, 14000.0, "slaney", True)
WHISPER = MelSettings(16000, 400, 160, 80, 0.0, 8000.0, "slaney", True)


@pytest.mark.parametrize(("scale", "norm"), [("slaney", "slaney"), ("htk", None)])
def test_mel_filters_are_the_reference_ones(scale, norm):
    from transformers.audio_utils import mel_filter_bank

    settings = MelSettings(48000, 1024, 480, 64, 50.0, 14000.0, scale, norm == "slaney")
    expected = mel_filter_bank(513, 64, 50.0, 14000.0, 48000, norm=norm, mel_scale=scale)
    assert np.abs(mel_filters_KM(settings) - expected).max() < 1e-12


@pytest.mark.parametrize("settings", [CLAP, WHISPER, MelSettings(16000, 512, 160, 40, 0.0, 8000.0, "htk", False)])
def test_mel_power_is_that_of_a_fourier_transform_in_double_precision(settings):
    """torch.stft, which shares no code with it but the transform, and all frequencies, not only those that are kept."""
    sound_BS = torch.randn(3, 4 * settings.n_fft + 7, generator=torch.Generator().manual_seed(0))
    window = torch.hann_window(settings.n_fft, dtype=torch.float64)
    spectrum = torch.stft(sound_BS.double(), settings.n_fft, settings.hop, window=window, return_complex=True)
    want_BTM = spectrum.abs().square().transpose(1, 2) @ torch.from_numpy(mel_filters_KM(settings))
    got_BTM = MelPower(settings)(sound_BS)
    assert got_BTM.shape == want_BTM.shape
    assert (got_BTM - want_BTM).abs().max() <= 1e-6 * want_BTM.max()


@pytest.mark.parametrize("settings", [CLAP, WHISPER])
def test_frequencies_are_kept_that_a_filter_hears_and_no_range_of_them_is_odd(settings):
    power, filters_KM = MelPower(settings), mel_filters_KM(settings)
    assert not filters_KM[: power.first].any()
    assert not filters_KM[power.last :].any()
    assert (power.last - power.first) % 16 == 0 or power.last == settings.n_fft // 2 + 1
    assert power.mel_KM.shape[0] == power.last - power.first


def test_silence_has_no_power_and_no_sample_hears_its_neighbour():
    power, sound_BS = MelPower(CLAP), torch.randn(5, 4800, generator=torch.Generator().manual_seed(0))
    sound_BS[1] = 0
    got = power(sound_BS)
    assert not got[1].any()
    louder = sound_BS * torch.tensor([1.0, 0.0, 1.0, 100.0, 1.0])[:, None]
    assert torch.equal(power(louder)[[0, 2, 4]], got[[0, 2, 4]])


def _clap_reference(sound, truncation="rand_trunc"):
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(frequency_min=50, frequency_max=14000, truncation=truncation)
    return extractor(sound, sampling_rate=48000, return_tensors="np")["input_features"][0]


# 1 ms repeated is a line spectrum: between its lines float32 hears its own rounding, 40 dB down.
@pytest.mark.parametrize(
    ("seconds", "most_db"), [(0.001, 0.1), (0.37, 1e-3), (3.0, 1e-3), (5.0, 1e-3), (9.999, 1e-3), (10.0, 1e-3)]
)
def test_clap_mel_is_the_feature_extractor_s(seconds, most_db, kit):
    sound = kit.sounds(1, 48000, seconds)[0]
    window = Window(48000, 480000, "repeatpad", 10.0)
    ours = DecibelMel(CLAP)(window((sound, 48000))["sound"][None])[0].numpy()
    expected = _clap_reference(sound)
    assert ours.shape == expected.shape == (1, 1001, 64)
    print(f"CLAP mel, {seconds} s: largest error {np.abs(ours - expected).max():.1e} dB")  # noqa: T201
    assert np.abs(ours - expected).max() < most_db  # of about 100
    assert np.abs(ours - expected).mean() < most_db / 10


def test_clap_takes_the_first_window_of_longer_sound(kit):
    sound = kit.sounds(1, 48000, 10.6)[0]
    window = Window(48000, 480000, "repeatpad", 10.0)
    assert np.array_equal(window((sound, 48000))["sound"].numpy(), sound[:480000])


def test_whisper_mel_is_the_feature_extractor_s(kit):
    from transformers import WhisperFeatureExtractor

    for sound in (*kit.sounds(3, RATE, 5.0), np.zeros(RATE, np.float32)):
        expected = WhisperFeatureExtractor()(sound, sampling_rate=RATE, return_tensors="np")["input_features"][0]
        ours = WhisperMel(WHISPER)(Window(RATE, 480000, "pad", 30.0)((sound, RATE))["sound"][None])[0].numpy()
        assert ours.shape == expected.shape == (80, 3000)
        print(f"Whisper mel: largest error {np.abs(ours - expected).max():.1e}")  # noqa: T201
        assert np.abs(ours - expected).max() < 1e-4


@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
def test_shorter_sound_is_padded_like_the_reference(padding, kit):
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(truncation="rand_trunc", padding=padding, frequency_min=50)
    seen = []
    extractor._np_extract_fbank_features = lambda waveform, filters: seen.append(waveform) or np.zeros((1, 64))
    sound = kit.sounds(1, 48000, 3.3)[0]
    extractor(sound, sampling_rate=48000)
    ours = Window(48000, 480000, padding, 10.0)((sound, 48000))["sound"].numpy()
    assert np.array_equal(ours, seen[0].astype(np.float32))


@pytest.mark.parametrize("rate_hz", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled(rate_hz, kit):
    window = Window(RATE, 2 * RATE, "pad", 2.0)
    for seconds in (0.01, 1.3, 2.0, 3.5):
        sound = kit.sounds(1, rate_hz, seconds)[0]
        whole = soxr.resample(sound, rate_hz, RATE, quality="HQ")[: 2 * RATE]
        ours = window((sound, rate_hz))["sound"].numpy()
        assert np.abs(ours[: len(whole)] - whole).max() < 1e-6  # resampling only what is heard changes nothing
        assert not ours[len(whole) :].any()


def _clap_embedding(reference, processor, sounds):
    features = [processor(sound, sampling_rate=RATE, return_tensors="pt") for sound in sounds]  # each alone
    mel = torch.cat([feature["input_features"] for feature in features]).float()
    longer = torch.cat([feature["is_longer"] for feature in features])
    with torch.inference_mode():
        return reference(input_features=mel, is_longer=longer).audio_embeds


@pytest.mark.parametrize("name", ["clap", "clap-fused"])
def test_clap(name, models, kit):
    from transformers import ClapAudioModelWithProjection, ClapFeatureExtractor, ClapModel

    folder = models(name)
    encoder = load(f"hf:{folder}", "audio")
    reference = ClapAudioModelWithProjection.from_pretrained(folder).eval()
    processor = ClapFeatureExtractor.from_pretrained(folder)
    sounds = kit.sounds(32, RATE, 2.0)
    media = [(sound, RATE) for sound in sounds]
    whole = kit.batch(encoder, media)
    for rows in kit.BATCHES:
        ours = kit.run(encoder.module, {"sound": whole["sound"][:rows]})
        kit.agree(ours, _clap_embedding(reference, processor, sounds[:rows]), name)
    kit.exports(encoder, media, name)
    full = ClapModel.from_pretrained(folder)
    assert encoder.logit_scale == pytest.approx(full.logit_scale_a.exp().item())
    assert encoder.prompts(["dog barks", "rain"]).shape == (2, encoder.dim)
    assert encoder.max_seconds == 2.0
    assert any("first window" in note for note in encoder.notes)
    assert len(encoder.module.get_submodule(encoder.layers)) == 2
    alone = kit.run(encoder.module, {"sound": whole["sound"][5:6]})
    kit.agree(kit.run(encoder.module, {"sound": whole["sound"]})[5:6], alone, "row alone")


def test_whisper(models, kit):
    from transformers import WhisperFeatureExtractor, WhisperModel

    folder = models("whisper")
    encoder = load(f"hf:{folder}", "audio")
    reference, processor = WhisperModel.from_pretrained(folder).eval(), WhisperFeatureExtractor.from_pretrained(folder)
    sounds = kit.sounds(32, RATE, 2.6)
    media = [(sound, RATE) for sound in sounds]
    whole = kit.batch(encoder, media)
    for rows in kit.BATCHES:
        mel = processor(sounds[:rows], sampling_rate=RATE, return_tensors="pt")["input_features"]
        with torch.inference_mode():
            expected = reference.encoder(mel).last_hidden_state.mean(1)
        kit.agree(kit.run(encoder.module, {"sound": whole["sound"][:rows]}), expected, "Whisper")
    kit.exports(encoder, media, "Whisper")
    assert len(encoder.module.get_submodule(encoder.layers)) == 3
    assert encoder.prompts is None


def test_max_seconds_hears_no_more(models, kit):
    encoder = load(f"hf:{models('clap')}", "audio", max_seconds=0.5)
    sound = kit.sounds(1, RATE, 1.5)[0]
    other = np.concatenate([sound[: RATE // 2], np.ones(RATE, np.float32)])
    assert encoder.max_seconds == 0.5
    assert torch.equal(encoder.prepare((sound, RATE))["sound"], encoder.prepare((other, RATE))["sound"])


def test_tensors_are_sound_too_and_nothing_is_not(models):
    encoder = load(f"hf:{models('whisper')}", "audio")
    sound = torch.linspace(-1, 1, RATE)
    assert torch.equal(encoder.prepare((sound, RATE))["sound"], encoder.prepare((sound.numpy(), RATE))["sound"])
    for bad in (np.zeros(0, np.float32), np.zeros((2, 5), np.float32)):
        with pytest.raises(EncoderError, match="mono samples"):
            encoder.prepare((bad, RATE))
    assert encoder.prepare((np.ones(1, np.float32), 192000))["sound"].shape == (2 * RATE,)


def test_what_is_not_supported_is_said(models):
    with pytest.raises(EncoderError, match="no audio encoder for model_type 'bert'; there are clap, whisper"):
        load(f"hf:{models('bert')}", "audio")
