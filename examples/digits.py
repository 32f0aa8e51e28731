"""Digits, drawn, written and spoken: a labelled folder, a head by `mmpipe fit`, and what the head is worth.

    python examples/digits.py OUT --seeds 5

For each seed it writes OUT/seed-N/media (the handwriting of scikit-learn's `load_digits`, stained and tilted; a phrase
with the number in words, with typos, or without it; the number said by an espeak-ng voice in noise) and truth.csv, runs
`mmpipe fit` on them, and at the end prints the table: the head on the test split beside every baseline, and each subset
of modalities. The encoders are quickstart's photo and note, which were trained on products, and MiniLM: none has been
tuned to digits. About half the media of each kind do not tell the digit by themselves.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

sys.path.append(str(Path(__file__).parent / "products"))
from voices import ACCENTS, VARIANTS, Note, render

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MISSING = 0.1  # of each kind of medium; no item misses all three
VAGUE = 0.3  # of the phrases don't tell the number
TYPO = 0.4  # of the words that tell it are misspelt
SNR_DB = (-6.0, 9.0)
SIDE = 112  # pixels of a picture

_PHRASES = (
    "there are {} of them", "we need {} more by Friday", "table {} please", "{} tickets", "number {}",
    "call me at {} o'clock", "the answer is {}", "she has {} cats", "page {} of the book", "just {} left",
)  # fmt: skip
_VAGUE = (
    "as many as last time", "I could not read the number", "how many was it again", "see the picture",
    "some of them are left", "the usual amount please", "ask her how many", "a few more by Friday",
)  # fmt: skip
_SAID = ("{}", "number {}", "it is {}", "{} of them", "I said {}", "that makes {}")


def picture(pixels_HW: NDArray[np.float64], draw: random.Random) -> Image.Image:
    """8 × 8 handwriting, 0 to 16, → a grey picture: tilted, blurred, noisy, with a stain over a part of it."""
    image = Image.fromarray((pixels_HW * (255 / 16)).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    image = image.rotate(draw.uniform(-30, 30), Image.Resampling.BICUBIC)
    image = image.filter(ImageFilter.GaussianBlur(draw.uniform(0, 5)))
    noise = np.random.default_rng(draw.getrandbits(32))
    grey = np.asarray(image, np.float32) + noise.normal(0, draw.uniform(10, 90), (SIDE, SIDE))
    top, left, side = draw.randrange(SIDE), draw.randrange(SIDE), draw.randrange(20, 70)
    grey[top : top + side, left : left + side] = draw.uniform(0, 255)
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


def misspelt(word: str, draw: random.Random) -> str:
    """One letter dropped, doubled, swapped with the next or replaced."""
    at = draw.randrange(len(word) - 1)
    return draw.choice(
        (
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + draw.choice("aeiourtnslz") + word[at + 1 :],
        )
    )


def phrase(digit: int, draw: random.Random) -> str:
    if draw.random() < VAGUE:
        return draw.choice(_VAGUE)
    word = misspelt(WORDS[digit], draw) if draw.random() < TYPO else WORDS[digit]
    return draw.choice(_PHRASES).format(word)


def spoken(digit: int, draw: random.Random) -> NDArray[np.int16]:
    cuts = sorted((draw.random(), draw.random()))
    note = Note(
        sentence=draw.choice(_SAID).format(WORDS[digit]),
        accent=draw.choice(ACCENTS),
        variant=draw.choice(VARIANTS["test"]),
        words_per_minute=draw.randint(140, 200),
        pitch=draw.randint(30, 70),
        snr_db=draw.uniform(*SNR_DB),
        noise_shares=(cuts[0], cuts[1] - cuts[0], 1 - cuts[1]),
        seed=draw.getrandbits(32),
    )
    return render(note, "test")
