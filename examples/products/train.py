"""Train the demo's models: three small encoders, then the head and its exits.

    python examples/products/train.py configs/quickstart

writes photo, title, note and head.safetensors and metrics.json to the folder. About eighteen minutes on two
cores with --bf16; with --cache DIR the spoken notes, the slow part, are kept for the next time. --quick makes models of
no use in half a minute, to see that it all runs.
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
    titles: int = 20_000  # fresh ones each epoch
    title_epochs: int = 5
    notes: int = 24_000
    note_epochs: int = 12
    head_items: int = 9_000
    head_epochs: int = 8
    head_recombinations: int = 4
    threshold_items: int = 3_000
    test_items: int = 2_000


QUICK = Sizes(256, 1, 256, 1, 64, 1, 60, 2, 1, 30, 30)


@dataclass(frozen=True)
class Setting:
    out: Path
    sizes: Sizes
    photos: Path
    cache: Path | None
    jobs: int
    seed: int
    bf16: bool


def train_photo(setting: Setting) -> None:
    from data import photo_data
    from fit import augment_photo, fit_encoder

    from mmpipe.encoders.tiny import PhotoNet, save

    data = photo_data(load_photos("train", setting.photos), setting.sizes.photos)
    net = PhotoNet()
    fit_encoder(
        net, net, lambda _: data, augment_photo,
        classes=len(LABELS), epochs=setting.sizes.photo_epochs, lr=4e-3, bf16=setting.bf16, seed=setting.seed,
    )  # fmt: skip
    save(setting.out / "photo.safetensors", "photo", net)


def train_title(setting: Setting) -> None:
    from data import title_data
    from fit import augment_title, fit_encoder

    from mmpipe.encoders.tiny import TitleNet, save

    net = TitleNet()
    fit_encoder(
        net, net, lambda epoch: title_data(setting.sizes.titles, 1000 * setting.seed + epoch), augment_title,
        classes=len(LABELS), epochs=setting.sizes.title_epochs, lr=2e-3, seed=setting.seed,
    )  # fmt: skip
    save(setting.out / "title.safetensors", "title", net)


def train_note(setting: Setting) -> None:
    from data import note_data
    from fit import augment_note, fit_encoder

    from mmpipe.encoders.tiny import NoteNet, save

    data = note_data(setting.sizes.notes, setting.seed, setting.jobs, setting.cache)
    net = NoteNet()
    fit_encoder(
        net, net.from_log_mel, lambda _: data, augment_note,
        classes=len(LABELS), epochs=setting.sizes.note_epochs, lr=3e-3, bf16=setting.bf16, seed=setting.seed,
    )  # fmt: skip
    save(setting.out / "note.safetensors", "note", net)


ENCODERS = {"photo": train_photo, "title": train_title, "note": train_note}


def train_exits(
    out: Path, sizes: Sizes, tune: Embedded, seed: int
) -> tuple[nn.Module, list[float | None], dict[str, object]]:
    """Writes the head → (head, thresholds of the exits, what happened)."""
    import torch
    from evaluate import EXITS, MODALITIES, exit_table, recombined

    from mmpipe.encoders.tiny import DIM
    from mmpipe.fusion.checkpoint import save_checkpoint
    from mmpipe.fusion.heads import TransformerHead
    from mmpipe.fusion.training import choose_thresholds, train_head

    torch.manual_seed(seed)
    dims, options = dict.fromkeys(MODALITIES, DIM), {"width": 64, "depth": 2, "heads": 4}
    head = TransformerHead(dims, LABELS, **options)
    fitting = recombined(tune.rows(0, sizes.head_items), sizes.head_recombinations, seed)
    result = train_head(
        head, fitting.embeddings, fitting.presence_NM, fitting.labels_N, prefixes=EXITS,
        epochs=sizes.head_epochs, patience=sizes.head_epochs, weight_decay=0.05, seed=seed,
    )  # fmt: skip
    head.eval()
    save_checkpoint(out / "head.safetensors", head, kind="transformer", labels=LABELS, dims=dims, options=options)
    held = tune.rows(sizes.head_items, sizes.head_items + sizes.threshold_items)
    confidence_EN, label_EN, gated_EN, full_N = exit_table(head, held)
    exact = choose_thresholds(confidence_EN, label_EN != full_N, gated_EN, max_disagreement=MAX_DISAGREEMENT)
    thresholds = [None if t is None else math.ceil(t * 10_000) / 10_000 for t in exact]
    print(f"head: best epoch {result.best_epoch + 1}, {asdict(result.best)}; thresholds {thresholds}")
    return head, thresholds, {"best_epoch": result.best_epoch + 1, **asdict(result.best)}


def train_and_measure_head(setting: Setting, test_seed: int) -> dict[str, object]:
    """Writes the head → the metrics, the figures of fresh test items among them."""
    from data import item_inputs
    from evaluate import embed, figures

    from mmpipe.encoders import tiny

    sizes = setting.sizes
    encoders = {
        modality: tiny.load(name, modality, weights=setting.out / f"{name}.safetensors")
        for modality, name in (("image", "photo"), ("text", "title"), ("audio", "note"))
    }
    tuning = sizes.head_items + sizes.threshold_items
    photos = load_photos("train", setting.photos)
    tune_inputs = item_inputs(tuning, "tune", setting.seed, photos, setting.jobs, setting.cache)
    tune = embed(encoders, tune_inputs)
    head, thresholds, training = train_exits(setting.out, sizes, tune, setting.seed)
    test_photos = load_photos("t10k", setting.photos)
    test_inputs = item_inputs(sizes.test_items, "test", test_seed, test_photos, setting.jobs, setting.cache)
    test = embed(encoders, test_inputs)
    return {
        "head": training,
        "exits": {"image": thresholds[0], "image+text": thresholds[1]},
        "test": {"items": sizes.test_items, "seed": test_seed, **figures(head, thresholds, tune, test)},
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the weights")
    parser.add_argument("--photos", type=Path, default=DEBIAN_FOLDER, help="folder with the Fashion-MNIST .gz files")
    parser.add_argument("--cache", type=Path, help="folder to keep the spoken notes in")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that speak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-seed", type=int, default=1, help="of the test items that the figures are from")
    parser.add_argument("--bf16", action="store_true", help="train faster, on a CPU with AVX512-BF16 or AMX")
    parser.add_argument("--quick", action="store_true", help="a run of the code, not a training")
    parser.add_argument("--only", choices=(*ENCODERS, "head"), help="train this one, with the others that are in OUT")
    options = parser.parse_args(arguments)

    import torch

    options.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        options.out, QUICK if options.quick else Sizes(), options.photos, options.cache, options.jobs, options.seed,
        options.bf16,
    )  # fmt: skip
    for name, train in ENCODERS.items():
        if options.only in (None, name):
            start = time.perf_counter()
            torch.manual_seed(options.seed)
            train(setting)
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    if options.only in (None, "head"):
        measured = train_and_measure_head(setting, options.test_seed)
        metrics = {"sizes": asdict(setting.sizes), "seed": options.seed, **measured}
        (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(measured, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
