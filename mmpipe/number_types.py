"""In which number type an encoder is faster that is too small for a rule: measured once, by a job that wins it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.fx import GraphModule

from mmpipe.graphs.backends import lower
from mmpipe.graphs.plan import Plan, Segment
from mmpipe.parity import MIN_COSINE, bucket
from mmpipe.resolved import PLAIN, Choice
from mmpipe.trying import Bench, Trial

LEAST_ROWS = 1_000  # of a job: a second or more, of which measuring takes a part
_SECONDS = 0.05  # for one way to be timed
_LEAST_S = 50e-6  # of a row: less is no matter
_GAIN = 1.3  # how much faster it has to be, so that another measurement would hardly say otherwise


def faster(
    plan: Plan,
    modules: Mapping[Segment, GraphModule],
    rows: int,
    threads: int,
    real: Mapping[str, Sequence[Tensor]],
) -> list[tuple[GraphModule, str]]:
    """Each segment's module with its type: bfloat16 where that is surely faster, and at parity over the `real` rows."""
    return [(module, _faster(plan, segment, module, rows, threads, real)) for segment, module in modules.items()]


def _faster(
    plan: Plan,
    segment: Segment,
    module: GraphModule,
    rows: int,
    threads: int,
    real: Mapping[str, Sequence[Tensor]],
) -> str:
    inputs, count = bucket(plan, segment, rows, real)
    bench = Bench(Trial.of(segment, module, inputs, count, threads, None, _SECONDS), lower)
    plain = bench.measured(PLAIN)
    if plain.why or plain.row_seconds < _LEAST_S:
        return PLAIN.dtype
    short = bench.measured(Choice(PLAIN.backend, "bfloat16"))
    pays = not short.why and short.cosine >= MIN_COSINE and plain.row_seconds >= _GAIN * short.row_seconds
    return "bfloat16" if pays else PLAIN.dtype
