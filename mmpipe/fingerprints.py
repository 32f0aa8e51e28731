"""What a result depends on, as hashes: `model` ⊂ `numerics` ⊂ `job`.

model     weights, preprocessing, labels, head, exit positions
numerics  model, type, backend, bucket and threads of every segment, library versions, processor features
job       numerics, thresholds, limits, input and its order, output schema
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from mmpipe.build import Built
from mmpipe.config import Config
from mmpipe.graphs.plan import Plan
from mmpipe.resolved import Resolved
from mmpipe.types import Sample

_PACKAGES = ("mmpipe", "torch", "torchvision", "transformers", "open_clip_torch", "numpy", "pillow", "soundfile")


def versions() -> dict[str, str]:
    """Versions of Python, of mmpipe, and of the packages that shape results, where they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def model_fingerprint(built: Built, plan: Plan) -> str:
    """Of the graph's tensors and operations, the preparation and the labels."""
    digest = hashlib.sha256()
    for name, tensor in sorted(built.graph.named_buffers(remove_duplicate=False)):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
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
        [resolved.device, resolved.dtype, resolved.backend, resolved.batch_size, resolved.threads],
        versions(),
        [platform.machine(), torch.backends.cpu.get_cpu_capability()],
    )
    ids = hashlib.sha256()
    for sample in samples:
        ids.update(_json([sample.id, {name: str(value) for name, value in sample.media.items()}]))
    job = _hash(
        numerics,
        list(built.thresholds),
        list(built.temperatures),
        built.confidence,
        config.fusion.model_dump(mode="json", include={"audit", "deliberate"}),
        config.input.model_dump(mode="json"),
        config.output.model_dump(mode="json", exclude={"folder", "thumbnails"}),
        ids.hexdigest(),
    )
    return {"model": model, "numerics": numerics, "job": job}


def _hash(*parts: Any) -> str:
    return hashlib.sha256(_json(parts)).hexdigest()[:32]


def _json(value: Any) -> bytes:
    def plain(other: Any) -> Any:
        return dict(other) if isinstance(other, Mapping) else str(other)

    return json.dumps(value, sort_keys=True, default=plain, ensure_ascii=True).encode("utf-8", "surrogatepass")
