"""Samples → embeddings: every encoder runs once, as one graph, on what a sample has.

Shapes: N sample, M modality, D embedding or pooled state.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpipe.config import Config
from mmpipe.errors import InputError
from mmpipe.fusion.items import Items
from mmpipe.jobs.progress import Progress
from mmpipe.pipeline import Pipeline
from mmpipe.runtime.ledger import Outcome
from mmpipe.types import Prediction, Sample

_SHARD = 1024  # samples: many buckets, of which only the last one of each encoder is padded


@dataclass(frozen=True)
class Embedded:
    """The labelled samples of which anything could be used."""

    items: Items
    states: Mapping[str, Tensor]  # "image.layer4" → float32 [N, D], pooled by the graph; zeros where absent
    dims: Mapping[str, int]
    failed: Mapping[str, int]  # modality → media that could not be used
    unusable: int  # labelled samples of which nothing was left
    seconds: float


def embed(config: Config, samples: Sequence[Sample], labels_N: Tensor, progress: Progress) -> Embedded:
    """Run the encoders over `samples`, whose labels are `labels_N`, in order.

    What can't be read, or whose embedding is not finite, is absent. Raises InputError where nothing could be used;
    ConfigError, ModelError.
    """
    with Pipeline(config, say=progress.say, encoders_only=True) as pipeline:
        pipeline.settle(
            samples
        )  # as `mmpipe run` would over so many: what it keeps, this finds, and the other way round
        dims = {name: preparation.dim for name, preparation in pipeline.built.preparations.items()}
        began = time.perf_counter()
        found: dict[str, list[Tensor]] = {}
        present: list[Tensor] = []
        offered_M, names = torch.zeros(len(dims), dtype=torch.long), (*dims, *_states(pipeline))

        def keep(shard: Sequence[Sample], predictions: list[Prediction], outcome: Outcome) -> None:
            nonlocal offered_M
            for name in names:
                value = outcome.embeddings.get(name)
                found.setdefault(name, []).append(torch.empty(0) if value is None else value.to(torch.float32))
            present.append(outcome.present_NM)
            offered_M += torch.tensor([sum(s.media.get(name) is not None for s in shard) for name in dims])

        progress.start(len(samples), "embedding")
        try:
            pipeline.run_shards(
                [samples[start : start + _SHARD] for start in range(0, len(samples), _SHARD)],
                keep,
                exits=False,
                embeddings=False,
                answered=progress.advance,
            )
        finally:
            progress.finish()
        seconds = time.perf_counter() - began
    tables = {name: _joined(parts, present) for name, parts in found.items()}
    present_NM = torch.cat(present)
    for column, name in enumerate(dims):
        mine = [key for key in tables if key.partition(".")[0] == name]
        finite_N = torch.stack([torch.isfinite(tables[key]).all(dim=1) for key in mine]).all(dim=0)
        present_NM[:, column] &= finite_N
        for key in mine:
            tables[key] = torch.where(present_NM[:, column : column + 1], tables[key], torch.zeros(()))
    lost_M = offered_M - present_NM.sum(dim=0)
    usable = torch.nonzero(present_NM.any(dim=1)).squeeze(1)
    if len(usable) == 0:
        raise InputError(f"of {len(samples):,} labelled samples none could be embedded: `mmpipe predict` says why")
    items = Items({name: _wide(tables[name], dim) for name, dim in dims.items()}, present_NM, labels_N).rows(usable)
    return Embedded(
        items=items,
        states={name: table[usable] for name, table in tables.items() if name not in dims},
        dims=dims,
        failed={name: int(lost) for name, lost in zip(dims, lost_M.tolist(), strict=True) if lost},
        unusable=len(samples) - len(usable),
        seconds=seconds,
    )


def _states(pipeline: Pipeline) -> list[str]:
    return [name for name, _ in pipeline.plan.embeddings if ".layer" in name]


def _joined(parts: Sequence[Tensor], present: Sequence[Tensor]) -> Tensor:
    """[N, D]; where a chunk had none of a modality, zeros in its place."""
    width = max((part.shape[1] for part in parts if part.ndim == 2), default=0)
    whole = [
        part if part.ndim == 2 else torch.zeros(len(rows), width) for part, rows in zip(parts, present, strict=True)
    ]
    return torch.cat(whole)


def _wide(table_ND: Tensor, dim: int) -> Tensor:
    return table_ND if table_ND.shape[1] == dim else torch.zeros(len(table_ND), dim)
