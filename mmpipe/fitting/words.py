"""Sentences on what was fitted: for the terminal, the report and the configuration's comment."""

from __future__ import annotations

from typing import Any

from mmpipe.fitting.measuring import LEVEL, Compared, Measured, Score
from mmpipe.fitting.training import MAX_DISAGREEMENT
from mmpipe.fusion.binomial import lower_limit
from mmpipe.jobs.markup import listed


def accuracy(score: Score) -> str:
    """94.2% (91.0–96.5)."""
    low, high = score.interval
    return f"{score.accuracy:.1%} ({100 * low:.1f}–{100 * high:.1f})" if score.count else "–"


def verdict(measured: Measured) -> str:
    """The one sentence: how often it is right, and what of the baselines it beats."""
    right = f"Right on {measured.full.accuracy:.1%} of {measured.full.count:,} held-out samples"
    behind = [one.name for one in measured.baselines if one.score.right >= measured.full.right]
    if behind:
        return f"{right}: no better than {listed(behind)}"
    best = max(measured.baselines, key=lambda one: one.score.right)
    return f"{right}; the best baseline, {best.name}, on {best.score.accuracy:.1%}"


def against(one: Compared) -> str:
    """+3.1 points; only one of the two right: 23 to 9."""
    return f"{one.better} to {one.worse}, p = {one.p_value:.2g}" if one.better + one.worse else "the same answers"


def exits_broken(measured: Measured) -> str:
    """Where the test part says that the exits surely differ more often than their thresholds were chosen to."""
    differ, count = sum(left.differ for left in measured.exits), measured.full.count
    if not measured.exits or lower_limit(differ, count, LEVEL) <= MAX_DISAGREEMENT:
        return ""
    return (
        f"with these thresholds {differ:,} of {count:,} answers differ, more than the {MAX_DISAGREEMENT:.0%} that they "
        "were chosen for on few samples: use exits after mmpipe calibrate alone"
    )


def as_json(measured: Measured) -> dict[str, Any]:
    """What `--json` prints: counts on the test part."""

    def plain(score: Score) -> dict[str, Any]:
        return {"right": score.right, "samples": score.count, "interval": list(score.interval)}

    return {
        "full": plain(measured.full),
        "balanced_accuracy": measured.balanced,
        "with_exits": plain(measured.with_exits),
        "baselines": {one.name: plain(one.score) | {"only_head_right": one.better, "only_baseline_right": one.worse}
                      for one in measured.baselines},
        "subsets": {one.name: plain(one.score) for one in measured.subsets},
        "exits": {one.name: {"threshold": one.threshold, "gated": one.gated, "left": one.left, "differ": one.differ}
                  for one in measured.exits},
    }  # fmt: skip


def summary(measured: Measured) -> str:
    """A few lines for a terminal, 80 columns."""
    lines = [f"{verdict(measured)}.", f"Each label counted alike: {measured.balanced:.1%}.", ""]
    names = [*(one.name for one in measured.subsets), *(one.name for one in measured.baselines)]
    width = max(map(len, ["baseline", *names]))
    lines.append(f"  {'seen':<{width}}  {'samples':>7}  accuracy, 95% interval")
    lines += [f"  {o.name:<{width}}  {o.score.count:>7,}  {accuracy(o.score)}" for o in measured.subsets]
    lines += ["", f"  {'baseline':<{width}}  {'samples':>7}  accuracy, 95% interval; only one right"]
    for one in measured.baselines:
        lines.append(f"  {one.name:<{width}}  {one.score.count:>7,}  {accuracy(one.score)}; {against(one)}")
    if measured.exits:
        lines += ["", f"  with exits: {accuracy(measured.with_exits)}"]
        for left in measured.exits:
            at = "no threshold keeps the bound" if left.threshold is None else f"threshold {left.threshold:.4f}"
            lines.append(f"  {left.name}: {left.left:,} of {left.gated:,} left, {left.differ:,} differ; {at}")
        if told := exits_broken(measured):
            lines.append(f"  {told}")
    return "\n".join(lines)
