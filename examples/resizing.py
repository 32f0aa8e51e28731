"""What resizing pictures takes: Pillow, native code to the same bits, and torch as `input.decode: fast` has it.

    python examples/resizing.py MEDIA [--n 64] [--rounds 5] [--side 224]

One thread; each picture is decoded once, and goes through all three, in turns. Ratios are of a round's sums: their
median, and the least and greatest.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmpipe import media, resizing
from mmpipe.encoders.image import ResizeCrop

Way = Callable[..., dict[str, Tensor]]


def measured(pictures: list[Path], ways: Mapping[str, Way]) -> dict[str, float]:
    """Seconds of each way, over all pictures."""
    spent = dict.fromkeys(ways, 0.0)
    for path in pictures:
        picture, first = media.load("image", path), None
        for name in random.sample(list(ways), len(ways)):
            began = time.perf_counter()
            pixels = ways[name](picture)["pixels"]
            spent[name] += time.perf_counter() - began
            if name != "torch":
                first = pixels if first is None else first
                assert torch.equal(first, pixels), path
    return spent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("media", type=Path)
    parser.add_argument("--n", type=int, default=64, help="how many pictures")
    parser.add_argument("--rounds", type=int, default=5, help="two and more")
    parser.add_argument("--side", type=int, default=224, help="pixels of the square that is cut out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    resizing.load(None)
    if why := resizing.why_not():
        print(f"Pillow resizes here: {why}")
        return 1
    crop = ResizeCrop(options.side, options.side)
    ways = {"Pillow": crop, "native": resizing.Resized(crop), "torch": crop.fast}
    samples = media.find(options.media).samples
    pictures = [Path(sample.media["image"]) for sample in samples if "image" in sample.media][: options.n]
    if not pictures:
        raise SystemExit(f"{options.media} has no pictures")
    rounds = [measured(pictures, ways) for _ in range(options.rounds + 1)][1:]  # the first warms up
    print(f"{len(pictures)} pictures to {options.side} pixels a side, {options.rounds} rounds")
    for name in ways:
        each = statistics.median(one[name] for one in rounds) / len(pictures)
        least, *_, most = ratios = sorted(one["Pillow"] / one[name] for one in rounds)
        told = f"Pillow ÷ {statistics.median(ratios):.2f} ({least:.2f} to {most:.2f})"
        print(f"{name:<8} {1e3 * each:7.2f} ms each, {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
