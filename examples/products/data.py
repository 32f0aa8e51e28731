"""What training reads, made in memory from the same generators that make.py writes files with.

Shapes: N sample, M mel band or modality, F frame.
"""

from __future__ import annotations

import random as random_module
from collections.abc import Callable
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


def log_mels(notes: list[Note], split: str, jobs: int) -> Tensor:
    """What NoteNet.log_mel makes of each note, rendered in `jobs` processes → float16 [N, M, F].

    They fork for each note, which is slow in a process that has torch: the program that calls this must import it late.
    """
    with torch.random.fork_rng():  # what is drawn after this must not depend on whether a cache was there
        front = NoteNet()
    blocks = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool, torch.inference_mode():
        rendered = pool.map(render, notes, [split] * len(notes), chunksize=64)
        while block := list(islice(rendered, 128)):
            sounds = [(samples.astype(np.float32) / 32768, SAMPLE_RATE_HZ) for samples in block]
            samples_BN = torch.stack([prepare_note(sound)["samples"] for sound in sounds])
            blocks.append(front.log_mel(samples_BN).half())
    return torch.cat(blocks).clone()


def note_data(n: int, seed: int, jobs: int, cache: Path | None) -> tuple[Tensor, Tensor]:
    """n notes in the training voices → log-mel float16 [N, M, F], labels int64 [N]. Kept in `cache` when given."""
    random = random_module.Random(f"notes/{seed}")
    labels = [random.choice(LABELS) for _ in range(n)]
    notes = [draw_note(label, "train", random) for label in labels]
    features = cached(cache, f"notes-{n}-{seed}", lambda: log_mels(notes, "train", jobs))
    return features, torch.tensor([LABELS.index(label) for label in labels])


def cached(folder: Path | None, name: str, make: Callable[[], Tensor]) -> Tensor:
    """The tensor in folder/name.npy, made and kept there the first time; no folder: made."""
    if folder is None:
        return make()
    path = folder / f"{name}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path, make().numpy())
    return torch.from_numpy(np.load(path))


@dataclass(frozen=True)
class Inputs:
    """Items as the encoders get them, sound after its log-mel. Rows of absent media hold zeros."""

    photo: Tensor  # uint8 [N, 1, 28, 28]
    pieces: Tensor  # int64 [N, T, K]
    mask: Tensor  # int64 [N, T]
    log_mel: Tensor  # float16 [N, M, F]
    presence_NM: Tensor  # bool; image, text, audio
    labels_N: Tensor  # int64


def item_inputs(n: int, split: str, seed: int, photos: Photos, jobs: int, cache: Path | None) -> Inputs:
    """The items that `make.py OUT --n n --split split --seed seed` writes, through the same encodings."""
    pictures, classes = photos
    items: list[Item] = list(islice(plan(split, seed, classes), n))
    photo, title = [], []
    blank = torch.zeros_like(prepare_photo(Image.new("L", (28, 28)))["photo"])
    for item in items:
        if item.photo is None:
            photo.append(blank)
        else:
            with Image.open(BytesIO(encode(pictures[item.photo], item.photo_suffix))) as image:
                photo.append(prepare_photo(image.convert("RGB"))["photo"])
        title.append(prepare_title(item.title or ""))
    notes = [item.note for item in items if item.note is not None]
    heard = cached(cache, f"items-{split}-{n}-{seed}", lambda: log_mels(notes, split, jobs))
    presence_NM = torch.tensor([[i.photo is not None, i.title is not None, i.note is not None] for i in items])
    log_mel = torch.zeros(n, *heard.shape[1:], dtype=heard.dtype)
    log_mel[presence_NM[:, 2]] = heard
    return Inputs(
        photo=torch.stack(photo),
        pieces=torch.stack([one["pieces"] for one in title]),
        mask=torch.stack([one["mask"] for one in title]),
        log_mel=log_mel,
        presence_NM=presence_NM,
        labels_N=torch.tensor([LABELS.index(item.label) for item in items]),
    )
