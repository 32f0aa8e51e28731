"""Write a folder of listings: a photo, a title and a spoken note for each item, some wrong, some missing.

    python examples/products/make.py OUT --n 2000 --split test --seed 1

writes OUT/item-00000.jpg (or .png), item-00000.txt, item-00000.flac and so on, and the truth to OUT.labels.csv.
With --broken two more are damaged as real folders are: broken-01 has half a photo and nothing else, broken-02 a title
that tells nothing and a third of a note. The same arguments give the same bytes, whatever --jobs, with the same
versions of espeak-ng, libsndfile and Pillow.
"""

from __future__ import annotations

import argparse
import csv
import io
import multiprocessing
import os
import random as random_module
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile
from numpy.typing import NDArray
from photos import DEBIAN_FOLDER, LABELS, Photos, PhotosMissing, encode, load_photos
from titles import informative, sentence, vague
from voices import ACCENTS, SAMPLE_RATE_HZ, VARIANTS, Note, SpeechMissing, render

# train fits the encoders, tune the head and the thresholds, test is for figures. They share no photo, no voice, no
# title or sentence template.
SPLITS = ("train", "tune", "test")
PHOTOS_FOR_ENCODERS = 45_000  # of the 60,000 training photos; tune has the rest

PHOTO_WRONG, PHOTO_MISSING = 0.03, 0.05
TITLE_VAGUE, TITLE_WRONG, TITLE_MISSING = 0.30, 0.05, 0.10
NOTE_WRONG, NOTE_MISSING = 0.03, 0.15
SNR_DB = (0.0, 20.0)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Item:
    """One listing. None: the medium is missing. `photo` indexes the split's idx file."""

    index: int
    split: str
    label: str
    photo: int | None
    photo_suffix: str
    title: str | None
    note: Note | None

    @property
    def id(self) -> str:
        return f"item-{self.index:05d}"


def photo_range(split: str) -> tuple[str, range]:
    """→ (which idx file, the photos in it that belong to the split)."""
    if split == "test":
        return "t10k", range(10_000)
    return "train", range(PHOTOS_FOR_ENCODERS) if split == "train" else range(PHOTOS_FOR_ENCODERS, 60_000)


def draw_note(label: str, split: str, random: random_module.Random) -> Note:
    cuts = sorted((random.random(), random.random()))
    return Note(
        sentence=sentence(label, split, random),
        accent=random.choice(ACCENTS),
        variant=random.choice(VARIANTS[split]),
        words_per_minute=random.randint(140, 200),
        pitch=random.randint(30, 70),
        snr_db=random.uniform(*SNR_DB),
        noise_shares=(cuts[0], cuts[1] - cuts[0], 1 - cuts[1]),
        seed=random.getrandbits(32),
    )


def plan(split: str, seed: int, photo_classes: NDArray[np.uint8]) -> Iterator[Item]:
    """The items of (split, seed), without end. A photo is used again only when its class has run out."""
    order = random_module.Random(f"photos/{seed}/{split}")
    stock: dict[str, list[int]] = {}
    for class_, label in enumerate(LABELS):
        stock[label] = [i for i in photo_range(split)[1] if photo_classes[i] == class_]
        order.shuffle(stock[label])
    taken = dict.fromkeys(LABELS, 0)
    for index in count():
        random = random_module.Random(f"item/{seed}/{split}/{index}")
        label = random.choice(LABELS)
        others = [other for other in LABELS if other != label]
        while True:
            photo_draw, title_draw, note_draw = random.random(), random.random(), random.random()
            if photo_draw >= PHOTO_MISSING or title_draw >= TITLE_MISSING or note_draw >= NOTE_MISSING:
                break
        photo = title = note = None
        shown = random.choice(others) if PHOTO_MISSING <= photo_draw < PHOTO_MISSING + PHOTO_WRONG else label
        if photo_draw >= PHOTO_MISSING:
            photo = stock[shown][taken[shown] % len(stock[shown])]
            taken[shown] += 1
        if TITLE_MISSING <= title_draw < TITLE_MISSING + TITLE_WRONG:
            title = informative(random.choice(others), split, random)
        elif TITLE_MISSING + TITLE_WRONG <= title_draw < TITLE_MISSING + TITLE_WRONG + TITLE_VAGUE:
            title = vague(split, random)
        elif title_draw >= TITLE_MISSING:
            title = informative(label, split, random)
        if note_draw >= NOTE_MISSING:
            wrong = note_draw < NOTE_MISSING + NOTE_WRONG
            note = draw_note(random.choice(others) if wrong else label, split, random)
        yield Item(index, split, label, photo, random.choice((".jpg", ".jpg", ".png")), title, note)


def spread(work: Callable[[T], R], tasks: list[T], jobs: int) -> Iterator[R]:
    """work over tasks in order, in fresh processes when jobs > 1."""
    if jobs <= 1:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, tasks, chunksize=32)


def write_item(task: tuple[Item, NDArray[np.uint8] | None], out: Path) -> None:
    item, picture = task
    if picture is not None:
        (out / f"{item.id}{item.photo_suffix}").write_bytes(encode(picture, item.photo_suffix))
    if item.title is not None:
        (out / f"{item.id}.txt").write_text(item.title + "\n", encoding="utf-8")
    if item.note is not None:
        buffer = io.BytesIO()
        soundfile.write(buffer, render(item.note, item.split), SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
        (out / f"{item.id}.flac").write_bytes(buffer.getvalue())


def cut(path: Path, share: float, to: str) -> None:
    """Move a file's first part to the name `to` beside it."""
    data = path.read_bytes()
    path.unlink()
    path.with_name(to).write_bytes(data[: int(len(data) * share)])


def write_broken(out: Path, items: Iterator[Item], pictures: NDArray[np.uint8]) -> list[tuple[str, str]]:
    """Damage the next item that has a photo and the next that has a note → their ids and labels."""
    seen, picture = next((item, pictures[item.photo]) for item in items if item.photo is not None)
    heard = next(item for item in items if item.note is not None)
    write_item((replace(seen, photo_suffix=".jpg", title=None, note=None), picture), out)
    cut(out / f"{seen.id}.jpg", 1 / 2, "broken-01.jpg")
    write_item((replace(heard, title=None), None), out)
    cut(out / f"{heard.id}.flac", 1 / 3, "broken-02.flac")
    title = vague(heard.split, random_module.Random(f"broken/{heard.index}"))
    (out / "broken-02.txt").write_text(title + "\n", encoding="utf-8")
    return [("broken-01", seen.label), ("broken-02", heard.label)]


def make(out: Path, n: int, split: str, seed: int, photos: Photos, jobs: int, broken: bool = False) -> None:
    """Writes out/ and out.labels.csv. `photos` are those of the split's idx file."""
    pictures, classes = photos
    planned = plan(split, seed, classes)
    items = list(islice(planned, n))
    out.mkdir(parents=True, exist_ok=True)
    tasks = [(item, None if item.photo is None else pictures[item.photo]) for item in items]
    for _ in spread(partial(write_item, out=out), tasks, jobs):
        pass
    truth = [(item.id, item.label) for item in items] + (write_broken(out, planned, pictures) if broken else [])
    with out.with_name(out.name + ".labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "label"))
        writer.writerows(truth)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must be empty or not exist")
    parser.add_argument("--n", type=int, required=True, help="how many items")
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--photos", type=Path, default=DEBIAN_FOLDER, help="folder with the Fashion-MNIST .gz files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: all cores")
    parser.add_argument("--broken", action="store_true", help="two more items, with damaged files")
    options = parser.parse_args(arguments)
    if options.n < 1:
        parser.error(f"--n {options.n}: at least 1")
    out = Path(os.path.abspath(options.out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{options.out} is there and not an empty folder: name another, or remove it")
    try:
        photos = load_photos(photo_range(options.split)[0], options.photos)
        make(out, options.n, options.split, options.seed, photos, options.jobs, options.broken)
    except (PhotosMissing, SpeechMissing) as error:
        print(f"make.py: {error}", file=sys.stderr)
        return 2
    print(f"{options.n} items in {options.out}, their labels in {options.out}.labels.csv")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
