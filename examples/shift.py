"""What a fast path changes: in embeddings, confidence and answers; and what decoding costs, exact and fast.

    python examples/shift.py quickstart MEDIA
    python examples/shift.py quickstart MEDIA --change runtime.dtype=bfloat16
    python examples/full_size.py MODELS && python examples/benchmark_media.py PHOTOS --n 200
    python examples/shift.py MODELS/clip_clap.yaml PHOTOS --only image

prints how far a change of one key moves each sample's answer by the full pipeline. Embeddings of random weights lie
close together whatever they are of: hence the distance between different media beside the shift. For `input.decode`
(what it does without --change) also the milliseconds that each kind of file takes on one thread, opened, decoded and
prepared, side by side.
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

# key → the value that its fast ones are held against
SLOW = {"input.decode": "exact", "runtime.dtype": "float32", "runtime.backend": "eager"}
MODES = ("exact", "fast")
Preparations = Mapping[str, Mapping[str, Preparation]]  # mode → modality → how a medium becomes tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=("image", "text", "audio"), help="leave the other media out")
    parser.add_argument("--limit", type=int, default=200, help="samples")
    parser.add_argument("--change", default="input.decode=fast", metavar="KEY=VALUE", help=f"KEY: {', '.join(SLOW)}")
    parser.add_argument("--repeats", type=int, default=5, help="times that each file is decoded; the fastest counts")
    arguments = parser.parse_args()

    key = arguments.change.partition("=")[0]
    if key not in SLOW:
        parser.error(f"--change takes one of {', '.join(SLOW)}")
    answers: list[list[Prediction]] = []
    preparations: list[Mapping[str, Preparation]] = []
    for change in (f"{key}={SLOW[key]}", arguments.change):
        overrides = ["fusion.deliberate=null", "fusion.calibration=null", "runtime.dtype=float32", change]
        with Pipeline.load(arguments.config, overrides=overrides) as pipeline:
            found = pipeline.find(arguments.folder).samples[: arguments.limit]
            samples = [_of_those(sample, arguments.only) for sample in found]
            samples = [sample for sample in samples if sample.media]
            answers.append(pipeline.run(samples, exits=False, embeddings=True, cached=False)[0])
            preparations.append(pipeline.built.preparations)
    print(f"{len(samples)} samples of {arguments.folder}, {arguments.config}, {arguments.change}")
    if key == "input.decode":
        tell_times(samples, dict(zip(MODES, preparations, strict=True)), arguments.repeats)
    tell_shifts(*answers)


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


def tell_shifts(slow: Sequence[Prediction], fast: Sequence[Prediction]) -> None:
    """1 − cosine of embeddings, confidence, and labels that are not the same."""
    for modality in sorted({name for one in slow for name in one.used}):
        before, after = _embeddings(slow, modality), _embeddings(fast, modality)
        shift = 1 - (before * after).sum(axis=1)
        apart = 1 - (before * np.roll(before, 1, axis=0)).sum(axis=1)
        print(
            f"{modality}: 1 − cosine {np.median(shift):.1e} median, {shift.max():.1e} most; "
            f"between neighbours {np.median(apart):.1e} median"
        )
    pairs = [(a, b) for a, b in zip(slow, fast, strict=True) if a.label is not None and b.label is not None]
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
