"""The shadow pass: every sample in full, no exit opened, then the head alone on every set of modalities.

The head alone says what the pipeline's exits say, within rounding: that is checked, on the full pipeline's answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from mmpipe.calibrating.scores import HEAD, Scores, subsets
from mmpipe.errors import InputError, ModelError
from mmpipe.fusion.heads import DepthHead
from mmpipe.graphs.plan import Plan
from mmpipe.observing import Observation
from mmpipe.pipeline import Pipeline
from mmpipe.runtime.ledger import Outcome
from mmpipe.types import Sample

_ROWS = 1024  # of the head at a time
_TIMED = 512  # samples that are computed anew for the costs, where embeddings were known: those would seem to be free
_NEAR = 0.02  # probabilities of the head alone and of the pipeline's last exit


@dataclass
class _Seen:
    """What the shards of the pass have left behind."""

    embeddings: dict[str, list[Tensor]] = field(default_factory=dict)
    present: list[Tensor] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)
    answered: list[Tensor] = field(default_factory=list)
    depths: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # exit → id → logits
    seconds: dict[str, float] = field(default_factory=dict)  # segment, or "decode.image"
    rows: dict[str, int] = field(default_factory=dict)
    recalled: int = 0  # embeddings that were known, not computed


def chosen(samples: Sequence[Sample], limit: int | None, seed: int = 0) -> list[Sample]:
    """`limit` of the samples at random, in their order; all where there are no more."""
    if limit is None or limit >= len(samples):
        return list(samples)
    rows = np.random.default_rng([seed, 1]).choice(len(samples), limit, replace=False)
    return [samples[int(row)] for row in np.sort(rows)]


def shadow(
    pipeline: Pipeline, samples: Sequence[Sample], *, advance: Callable[[int], None] = lambda count: None
) -> tuple[Scores, list[str]]:
    """Scores of the samples that could be answered, and their ids. Raises InputError where none could."""
    plan, seen = pipeline.plan, _Seen()
    depths = [exit_ for exit_ in plan.exits if ".layer" in exit_.name and not exit_.name.startswith("head.")]
    with ExitStack() as stack:
        for exit_ in depths:
            segment = next(s.name for s in plan.segments if s.branch == HEAD and exit_.value in s.writes)
            stack.enter_context(pipeline.observe(segment, partial(_keep, seen, exit_.name, exit_.value)))
        pipeline.settle(samples)  # when it is known whether somebody observes
        plan, size = pipeline.plan, pipeline.config.output.shard_rows
        pipeline.run_shards(
            [samples[start : start + size] for start in range(0, len(samples), size)],
            lambda shard, predictions, outcome: _take(seen, outcome, pipeline),
            exits=False,
            embeddings=True,
            answered=advance,
        )
    if seen.recalled:
        _time(seen, pipeline, chosen(samples, _TIMED))
    answered_N = torch.cat(seen.answered) if seen.answered else torch.empty(0, dtype=torch.bool)
    if not answered_N.any():
        raise InputError(f"none of {len(samples):,} samples could be answered: there is nothing to calibrate on")
    present_NM = torch.cat(seen.present)[answered_N]
    embeddings = {name: torch.cat(parts)[answered_N] for name, parts in seen.embeddings.items()}
    ids = [sample.id for sample, answered in zip(samples, answered_N.tolist(), strict=True) if answered]
    probabilities_NL = torch.cat(seen.probabilities)[answered_N]
    head = pipeline.built.head
    assert head is not None
    names = [branch.name for branch in plan.branches]
    logits = head_logits(head, names, embeddings, present_NM, [e.name for e in plan.exits])
    _check(logits["+".join(names)], probabilities_NL)
    blank_L = torch.full((probabilities_NL.shape[1],), torch.nan)
    for name, by_id in seen.depths.items():
        logits[name] = torch.stack([by_id.get(id_, blank_L) for id_ in ids])
    scores = Scores(
        modalities=tuple(names),
        labels=pipeline.labels,
        logits=logits,
        present_NM=present_NM,
        full_N=probabilities_NL.argmax(dim=1),
        truth_N=torch.full((len(ids),), -1),
        seconds=_seconds(seen, plan, pipeline.resolved.decode_workers),
        model=pipeline.built.core,
        dtype=pipeline.resolved.dtype,
        backends=(pipeline.resolved.backend,),
        dtypes=pipeline.dtypes,
        dropped=len(samples) - len(ids),
    )
    return scores, ids


@torch.inference_mode()
def head_logits(
    head: nn.Module,
    modalities: Sequence[str],
    embeddings: Mapping[str, Tensor],
    present_NM: Tensor,
    exits: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The head on every set of modalities, and at those of its depths that `exits` name → float32 [N, L] of each.

    Not a number where a sample has none of the set.
    """
    depths = [name for name in exits if name.startswith("head.layer")]
    found: dict[str, list[Tensor]] = {}
    for rows in torch.split(torch.arange(len(present_NM)), _ROWS):
        part = {name: table[rows].float() for name, table in embeddings.items()}
        for names in subsets(modalities):
            kept_BM = present_NM[rows] & torch.tensor([name in names for name in modalities])
            whole = len(names) == len(modalities)
            if whole and depths and isinstance(head, DepthHead):
                answers = head.all_depths(part, kept_BM)
                for name in depths:
                    answer_BL = answers[int(name.removeprefix("head.layer")) - 1]
                    found.setdefault(name, []).append(_blanked(answer_BL, kept_BM))
            found.setdefault("+".join(names), []).append(_blanked(head(part, kept_BM), kept_BM))
    return {name: torch.cat(parts).clone() for name, parts in found.items()}


def _blanked(logits_BL: Tensor, kept_BM: Tensor) -> Tensor:
    return torch.where(kept_BM.any(dim=1, keepdim=True), logits_BL.float(), torch.nan)


def _keep(seen: _Seen, name: str, value: str, observation: Observation) -> None:
    kept = seen.depths.setdefault(name, {})
    kept.update(zip(observation.ids, observation.values[value].float(), strict=True))


def _take(seen: _Seen, outcome: Outcome, pipeline: Pipeline) -> None:
    answered_N = outcome.exit_N >= 0
    labels = len(pipeline.labels)
    probabilities = outcome.probabilities_NL
    seen.probabilities.append(torch.zeros(len(answered_N), labels) if probabilities is None else probabilities)
    seen.answered.append(answered_N)
    seen.present.append(outcome.present_NM)
    for name, preparation in pipeline.built.preparations.items():
        table = outcome.embeddings.get(name)
        blank = torch.zeros(len(answered_N), preparation.dim)
        seen.embeddings.setdefault(name, []).append(blank if table is None else table.float())
    seen.recalled += sum(outcome.recalled.values())
    _spend(seen, outcome)


def _time(seen: _Seen, pipeline: Pipeline, samples: Sequence[Sample]) -> None:
    """What these cost, whatever is known of them, instead of what the others did."""
    seen.seconds.clear()
    seen.rows.clear()
    _, outcome = pipeline.run(samples, exits=False, embeddings=False, cached=False)
    _spend(seen, outcome)


def _spend(seen: _Seen, outcome: Outcome) -> None:
    walls: dict[str, float] = {}
    for one in outcome.decodings:
        walls[one.branch] = walls.get(one.branch, 0.0) + one.end - one.start
        seen.rows[f"decode.{one.branch}"] = seen.rows.get(f"decode.{one.branch}", 0) + 1
    core = outcome.seconds.get("decode", 0.0)
    for branch, wall in walls.items():  # core-seconds are known of all together: shared out as the clock saw them
        add = core * wall / (sum(walls.values()) or 1.0)
        seen.seconds[f"decode.{branch}"] = seen.seconds.get(f"decode.{branch}", 0.0) + add
    for span in outcome.spans:
        if ":" not in span.step:
            seen.seconds[span.step] = seen.seconds.get(span.step, 0.0) + span.end - span.start
            seen.rows[span.step] = seen.rows.get(span.step, 0) + span.rows


def _seconds(seen: _Seen, plan: Plan, cores: int) -> dict[str, float]:
    """Seconds of one sample: core-seconds of decoding over the cores, and what its segments took."""

    def each(name: str) -> float:
        return seen.seconds.get(name, 0.0) / max(seen.rows.get(name, 0), 1)

    found: dict[str, float] = {}
    for branch in plan.branches:
        decode = each(f"decode.{branch.name}") / max(cores, 1)
        segments = [segment for segment in plan.segments if segment.branch == branch.name]
        found[branch.name] = decode + sum(each(segment.name) for segment in segments)
        for stage, exit_ in enumerate(plan.exits):
            if exit_.name.startswith(f"{branch.name}.layer"):
                found[exit_.name] = decode + sum(each(segment.name) for segment in segments if segment.stage <= stage)
    heads = [segment.name for segment in plan.segments if segment.branch == HEAD]
    looks = sum(seen.rows.get(name, 0) for name in heads)
    found[HEAD] = sum(seen.seconds.get(name, 0.0) for name in heads) / max(looks, 1)
    return found


def _check(logits_NL: Tensor, probabilities_NL: Tensor) -> None:
    off = float((torch.softmax(logits_NL, dim=1) - probabilities_NL).abs().max())
    if not off <= _NEAR:
        raise ModelError(
            f"the head alone and the pipeline's last exit differ by {off:.3g} in a probability: calibrate needs a head "
            "that looks at embeddings and presence alone, and at each sample by itself"
        )
