"""Exits inside an encoder: what each costs, how often it agrees with the whole encoder, and what not leaving costs.

    python examples/depth_exits.py OUT

Two encoders, each alone: MiniLM (real weights, phrases with a number in words), and a small ViT with random weights
(handwritten digits). `mmpipe fit` trains the probes and chooses thresholds; then fresh samples run with all exits shut,
where every exit is asked and nobody leaves. The last column is the largest difference between the embedding of the
encoder cut into stages and that of the encoder in one piece, relative to the largest value.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from digits import WORDS, configuration, phrase, picture

from mmpipe import Pipeline
from mmpipe.config import load
from mmpipe.graphs.cost import count_flops

SIDE = 32  # pixels of the ViT's pictures


def small_vit(folder: Path) -> str:
    """Six layers of random weights, saved as the hub would have them."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    shape = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 192}
    ViTForImageClassification(ViTConfig(image_size=SIDE, patch_size=8, **shape)).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return f"hf:{folder.resolve()}"


def write(folder: Path, modality: str, count: int, seed: int) -> dict[str, str]:
    """FOLDER with one medium for each sample → id → label."""
    from sklearn.datasets import load_digits

    digits, truth = load_digits(), {}
    folder.mkdir(parents=True)
    for index in random.Random(seed).sample(range(len(digits.target)), count):
        draw, stem, digit = random.Random(f"{seed}/{index}"), folder / f"{index:04d}", int(digits.target[index])
        if modality == "image":
            picture(digits.images[index], draw).save(stem.with_suffix(".png"))
        else:
            stem.with_suffix(".txt").write_text(phrase(digit, draw), encoding="utf-8")
        truth[stem.name] = WORDS[digit]
    return truth


def fitted(out: Path, modality: str, encoder: dict[str, Any], layers: tuple[int, ...], count: int) -> Path:
    """Fit probes after `layers` → the configuration that runs them."""
    truth = write(out / "media", modality, count, 1)
    with (out / "truth.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "label"), *truth.items()])
    exits = [{"after": f"{modality}.layer{layer}", "threshold": 0.9} for layer in layers]
    made = {"encoders": {modality: encoder}, "fusion": {"head": "linear", "exits": exits}}
    (out / "depth.yaml").write_text(json.dumps(made), encoding="utf-8")
    command = [sys.executable, "-m", "mmpipe", "fit", "depth.yaml", "--input", "media", "--truth", "truth.csv"]
    subprocess.run([*command, "--output", "fitted"], cwd=out, check=True, stdout=subprocess.DEVNULL)
    return out / "fitted" / "config.yaml"


def show(name: str, out: Path, modality: str, encoder: dict[str, Any], layers: tuple[int, ...], count: int) -> None:
    config = load(fitted(out, modality, encoder, layers, count))
    truth = write(out / "fresh", modality, count // 2, 2)
    with Pipeline(config) as pipeline:
        samples = pipeline.find(out / "fresh").samples
        _, outcome = pipeline.run(samples, exits=False, embeddings=True, cached=False)
        _, left = pipeline.run(samples, cached=False)
        plan, labels = pipeline.plan, pipeline.labels
        parts = [segment for segment in plan.segments if segment.branch == modality]
        flops = [count_flops(plan, segment, pipeline.modules[segment.name], 8) for segment in parts]
    with Pipeline(config, encoders_only=True) as pipeline:
        _, whole = pipeline.run(samples, embeddings=True, cached=False)
    cut, one = outcome.embeddings[modality], whole.embeddings[modality]
    parity = float((cut - one).abs().max() / one.abs().max())
    full = dict(zip(outcome.looks[-1].rows, outcome.looks[-1].labels, strict=True))
    print(f"\n{name}: {len(samples)} fresh samples")
    print(f"{'exit':<14}{'cost':>7}{'agree':>8}{'right':>8}{'leave':>8}{'parity':>10}")
    for number, look in enumerate(outcome.looks):
        asked = list(zip(look.rows, look.labels, strict=True))
        cost = sum(flops[: number + 1]) / sum(flops)
        agree = sum(full[row] == label for row, label in asked) / len(asked)
        right = sum(truth[samples[row].id] == labels[label] for row, label in asked) / len(asked)
        gone = float((left.exit_N == look.exit_index).float().mean())
        tail = f"{parity:10.1e}" if look is outcome.looks[-1] else ""
        print(f"{plan.exits[look.exit_index].name:<14}{cost:7.0%}{agree:8.1%}{right:8.1%}{gone:8.1%}{tail}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--count", type=int, default=800, help="samples to fit on; half as many are fresh")
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"{options.out} is there: name another")
    options.out.mkdir(parents=True)
    minilm = configuration(exits=False)["encoders"]["text"]
    show("MiniLM", options.out / "minilm", "text", minilm, (2, 4), options.count)
    vit = {"model": small_vit(options.out / "vit-random")}
    show("ViT of random weights", options.out / "vit", "image", vit, (2, 4), options.count)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
