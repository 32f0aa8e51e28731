"""What deliberation is worth: accuracy with and without it on the samples it touches, and what it costs.

    python examples/products/deliberate.py WORK --n 1000 --seeds 11 23 31 [--plain]

Makes listings of which one look shows only a part: the article is small and anywhere in its photo, the title comes
after a few sentences that tell nothing, the note is said somewhere in ten seconds of noise. With --plain the listings
are make.py's own, where there is nothing more to see: the article fills its photo, title and note are short. Then
quickstart's models run over them with `fusion.deliberate`, each sample's first look and its weighed answer are
compared with the truth, and McNemar's exact test over all seeds says whether the difference is chance.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random as random_module
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from make import make
from photos import DEBIAN_FOLDER, Photos, PhotosMissing, load_photos
from PIL import Image
from titles import vague
from voices import SAMPLE_RATE_HZ, SpeechMissing, noise

from mmpipe import Pipeline

PHOTO_SHARE = 0.6  # of both sides that the article takes
NOTE_SECONDS = 10.0
SENTENCES = (2, 4)  # before the title, at least and at most
SNR_DB = 10.0  # of the ten seconds around the note


@dataclass(frozen=True)
class Counts:
    """Of the samples that were looked at again. `won`: wrong at first, then right; `lost`: the other way round."""

    rows: int = 0
    touched: int = 0
    before: int = 0  # right at the first look
    after: int = 0
    won: int = 0
    lost: int = 0
    seconds: float = 0.0  # of deliberating
    total_seconds: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def p_value(self) -> float:
        """McNemar, exact, two-sided: as many of the changed on one side, if both sides were equally likely."""
        changed, fewer = self.won + self.lost, min(self.won, self.lost)
        tail = sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed
        return min(1.0, 2 * tail)

    def line(self, name: str) -> str:
        if not self.touched:
            return f"| {name} | {self.rows} | 0 | | | | | |"
        before, after = self.before / self.touched, self.after / self.touched
        cost = self.total_seconds / (self.total_seconds - self.seconds)
        return (
            f"| {name} | {self.rows} | {self.touched} | {before:.1%} | {after:.1%} | {self.won} / {self.lost} "
            f"| {self.p_value:.2g} | {cost:.2f} |"
        )


def widen(folder: Path, seed: int) -> None:
    """Put each medium into more of the same kind, in place."""
    for path in sorted(folder.iterdir()):
        random = random_module.Random(f"widen/{seed}/{path.name}")
        if path.suffix in (".jpg", ".png"):
            with Image.open(path) as picture:
                article = picture.convert("L")
            side = round(article.width / PHOTO_SHARE)
            around = Image.new("L", (side, side), 255)
            around.paste(article, (random.randint(0, side - article.width), random.randint(0, side - article.height)))
            around.save(path)
        elif path.suffix == ".txt":
            before = " ".join(vague("test", random).rstrip(".") + "." for _ in range(random.randint(*SENTENCES)))
            path.write_text(f"{before} {path.read_text(encoding='utf-8')}", encoding="utf-8")
        elif path.suffix == ".flac":
            note, _ = soundfile.read(path, dtype="float32")
            draw = np.random.default_rng(random.getrandbits(32))
            length = round(NOTE_SECONDS * SAMPLE_RATE_HZ)
            level = float(np.sqrt(np.mean(np.square(note)))) * 10 ** (-SNR_DB / 20)
            around_note = noise("test", length, (0.2, 0.4, 0.4), draw) * np.float32(level)
            start = random.randint(0, length - len(note))
            around_note[start : start + len(note)] += note
            around_note /= max(1.0, float(np.abs(around_note).max()))
            soundfile.write(path, around_note, SAMPLE_RATE_HZ, subtype="PCM_16")


def compared(pipeline: Pipeline, folder: Path, truth: dict[str, str]) -> Counts:
    """Both answers of each sample, from one run: the trace holds the first look, the prediction what came of it."""
    found = Counts()
    samples = list(pipeline.find(folder).samples)
    for start in range(0, len(samples), 1024):
        began = time.perf_counter()
        predictions, outcome = pipeline.run(samples[start : start + 1024])
        seconds, again = time.perf_counter() - began, outcome.seconds.get("deliberating", 0.0)
        found += Counts(rows=len(predictions), seconds=again, total_seconds=seconds)
        assert outcome.probabilities_NL is not None
        for prediction, first in zip(predictions, outcome.probabilities_NL.argmax(dim=1).tolist(), strict=True):
            if prediction.deliberated:
                before = pipeline.labels[first] == truth[prediction.id]
                after = prediction.label == truth[prediction.id]
                found += Counts(0, 1, before, after, after and not before, before and not after)
    return found


def listings(work: Path, n: int, seed: int, photos: Photos, jobs: int, plain: bool) -> tuple[Path, dict[str, str]]:
    """The folder of a seed, made where it is not there yet, and the labels of its items."""
    folder = work / f"{'plain' if plain else 'wide'}-{n}-{seed}"
    labels = folder.with_name(folder.name + ".labels.csv")
    if not labels.exists():
        made = folder.with_name(folder.name + ".part")
        make(made, n, "test", seed, photos, jobs)
        if not plain:
            widen(made, seed)
        made.rename(folder)
        made.with_name(made.name + ".labels.csv").rename(labels)
    with labels.open(newline="", encoding="utf-8") as file:
        return folder, {row["id"]: row["label"] for row in csv.DictReader(file)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK", help="folder for the listings; kept for the next time")
    parser.add_argument("--n", type=int, default=1000, help="listings of a seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 23, 31])
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--below", type=float, default=0.8)
    parser.add_argument("--plain", action="store_true", help="make.py's own listings")
    parser.add_argument("--photos", type=Path, default=DEBIAN_FOLDER, help="folder with the Fashion-MNIST .gz files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    settings = f"fusion.deliberate={{below: {options.below}, views: {options.views}}}"
    total = Counts()
    print("| seed | listings | looked at again | right before | right after | won / lost | p | time × |")
    print("|---|---|---|---|---|---|---|---|")
    try:
        photos = load_photos("t10k", options.photos)
        with Pipeline.load("quickstart", overrides=[settings]) as pipeline:
            for seed in options.seeds:
                made = listings(options.work, options.n, seed, photos, options.jobs, options.plain)
                counts = compared(pipeline, *made)
                total += counts
                print(counts.line(str(seed)), flush=True)
    except (PhotosMissing, SpeechMissing) as error:
        print(f"deliberate.py: {error}", file=sys.stderr)
        return 2
    print(total.line("all"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
