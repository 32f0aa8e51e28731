"""Train the demo's models: three small encoders, then the head and its exits.

    python examples/products/train.py configs/quickstart

writes photo, title, note and head.safetensors and metrics.json to the folder. About twenty minutes on two cores;
with --cache DIR the spoken notes, the slow part, are kept for the next time. --quick makes models of no use in half
a minute, to see that it all runs.
"""

# torch is imported late: the processes that speak import this file too, and fork much faster without it
from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from photos import DEBIAN_FOLDER, LABELS, load_photos

if TYPE_CHECKING:
    from evaluate import Embedded
    from torch import nn

MAX_DISAGREEMENT = 0.008  # with the full pipeline, on the tuning items; a little below the 1% that is wanted


@dataclass(frozen=True)
class Sizes:
    photos: int = 45_000
    photo_epochs: int = 14
    titles: int = 30_000  # fresh ones each epoch
    title_epochs: int = 8
    notes: int = 30_000
    note_epochs: int = 12
    head_items: int = 6_500
    head_epochs: int = 60
    threshold_items: int = 3_500
    test_items: int = 2_000


QUICK = Sizes(512, 1, 512, 1, 96, 1, 200, 2, 60, 60)


def train_encoders(out: Path, sizes: Sizes, photos: Path, cache: Path | None, jobs: int, seed: int) -> dict[str, float]:
    """Writes the three encoders → seconds for each."""
    import torch
    from data import note_data, photo_data, title_data
    from fit import augment_note, augment_photo, augment_title, fit_encoder

    from mmpipe.encoders import tiny

    classes, seconds = len(LABELS), {}

    start = time.perf_counter()
    print("photo")
    torch.manual_seed(seed)
    photo = tiny.PhotoNet().to(memory_format=torch.channels_last)
    pictures = photo_data(load_photos("train", photos), sizes.photos)
    fit_encoder(photo, photo, lambda _: pictures, augment_photo, classes=classes, epochs=sizes.photo_epochs, lr=4e-3)
    tiny.save(out / "photo.safetensors", "photo", photo)
    seconds["photo"] = time.perf_counter() - start

    start = time.perf_counter()
    print("title")
    torch.manual_seed(seed)
    title = tiny.TitleNet()
    fit_encoder(
        title, title, lambda epoch: title_data(sizes.titles, 1000 * seed + epoch), augment_title,
        classes=classes, epochs=sizes.title_epochs, lr=2e-3,
    )  # fmt: skip
    tiny.save(out / "title.safetensors", "title", title)
    seconds["title"] = time.perf_counter() - start

    start = time.perf_counter()
    print("note")
    torch.manual_seed(seed)
    note = tiny.NoteNet()
    notes = note_data(sizes.notes, seed, jobs, cache)
    fit_encoder(
        note, note.from_log_mel, lambda _: notes, augment_note, classes=classes, epochs=sizes.note_epochs, lr=3e-3
    )
    tiny.save(out / "note.safetensors", "note", note)
    seconds["note"] = time.perf_counter() - start
    return seconds


def train_exits(
    out: Path, sizes: Sizes, tune: Embedded, seed: int
) -> tuple[nn.Module, list[float | None], dict[str, object]]:
    """Writes the head → (head, thresholds of the exits, what happened)."""
    import torch
    from evaluate import EXITS, MODALITIES, exit_table

    from mmpipe.encoders.tiny import DIM
    from mmpipe.fusion.checkpoint import save_checkpoint
    from mmpipe.fusion.heads import TransformerHead
    from mmpipe.fusion.training import choose_thresholds, train_head

    torch.manual_seed(seed)
    dims, options = dict.fromkeys(MODALITIES, DIM), {"width": 64, "depth": 2, "heads": 4}
    head = TransformerHead(dims, LABELS, **options)
    fitting = tune.rows(0, sizes.head_items)
    result = train_head(
        head, fitting.embeddings, fitting.presence_NM, fitting.labels_N, prefixes=EXITS,
        epochs=sizes.head_epochs, seed=seed,
    )  # fmt: skip
    head.eval()
    save_checkpoint(out / "head.safetensors", head, kind="transformer", labels=LABELS, dims=dims, options=options)
    held = tune.rows(sizes.head_items, sizes.head_items + sizes.threshold_items)
    confidence_EN, label_EN, gated_EN, full_N = exit_table(head, held)
    exact = choose_thresholds(confidence_EN, label_EN != full_N, gated_EN, max_disagreement=MAX_DISAGREEMENT)
    thresholds = [None if t is None else math.ceil(t * 10_000) / 10_000 for t in exact]
    print(f"head: best epoch {result.best_epoch + 1}, {asdict(result.best)}; thresholds {thresholds}")
    return head, thresholds, {"best_epoch": result.best_epoch + 1, **asdict(result.best)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the weights")
    parser.add_argument("--photos", type=Path, default=DEBIAN_FOLDER, help="folder with the Fashion-MNIST .gz files")
    parser.add_argument("--cache", type=Path, help="folder to keep the training notes in")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that speak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-seed", type=int, default=1, help="of the test items that the figures are from")
    parser.add_argument("--quick", action="store_true", help="a run of the code, not a training")
    parser.add_argument("--head-only", action="store_true", help="keep the encoders that are in OUT")
    options = parser.parse_args(arguments)

    from data import item_inputs
    from evaluate import embed, figures

    from mmpipe.encoders import tiny

    sizes = QUICK if options.quick else Sizes()
    options.out.mkdir(parents=True, exist_ok=True)
    seconds = {}
    if not options.head_only:
        seconds = train_encoders(options.out, sizes, options.photos, options.cache, options.jobs, options.seed)
    start = time.perf_counter()
    encoders = {
        modality: tiny.load(name, modality, weights=options.out / f"{name}.safetensors")
        for modality, name in (("image", "photo"), ("text", "title"), ("audio", "note"))
    }
    train_photos = load_photos("train", options.photos)
    tuning = sizes.head_items + sizes.threshold_items
    tune = embed(encoders, item_inputs(tuning, "tune", options.seed, train_photos, options.jobs))
    head, thresholds, training = train_exits(options.out, sizes, tune, options.seed)
    seconds["head"] = time.perf_counter() - start
    test_photos = load_photos("t10k", options.photos)
    test = embed(encoders, item_inputs(sizes.test_items, "test", options.test_seed, test_photos, options.jobs))
    metrics = {
        "sizes": asdict(sizes),
        "seed": options.seed,
        "seconds": {name: round(value) for name, value in seconds.items()},
        "head": training,
        "exits": {"image": thresholds[0], "image+text": thresholds[1]},
        "test": {"items": sizes.test_items, "seed": options.test_seed, **figures(head, thresholds, tune, test)},
    }
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(metrics["test"], indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
