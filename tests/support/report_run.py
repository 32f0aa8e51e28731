"""A run over products, told through a real Tally, with real media: what the report is tested on."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image, ImageDraw, ImageFilter

from mmpipe.jobs.tally import Tally
from mmpipe.runtime.ledger import Look, Outcome
from mmpipe.types import MODALITIES, Prediction, Sample

LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
EXITS = ("image", "image+text", "all")
Seen = Sequence[tuple[str, float]]  # label and confidence at each exit, up to the one that answered
_ADJECTIVES = ("light", "heavy", "slim", "wide", "washed", "lined", "soft", "waxed")
_COLOURS = {"navy": "#27406b", "red": "#a8323e", "olive": "#6b6b3a", "sand": "#cdb893", "black": "#26262a"}


def item(
    sample: Sample, seen: Seen, *, exits: Sequence[str] = EXITS, failed: Mapping[str, str] | None = None
) -> tuple[Sample, Prediction, Seen]:
    """A sample, the row that the pipeline would write for it, and its trace. failed: modality → "code: text"."""
    failed = failed or {}
    present = tuple(name for name in MODALITIES if name in sample.media)
    if not seen:
        error = "; ".join(f"{name}:{why}" for name, why in failed.items())
        return sample, Prediction(sample.id, "failed", error, present=present, failed=tuple(failed)), seen
    answered_by = exits[len(seen) - 1]
    opens = MODALITIES if answered_by == "all" else [part.split(".")[0] for part in answered_by.split("+")]
    label, confidence = seen[-1]
    rest = [other for other in LABELS if other != label][:2]
    prediction = Prediction(
        id=sample.id,
        status="partial" if failed else "ok",
        error="; ".join(f"{name}:{why}" for name, why in failed.items()) or None,
        label=label,
        confidence=confidence,
        top_k=((label, confidence), (rest[0], (1 - confidence) * 0.7), (rest[1], (1 - confidence) * 0.2)),
        answered_by=answered_by,
        present=present,
        used=tuple(name for name in present if name in opens and name not in failed),
        skipped=tuple(name for name in present if name not in opens),
        failed=tuple(failed),
    )
    return sample, prediction, seen


def tally_of(
    items: Sequence[tuple[Sample, Prediction, Seen]], *, labels: Sequence[str] = LABELS, exits: Sequence[str] = EXITS
) -> Tally:
    """The tally of one shard."""
    tally = Tally(tuple(labels), tuple(exits), MODALITIES)
    count = len(items)
    opened = torch.zeros(count, 3, dtype=torch.bool)
    looks = [Look(index, [], [], []) for index in range(len(exits))]
    for row, (_, prediction, seen) in enumerate(items):
        for column, name in enumerate(MODALITIES):
            opened[row, column] = name in prediction.used + prediction.failed
        for look, (label, confidence) in zip(looks, seen, strict=False):
            look.rows.append(row)
            look.labels.append(labels.index(label))
            look.confidences.append(confidence)
    outcome = Outcome(opened, opened, opened, torch.zeros(count), torch.zeros(count), looks=looks if labels else [])
    outcome.files_opened = dict(zip(MODALITIES, opened.sum(0).tolist(), strict=True))
    tally.add([sample for sample, _, _ in items], [prediction for _, prediction, _ in items], outcome)
    return tally


def products(folder: Path, *, rows: int = 62, seed: int = 3) -> list[tuple[Sample, Prediction, Seen]]:
    """Items with a photo, a title and a spoken note each; most are clear from the photo; two have a broken file."""
    dice = random.Random(seed)
    items = []
    for index in range(rows):
        label = dice.choice(LABELS)
        sample = write_media(folder, f"{4700 + index}", label, dice)
        other = dice.choice([name for name in LABELS if name != label])
        kind = dice.random()
        seen: Seen
        if index == rows - 3:
            items.append(
                item(
                    sample,
                    [],
                    failed={
                        "image": "truncated: photo.jpg: the file ends before the picture does",
                        "text": "empty: title.txt: no text, or only spaces",
                    },
                )
            )
            continue
        if index == rows - 9:
            seen = [(label, 0.71), (label, 0.74), (label, 0.88)]
            items.append(item(sample, seen, failed={"audio": "corrupt: note.wav: the file is damaged"}))
            continue
        if kind < 0.6:
            seen = [(label, dice.uniform(0.95, 1.0))]
        elif kind < 0.82:
            seen = [(dice.choice([label, other]), dice.uniform(0.3, 0.9)), (label, dice.uniform(0.9, 1.0))]
        else:
            seen = [(other, dice.uniform(0.35, 0.8)), (dice.choice(LABELS), 0.6), (label, dice.uniform(0.45, 0.99))]
        items.append(item(sample, seen))
    return items


def write_media(folder: Path, name: str, label: str, dice: random.Random) -> Sample:
    """folder/name/photo.jpg, title.txt, note.wav."""
    place = folder / name
    place.mkdir(parents=True)
    colour = dice.choice(list(_COLOURS))
    _photo(label, _COLOURS[colour]).save(place / "photo.jpg", quality=90)
    (place / "title.txt").write_text(f"{dice.choice(_ADJECTIVES)} {colour} {label}, size {dice.randrange(36, 46)}")
    rate_hz, seconds = 8000, dice.uniform(0.9, 2.2)
    at = np.arange(int(rate_hz * seconds)) / rate_hz
    syllables = np.clip(np.sin(at * 2 * math.pi * dice.uniform(1.5, 3)), 0, 1) * np.exp(-at / seconds)
    sound = 0.6 * syllables * np.sin(at * 2 * math.pi * 180) + 0.01 * np.random.default_rng(0).normal(size=at.size)
    soundfile.write(place / "note.wav", sound.astype(np.float32), rate_hz, subtype="PCM_16")
    return Sample(name, {"image": place / "photo.jpg", "text": place / "title.txt", "audio": place / "note.wav"})


def _photo(label: str, colour: str) -> Image.Image:
    """Something of the label's rough shape on a light ground."""
    picture = Image.new("RGB", (420, 420), "#efece6")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((60, 330, 360, 380), fill="#dcd7cd")
    if label in ("sandal", "sneaker", "ankle boot"):
        top = 120 if label == "ankle boot" else 230
        draw.polygon([(90, top), (190, top), (210, 250), (350, 300), (360, 350), (80, 350)], fill=colour)
        draw.rectangle((80, 340, 362, 358), fill="#f8f8f6")
    elif label == "bag":
        draw.arc((140, 70, 280, 240), 180, 360, fill=colour, width=14)
        draw.rounded_rectangle((90, 150, 330, 350), 24, fill=colour)
    elif label == "trouser":
        draw.polygon([(140, 60), (280, 60), (310, 360), (235, 360), (210, 160), (185, 360), (110, 360)], fill=colour)
    else:
        hem = 350 if label in ("dress", "coat") else 310
        draw.polygon(
            [
                (140, 80),
                (280, 80),
                (370, 180),
                (320, 220),
                (290, 190),
                (300, hem),
                (120, hem),
                (130, 190),
                (100, 220),
                (50, 180),
            ],
            fill=colour,
        )
    return picture.filter(ImageFilter.GaussianBlur(1.2))


def run_of(tally: Tally, **changes: Any) -> dict[str, Any]:
    """What run.json holds for a tally."""
    run = {
        "rows": tally.rows,
        "status": dict(tally.status),
        "answered_by": dict(tally.answered_by),
        "files_opened": dict(tally.files_opened),
        "items_per_second": 41.66,
        "seconds": {
            "total": 1.488, "decode": 0.61, "waiting": 0.21, "fuse": 2.31, "write": 0.012,
            "segments": {"image@0": 0.52, "head@0": 0.006, "text@1": 0.05, "head@1": 0.004, "audio@2": 0.44,
                         "head@2": 0.003},
        },
        "errors": dict(tally.errors.most_common()),
        "interrupted": False,
        "resolved": {"device": "cpu", "dtype": "bfloat16", "backend": "eager", "schedule": "cascade", "batch_size": 32},
        "fingerprints": {"model": "5f0c" * 16, "numerics": "91ab" * 16, "job": "77de" * 16},
        "versions": {"mmpipe": "0.1.0", "torch": "2.14.1", "python": "3.11.2"},
        "notes": ["the confidence of zero_shot is uncalibrated: see `mmpipe calibrate`"],
    }  # fmt: skip
    return run | changes
