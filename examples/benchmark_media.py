"""Media that look and weigh like what people have: photos of 0.3 to 12 megapixels, texts, sounds. No download.

    python examples/benchmark_media.py OUT --n 200

writes OUT/0000.jpg, .txt and .wav, …: JPEGs whose detail falls off with its frequency as that of photos does (quality
75 to 95, with and without subsampled colours), texts of 4 to 50 words, sounds of 2 to 10 s at 16 to 48 kHz, one or two
channels. What they show means nothing; what they cost to decode and to encode is what real ones cost.
"""

from __future__ import annotations

import argparse
import io
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

SIZES = ((640, 480), (500, 375), (1024, 768), (1600, 1200), (2048, 1536), (3264, 2448), (4000, 3000))  # 0.2–12 MP
SHARES = (0.25, 0.15, 0.2, 0.15, 0.13, 0.07, 0.05)
RATES_HZ = (16_000, 22_050, 44_100, 48_000)
WORDS = """
red blue old new small wooden leather jacket chair lamp phone bicycle table shoes good as new hardly
worn with two pockets original box bought only last summer works well slightly scratched for
children size large soft bright kitchen garden music dog barks rain falls train passes church bells
ring piano quiet street
"""


def photo(make: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise in octaves, the finer the fainter, over a few flat shapes."""
    small = min(1.0, 1600 / width)  # above that the finest octave is grain, added at full size
    w, h = max(8, int(width * small)), max(8, int(height * small))
    picture_HWC = np.zeros((h, w, 3), np.float32)
    for octave in range(1, 9):
        rows, columns = max(2, h >> (8 - octave)), max(2, w >> (8 - octave))
        noise = Image.fromarray(make.integers(0, 256, (rows, columns, 3), dtype=np.uint8))
        picture_HWC += (np.asarray(noise.resize((w, h), Image.Resampling.BICUBIC), np.float32) - 128) / 2 ** (
            octave / 2
        )
    for _ in range(6):
        top, left = make.integers(0, h), make.integers(0, w)
        bottom, right = top + make.integers(1, h), left + make.integers(1, w)
        picture_HWC[top:bottom, left:right] += make.uniform(-60, 60, 3)
    rough = Image.fromarray(np.clip(picture_HWC * 0.7 + 128, 0, 255).astype(np.uint8))
    if (w, h) == (width, height):
        return rough
    whole_HWC = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    grain_HW1 = make.integers(-4, 5, (height, width, 1), dtype=np.int16)
    return Image.fromarray(np.clip(whole_HWC + grain_HW1, 0, 255).astype(np.uint8))


def sound(make: np.random.Generator, seconds: float, rate_hz: int, channels: int) -> NDArray[np.float32]:
    """A few tones that come and go over noise."""
    t_N = np.arange(int(seconds * rate_hz)) / rate_hz
    made_N = 0.02 * make.standard_normal(len(t_N))
    for _ in range(5):
        tone_hz, begins, lasts = make.uniform(80, 4000), make.uniform(0, seconds), make.uniform(0.2, 2)
        made_N += 0.15 * np.sin(2 * np.pi * tone_hz * t_N) * np.exp(-(((t_N - begins) / lasts) ** 2))
    return np.stack([made_N] * channels, 1).astype(np.float32)


def one(folder: Path, number: int, seed: int) -> None:
    """One item: the same for the same number and seed, wherever it is made."""
    make = np.random.default_rng((seed, number))
    width, height = SIZES[make.choice(len(SIZES), p=SHARES)]
    if make.random() < 0.3:
        width, height = height, width
    encoded = io.BytesIO()
    options = {"quality": int(make.integers(75, 96)), "subsampling": int(make.choice([0, 2]))}
    photo(make, width, height).save(encoded, "JPEG", **options)
    (folder / f"{number:05}.jpg").write_bytes(encoded.getvalue())
    (folder / f"{number:05}.txt").write_text(" ".join(make.choice(WORDS.split(), make.integers(4, 51))) + "\n")
    rate_hz, channels = int(make.choice(RATES_HZ)), int(make.integers(1, 3))
    soundfile.write(folder / f"{number:05}.wav", sound(make, make.uniform(2, 10), rate_hz, channels), rate_hz)


def make_folder(folder: Path, count: int, seed: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as processes:
        list(processes.map(one, [folder] * count, range(count), [seed] * count, chunksize=4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    make_folder(options.output, options.n, options.seed)
    print(f"wrote {options.n} photos, texts and sounds to {options.output}")


if __name__ == "__main__":
    main()
