"""What exits save, and what they change: a configuration with its exits against the same without, over a folder.

    python examples/saving.py CONFIG --input MEDIA --truth LABELS.csv [--rounds 5] [--set KEY=VALUE]…
    python examples/saving.py CONFIG --input MEDIA --after image text --leaving 72%    # exits as others have them

Both run in this process, one after the other, the order changing from round to round; ratios are of neighbours, their
median and range are told. `decode + compute` is what run.json counts on the workers and in the segments; `cores` is all
that the process spent, the job's own bookkeeping included; `wall` is what one waits for. Nothing is kept between runs;
memory is had and kept as `mmpipe run` has and keeps it. With `--leaving`, the one exit's threshold is such that of the
items that have what it spares this share goes: what a pattern of exits would bring with these encoders.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mmpipe.loading import keep_freed_memory, use_huge_pages

use_huge_pages()  # before torch is there

from mmpipe import Pipeline  # noqa: E402
from mmpipe.fusion.binomial import lower_limit, upper_limit  # noqa: E402
from mmpipe.truth import read_truth  # noqa: E402

ALIKE = ("runtime.cache=off", "fusion.audit.share=0", "fusion.deliberate=null")
WITHOUT = ("fusion.exits=[]", "fusion.calibration=null")


def run(pipeline: Pipeline, media: Path, out: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """→ (seconds of each kind, rows)."""
    pipeline.run_folder(media, out, mode="overwrite")
    spent = json.loads((out / "run.json").read_text(encoding="utf-8"))["seconds"]
    rows = pq.read_table(out / "predictions", columns=["id", "label", "answered_by"]).to_pylist()
    worked = spent["decode"] + sum(spent["segments"].values())
    return {"decode + compute": worked, "cores": spent["cpu"], "wall": spent["total"]}, rows


def ratios(rounds: Sequence[tuple[dict[str, float], dict[str, float]]]) -> dict[str, list[float]]:
    """Kind of seconds → without ÷ with exits, of each round."""
    return {kind: sorted(whole[kind] / short[kind] for short, whole in rounds) for kind in rounds[0][0]}


def table(
    rounds: Sequence[tuple[dict[str, float], dict[str, float]]],
    short: Sequence[dict[str, Any]],
    whole: Sequence[dict[str, Any]],
    truth: dict[str, str],
) -> str:
    count, known = len(short), [row for row in short if row["id"] in truth]
    differ = sum(one["label"] != other["label"] for one, other in zip(short, whole, strict=True))
    early = sum(row["answered_by"] not in (None, "all") for row in short)
    low, high = lower_limit(differ, count, 0.025), upper_limit(differ, count, 0.025)
    lines = [
        f"{count:,} items, {early / count:.1%} answered early",
        f"answers that differ from the full pipeline's: {differ / count:.2%} (95%: {low:.2%} to {high:.2%})",
    ]
    if known:
        right = sum(row["label"] == truth[row["id"]] for row in known) / len(known)
        full = sum(row["label"] == truth[row["id"]] for row in whole if row["id"] in truth) / len(known)
        lines.append(f"right: {right:.2%} with exits, {full:.2%} without ({100 * (right - full):+.2f} points)")
    for kind, found in ratios(rounds).items():
        seconds = [statistics.median(pair[n][kind] for pair in rounds) for n in (1, 0)]
        told = f"÷ {statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"
        lines.append(f"{kind}: {seconds[0]:.2f} s → {seconds[1]:.2f} s, {told}")
    return "\n".join(lines)


def percent(text: str) -> float:
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def exit_for(config: str, settings: Sequence[str], media: Path, after: Sequence[str], share: float) -> list[str]:
    """--set's texts for one exit, at which `share` of the items that have more than it needs leave."""

    def at(threshold: float) -> list[str]:
        exits = json.dumps([{"after": list(after), "threshold": threshold}])
        return ["fusion.calibration=null", f"fusion.exits={exits}"]

    with (
        tempfile.TemporaryDirectory() as folder,
        Pipeline.load(config, overrides=[*settings, *ALIKE, *at(0.0)]) as pipeline,
    ):
        pipeline.run_folder(media, Path(folder, "out"))
        rows = pq.read_table(Path(folder, "out", "predictions"), columns=["confidence", "skipped"]).to_pylist()
    sure = sorted((row["confidence"] for row in rows if row["skipped"]), reverse=True)
    if not sure:
        raise SystemExit(f"no item has more than {' and '.join(after)}")
    return at(sure[min(len(sure) - 1, round(share * len(sure)))])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="packaged name or YAML, with exits or a calibration")
    parser.add_argument("--input", type=Path, required=True, help="folder of media")
    parser.add_argument("--truth", type=Path, help="csv with id and label")
    parser.add_argument("--after", nargs="+", help="with --leaving: what the exit has seen")
    parser.add_argument("--leaving", type=percent, help="of the items that the exit spares something, so many leave")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for both")
    options = parser.parse_args(arguments)
    if (options.after is None) != (options.leaving is None):
        parser.error("--after and --leaving go together")
    keep_freed_memory()
    if options.after:
        options.set += exit_for(options.config, options.set, options.input, options.after, options.leaving)
    rounds = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Pipeline.load(options.config, overrides=[*options.set, *ALIKE]) as short,
        Pipeline.load(options.config, overrides=[*options.set, *ALIKE, *WITHOUT]) as whole,
    ):
        truth = {} if options.truth is None else read_truth(options.truth, short.labels)
        for number in range(options.rounds + 1):
            order = (short, whole) if number % 2 else (whole, short)
            found = {one: run(one, options.input, Path(folder, "out")) for one in order}
            if number:  # the first round warms up
                rounds.append((found[short][0], found[whole][0]))
    print(table(rounds, found[short][1], found[whole][1], truth))
    return 0


if __name__ == "__main__":
    sys.exit(main())
