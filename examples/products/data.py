"""What training reads, made in memory from the same generators that make.py writes files with.

Shapes: N sample, M mel band or modality, F frame.
"""

from __future__ import annotations

import random as random_module
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from make import Item, draw_note, photo_range, plan
from photos import LABELS, Photos, encode, to_picture
from PIL import Image
from titles import informative, vague
from torch import Tensor
from voices import SAMPLE_RATE_HZ, Note, render

from mmpipe.encoders.tiny import NoteNet, prepare_note, prepare_photo, prepare_title

VAGUE_SHARE = 0.25  # of the titles that the title encoder sees, with a label at random: it learns to say nothing


def photo_data(photos: Photos, limit: int) -> tuple[Tensor, Tensor]:
    """The encoders' share of the training photos, as the encoder gets them → uint8 [N, 1, 28, 28], int64 [N]."""
    pictures, classes = photos
    rows = list(photo_range("train")[1])[:limit]
    prepared = [prepare_photo(to_picture(pictures[row]))["photo"] for row in rows]
    return torch.stack(prepared), torch.from_numpy(classes[rows].astype(np.int64))


def title_data(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """n fresh titles → pieces int64 [N, T, K], mask int64 [N, T], labels int64 [N]."""
    random = random_module.Random(f"titles/{seed}")
    pieces, masks, labels = [], [], []
    for _ in range(n):
        label = random.choice(LABELS)
        title = vague("train", random) if random.random() < VAGUE_SHARE else informative(label, "train", random)
        prepared = prepare_title(title)
        pieces.append(prepared["pieces"])
        masks.append(prepared["mask"])
        labels.append(LABELS.index(label))
    return torch.stack(pieces), torch.stack(masks), torch.tensor(labels)


def spoken(notes: list[Note], split: str, jobs: int) -> Iterator[Tensor]:
    """The encoder's input float32 [samples] for each note, in order, rendered in `jobs` processes.

    They fork for each note, which is slow in a process that has torch: the program that calls this must import it late.
    """
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for samples in pool.map(render, notes, [split] * len(notes), chunksize=64):
            yield prepare_note((samples.astype(np.float32) / 32768, SAMPLE_RATE_HZ))["samples"]


def note_data(n: int, seed: int, jobs: int, cache: Path | None) -> tuple[Tensor, Tensor]:
    """n notes in the training voices → log-mel float16 [N, M, F], labels int64 [N]. Kept in `cache` when given."""
    random = random_module.Random(f"notes/{seed}")
    labels = [random.choice(LABELS) for _ in range(n)]
    notes = [draw_note(label, "train", random) for label in labels]
    targets = torch.tensor([LABELS.index(label) for label in labels])
    kept = cache / f"notes-{n}-{seed}.npy" if cache else None
    if kept and kept.exists():
        return torch.from_numpy(np.load(kept)), targets
    with torch.random.fork_rng():  # so that what is drawn after this does not depend on the cache
        front = NoteNet()
    blocks, block = [], []
    with torch.inference_mode():
        for samples in spoken(notes, "train", jobs):
            block.append(samples)
            if len(block) == 128:
                blocks.append(front.log_mel(torch.stack(block)).half())
                block = []
        if block:
            blocks.append(front.log_mel(torch.stack(block)).half())
    features = torch.cat(blocks).clone()
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, features.numpy())
    return features, targets


@dataclass(frozen=True)
class Inputs:
    """Items as the encoders get them. Rows of absent media are zero."""

    photo: Tensor  # uint8 [N, 1, 28, 28]
    pieces: Tensor  # int64 [N, T, K]
    mask: Tensor  # int64 [N, T]
    samples: Tensor  # float32 [N, samples]
    presence_NM: Tensor  # bool; image, text, audio
    labels_N: Tensor  # int64


def item_inputs(n: int, split: str, seed: int, photos: Photos, jobs: int) -> Inputs:
    """The items that `make.py OUT --n n --split split --seed seed` writes, through the same encodings."""
    pictures, classes = photos
    items: list[Item] = list(islice(plan(split, seed, classes), n))
    photo, title, samples = [], [], torch.zeros(n, prepare_note(([], SAMPLE_RATE_HZ))["samples"].shape[0])
    blank = torch.zeros_like(prepare_photo(Image.new("L", (28, 28)))["photo"])
    for item in items:
        if item.photo is None:
            photo.append(blank)
        else:
            with Image.open(BytesIO(encode(pictures[item.photo], item.photo_suffix))) as image:
                photo.append(prepare_photo(image.convert("RGB"))["photo"])
        title.append(prepare_title(item.title or ""))
    speaking = [item for item in items if item.note is not None]
    notes = [item.note for item in speaking if item.note is not None]
    for item, window in zip(speaking, spoken(notes, split, jobs), strict=True):
        samples[item.index] = window
    return Inputs(
        photo=torch.stack(photo),
        pieces=torch.stack([one["pieces"] for one in title]),
        mask=torch.stack([one["mask"] for one in title]),
        samples=samples,
        presence_NM=torch.tensor([[i.photo is not None, i.title is not None, i.note is not None] for i in items]),
        labels_N=torch.tensor([LABELS.index(item.label) for item in items]),
    )
