"""The parity gate: what was lowered or cast is compared with eager float32 before it is used.

Both run the whole graph on the same few real samples. An encoder whose embeddings turn further than MIN_COSINE allows,
or with which an answer changes that was no tie, or a confidence moves further than MAX_SHIFT, is not used lowered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpipe import media
from mmpipe.build import Preparation
from mmpipe.errors import MmpipeError
from mmpipe.graphs.backends import Lowered, examples_of
from mmpipe.graphs.plan import PRESENCE, Plan, Segment
from mmpipe.preparing import prepared
from mmpipe.types import Sample

ROWS = 4  # real samples compared; the rest of a bucket repeats them
TRIED = 16  # samples of which these are taken: some can't be read
MIN_COSINE = 0.999
MAX_SHIFT = 0.05  # of any exit's confidence
TIE = 0.1  # between the two likeliest labels, in float32: below it either is right

Decide = Callable[[int, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Shift:
    """How far the lowered graph's results are from float32's, the worst over the rows."""

    cosine: Mapping[str, float]  # branch → the least, between embeddings
    confidence: float  # the largest change
    flipped: int  # answers that changed and were no tie
    rows: int

    @property
    def turned(self) -> list[str]:
        """Branches whose embeddings turn too far; NaN is too far."""
        return [branch for branch, least in self.cosine.items() if not least >= MIN_COSINE]

    @property
    def ok(self) -> bool:
        return not self.turned and self.confidence <= MAX_SHIFT and not self.flipped

    def why(self) -> str:
        """What is wrong, for people."""
        if self.turned:
            return ", ".join(f"cosine {self.cosine[b]:.4f} to float32, {MIN_COSINE} is asked for" for b in self.turned)
        if self.flipped:
            return f"{self.flipped} of {self.rows} answers change"
        return f"confidence moves by {self.confidence:.3f}, {MAX_SHIFT} is allowed"


def real_rows(
    samples: Sequence[Sample], preparations: Mapping[str, Preparation], limits: media.Limits
) -> dict[str, list[Tensor]]:
    """The first samples' media, decoded and prepared: "image.pixels" → up to ROWS rows. What can't be read is left
    out."""
    found: dict[str, list[Tensor]] = {}
    for branch, preparation in preparations.items():
        count = 0
        for sample in samples[:TRIED]:
            source = sample.media.get(branch)
            if source is None or count == ROWS:
                continue
            try:
                rows = prepared(branch, source, preparation, limits)
            except MmpipeError:  # the run itself tells of it
                continue
            for name, tensor in rows.items():
                found.setdefault(f"{branch}.{name}", []).append(tensor)
            count += 1
    return found


def compare(
    plan: Plan,
    plain: Mapping[str, Lowered],
    lowered: Mapping[str, Lowered],
    rows: int,
    real: Mapping[str, Sequence[Tensor]],
    decide: Decide | None,
    held: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Shift:
    """Both ways over one bucket of `rows` rows. Inputs of which `real` has none are made up.

    `decide`: the gate: exit index, logits → probabilities, confidence, leaves. `held`: a tensor where both compute.
    """
    known = {name: held(value) for name, value in _inputs(plan, rows, real).items()}
    with torch.inference_mode():
        wanted, got = _walk(plan, plain, known), _walk(plan, lowered, known)
        cosine = {}
        for branch, name in plan.embeddings:
            one, other = wanted[name].float().flatten(1), got[name].float().flatten(1)
            cosine[branch] = float(torch.nn.functional.cosine_similarity(one, other, dim=1).min())
        confidence, flipped = 0.0, 0
        for number, exit_ in enumerate(plan.exits if decide is not None else ()):
            assert decide is not None
            one_RL, sure_R, _ = decide(number, wanted[exit_.value].cpu())
            other_RL, shifted_R, _ = decide(number, got[exit_.value].cpu())
            moved = float((sure_R - shifted_R).abs().max())
            confidence = max(confidence, moved) if moved == moved else float("inf")
            top_R2 = one_RL.topk(min(2, one_RL.shape[1]), dim=1).values
            clear_R = top_R2[:, 0] - top_R2[:, -1] > TIE
            flipped = max(flipped, int((clear_R & (one_RL.argmax(1) != other_RL.argmax(1))).sum()))
    return Shift(cosine, confidence, flipped, rows)


def bucket(plan: Plan, segment: Segment, rows: int, real: Mapping[str, Sequence[Tensor]]) -> tuple[list[Tensor], int]:
    """One segment's inputs, and what it reads: the samples' own rows, repeated; made up where there are none. And how
    many are real: all, where none is."""
    names = (*segment.inputs, *segment.reads)
    found, count = list(examples_of(plan, segment, rows)), rows
    for place, (name, example) in enumerate(zip(names, tuple(found), strict=True)):
        given = [row for row in real.get(name, ()) if row.shape == example.shape[1:] and row.dtype == example.dtype]
        if given and name != PRESENCE:
            found[place] = torch.stack([given[n % len(given)] for n in range(rows)])
            count = min(rows, len(given))
    return found, count


def _inputs(plan: Plan, rows: int, real: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    known: dict[str, Tensor] = {}
    for segment in plan.segments:
        found, _ = bucket(plan, segment, rows, real)
        known |= dict(zip(segment.inputs, found[: len(segment.inputs)], strict=True))
    return known | {PRESENCE: torch.ones(rows, len(plan.branches), dtype=torch.bool)}


def _walk(plan: Plan, lowered: Mapping[str, Lowered], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every value, from one segment to the next."""
    values = dict(known)
    for segment in plan.segments:
        results = lowered[segment.name](*[values[name] for name in (*segment.inputs, *segment.reads)])
        values.update({name: result.clone() for name, result in zip(segment.writes, results, strict=True)})
    return values
