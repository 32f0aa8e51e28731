"""Whether a second look pays, found where true labels are given: its answers against those of the first look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mmpipe.calibrated import SecondLook
from mmpipe.fusion.binomial import p_value
from mmpipe.pipeline import Pipeline
from mmpipe.runtime.ledger import Outcome
from mmpipe.types import Prediction, Sample


def try_second_look(
    pipeline: Pipeline,
    samples: Sequence[Sample],
    truth: Mapping[str, str],
    *,
    certainty: float,
    advance: Callable[[int], None] = lambda count: None,
) -> SecondLook:
    """Answer the samples with a true label in full, those that the last stage is unsure of once more as
    `fusion.deliberate` says, and count what that won and lost. It pays where a one-sided sign test says so with this
    certainty: a second look always costs time, so that it has to show what it is for.
    """
    settings, labels = pipeline.config.fusion.deliberate, pipeline.labels
    assert settings is not None
    looked = won = lost = 0
    seconds = 0.0

    def count(shard: Sequence[Sample], predictions: list[Prediction], outcome: Outcome) -> None:
        nonlocal looked, won, lost, seconds
        seconds += outcome.seconds.get("deliberating", 0.0)
        for row, (sample, prediction) in enumerate(zip(shard, predictions, strict=True)):
            if not prediction.deliberated or outcome.probabilities_NL is None:
                continue
            first = labels[int(outcome.probabilities_NL[row].argmax())] == truth[sample.id]
            second = prediction.label == truth[sample.id]
            looked, won, lost = looked + 1, won + (second and not first), lost + (first and not second)

    known, size = [sample for sample in samples if sample.id in truth], pipeline.config.output.shard_rows
    pipeline.settle(known)
    pipeline.run_shards(
        [known[start : start + size] for start in range(0, len(known), size)],
        count,
        exits=False,
        deliberate=True,
        answered=advance,
    )
    surely = won > lost and p_value(lost, won + lost, 0.5) <= 1 - certainty
    return SecondLook(
        below=settings.below,
        views=settings.views,
        items=len(known),
        looked_at=looked,
        won=won,
        lost=lost,
        seconds=seconds,
        pays=surely,
    )
