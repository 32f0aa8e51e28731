"""What decoding costs, exact and fast, and what fast decoding changes: in embeddings, confidence and answers.

    python examples/decoding.py quickstart MEDIA
    python examples/full_size.py MODELS && python examples/benchmark_media.py PHOTOS --n 200
    python examples/decoding.py MODELS/clip_clap.yaml PHOTOS --only image

prints for each kind of file the milliseconds that one takes on one thread, opened, decoded and prepared, with
`input.decode` exact and fast, side by side; then how far fast decoding moves each sample's answer. Embeddings of
random weights lie close together whatever they are of: hence the distance between different pictures beside the shift.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mmpipe import MediaError, Pipeline, Prediction, Sample, media
from mmpipe.build import Preparation

MODES = ("exact", "fast")
Preparations = Mapping[str, Mapping[str, Preparation]]  # mode → modality → how a medium becomes tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=("image", "text", "audio"), help="leave the other media out")
    parser.add_argument("--limit", type=int, default=200, help="samples")
    parser.add_argument("--repeats", type=int, default=5, help="times that each file is decoded; the fastest counts")
    arguments = parser.parse_args()

    answers: dict[str, list[Prediction]] = {}
    preparations: dict[str, Mapping[str, Preparation]] = {}
    for mode in MODES:
        with Pipeline.load(arguments.config, overrides=[f"input.decode={mode}", "fusion.deliberate=null"]) as pipeline:
            found = pipeline.find(arguments.folder).samples[: arguments.limit]
            samples = [_of_those(sample, arguments.only) for sample in found]
            samples = [sample for sample in samples if sample.media]
            answers[mode], _ = pipeline.run(samples, exits=False, embeddings=True, cached=False)
            preparations[mode] = pipeline.built.preparations
    print(f"{len(samples)} samples of {arguments.folder}, {arguments.config}")
    tell_times(samples, preparations, arguments.repeats)
    tell_shifts(answers["exact"], answers["fast"])


def _of_those(sample: Sample, only: Sequence[str] | None) -> Sample:
    return sample if only is None else Sample(sample.id, {k: v for k, v in sample.media.items() if k in only})


def tell_times(samples: Sequence[Sample], preparations: Preparations, repeats: int) -> None:
    """Milliseconds a file, by suffix. Files that can't be read are left out."""
    torch.set_num_threads(1)
    files = [(name, path) for sample in samples for name, path in sample.media.items()]
    times: dict[str, list[list[float]]] = defaultdict(list)
    for modality, path in files:
        try:
            tried = [_both(modality, path, preparations) for _ in range(repeats)]
        except MediaError:
            continue
        times[path.suffix.lower()].append([min(mode) for mode in zip(*tried, strict=True)])
    print(f"{'file':8}{'number':>8}{'exact ms':>12}{'fast ms':>12}{'exact ÷ fast':>14}")
    for suffix, spent in sorted(times.items()):
        exact, fast = (1e3 * statistics.fmean(mode) for mode in zip(*spent, strict=True))
        print(f"{suffix:8}{len(spent):8}{exact:12.2f}{fast:12.2f}{exact / fast:14.2f}")


def _both(modality: str, path: Path, preparations: Preparations) -> list[float]:
    """Seconds for one file in each mode, one right after the other."""
    seconds = []
    for mode in MODES:
        needs = preparations[mode][modality]
        began = time.perf_counter()
        medium = media.load(modality, path, max_seconds=needs.decoded_seconds, smallest_side=needs.smallest_side)
        with torch.inference_mode():
            needs.prepare(medium)
        seconds.append(time.perf_counter() - began)
    return seconds


def tell_shifts(exact: Sequence[Prediction], fast: Sequence[Prediction]) -> None:
    """1 − cosine of embeddings, confidence, and labels that are not the same."""
    for modality in sorted({name for one in exact for name in one.used}):
        before, after = _embeddings(exact, modality), _embeddings(fast, modality)
        shift = 1 - (before * after).sum(axis=1)
        apart = 1 - (before * np.roll(before, 1, axis=0)).sum(axis=1)
        print(
            f"{modality}: 1 − cosine {np.median(shift):.1e} median, {shift.max():.1e} most; "
            f"between neighbours {np.median(apart):.1e} median"
        )
    pairs = [(a, b) for a, b in zip(exact, fast, strict=True) if a.label is not None and b.label is not None]
    if pairs:
        moved = [abs((a.confidence or 0.0) - (b.confidence or 0.0)) for a, b in pairs]
        other = sum(a.label != b.label for a, b in pairs)
        print(f"confidence moves by {statistics.median(moved):.1e} median, {max(moved):.1e} most")
        print(f"labels that are not the same: {other} of {len(pairs)}")


def _embeddings(predictions: Sequence[Prediction], modality: str) -> np.ndarray:
    """[samples that have it, dim], float64, of length 1."""
    found = np.array([one.embeddings[modality] for one in predictions if modality in one.used], np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
