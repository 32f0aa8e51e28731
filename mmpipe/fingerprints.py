"""What a result depends on, as hashes: `model` ⊂ `numerics` ⊂ `job`.

model     weights, preprocessing, labels, head, exit positions
numerics  model, type, backend, bucket and threads of every segment, library versions, processor features
job       numerics, thresholds, limits, input and its order, output schema

`forms` is an encoder's part of numerics, alone: what its cached embeddings are kept under.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import fx

from mmpipe.build import Built
from mmpipe.cache import Form
from mmpipe.calibrated import no_second_look
from mmpipe.config import Config
from mmpipe.graphs.digest import digest as digest_of
from mmpipe.graphs.digest import of_tensors
from mmpipe.graphs.plan import Plan
from mmpipe.machine import processor, versions
from mmpipe.media import Limits
from mmpipe.resolved import PLAIN, Resolved
from mmpipe.runtime.device import device_name
from mmpipe.types import Sample


def model_fingerprint(built: Built, plan: Plan) -> str:
    """Of the graph's tensors and operations, the preparation and the labels."""
    digest = hashlib.sha256()
    tensors = dict(sorted(built.graph.named_buffers(remove_duplicate=False)))
    for name, told in zip(tensors, of_tensors(list(tensors.values())), strict=True):
        digest.update(f"{name} {told}".encode())
    digest.update(built.graph.code.encode())
    digest.update(_json({name: p.settings for name, p in built.preparations.items()}))
    digest.update(_json([list(built.labels), [exit_.name for exit_ in plan.exits]]))
    return digest.hexdigest()[:32]


def fingerprints(
    config: Config, built: Built, resolved: Resolved, plan: Plan, samples: Sequence[Sample]
) -> dict[str, str]:
    """All three, for one job."""
    model = model_fingerprint(built, plan)
    numerics = _hash(
        model,
        [_device(resolved), resolved.batch_size, resolved.threads],
        {name: asdict(choice) for name, choice in resolved.segments.items()},
        versions(),
        processor(),
    )
    decided = config.fusion.model_dump(mode="json", include={"audit", "deliberate"})
    if no_second_look(config, built.calibration):
        decided["deliberate"] = None
    ids = hashlib.sha256()
    for sample in samples:
        ids.update(_json([sample.id, {name: str(value) for name, value in sample.media.items()}]))
    job = _hash(
        numerics,
        list(built.thresholds),
        list(built.temperatures),
        built.confidence,
        decided,
        config.input.model_dump(mode="json"),
        config.output.model_dump(mode="json", exclude={"folder", "thumbnails"}),
        ids.hexdigest(),
    )
    return {"model": model, "numerics": numerics, "job": job}


def forms(
    built: Built, resolved: Resolved, plan: Plan, modules: Mapping[str, fx.GraphModule], limits: Limits
) -> dict[str, Form]:
    """Branch that the plan restores → what its embeddings depend on besides the medium."""
    found = {}
    for branch in plan.restores:
        segment, preparation = plan.feeder(branch), built.preparations[branch]
        value = plan.value(plan.embedding(branch))
        digest = _hash(
            [digest_of(modules[segment.name]).hex(), value.shape, str(value.dtype)],
            [preparation.settings, preparation.decoded_seconds, asdict(limits)],
            [_device(resolved), resolved.batch_size, resolved.threads],
            asdict(resolved.segments.get(segment.name, PLAIN)),
            [torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()],
            versions(),
            processor(),
        )
        found[branch] = Form(digest.encode(), value.shape, value.dtype)
    return found


def _device(resolved: Resolved) -> str:
    """ "cpu", whose kind is told elsewhere; a GPU by its kind, whatever its number."""
    return "cpu" if resolved.device == "cpu" else device_name(resolved.device)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(_json(parts)).hexdigest()[:32]


def _json(value: Any) -> bytes:
    def plain(other: Any) -> Any:
        return dict(other) if isinstance(other, Mapping) else str(other)

    return json.dumps(value, sort_keys=True, default=plain, ensure_ascii=True).encode("utf-8", "surrogatepass")
