"""Segments of real architectures with media for them, and what every backend is held to."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mmpipe import Pipeline
from mmpipe.graphs.backends import Lowered, Target, examples_of, kernels, lower
from mmpipe.graphs.cut import cut
from mmpipe.graphs.plan import PRESENCE, Segment
from support import hub

ROWS = 8
RATE_HZ = 16000
TOLERANCE = 1e-5  # of the largest magnitude, in float32
native_here = pytest.mark.skipif(
    bool(kernels.why_not()) or shutil.which("g++") is None, reason=kernels.why_not() or "needs GCC"
)
tiles_here = pytest.mark.skipif(
    "attention.cpp" not in kernels.sources() or shutil.which("g++") is None, reason="needs AMX, and GCC"
)


@dataclass(frozen=True)
class Case:
    """A segment, and ROWS rows of its inputs and reads."""

    segment: Segment
    module: fx.GraphModule
    inputs: tuple[Tensor, ...]

    def eager(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return lower("eager", self.segment, self.module, Target(ROWS))(*(inputs or self.inputs))


def family(models: hub.Models, name: str) -> Case:
    """One encoder as it is in a pipeline, with media of every length: the texts are padded, one of them but for two."""
    modality, section = hub.FAMILIES[name], hub.section(models, name)
    media = {
        "image": hub.pictures(ROWS),
        "text": hub.texts(ROWS),
        "audio": [(sound, RATE_HZ) for sound in hub.sounds(ROWS, RATE_HZ, 2.0)],
    }[modality]
    with Pipeline.load({"task": "embed", "encoders": {modality: section}}) as pipeline:
        made = cut(pipeline.graph)
        rows = hub.batch(pipeline.built.preparations[modality], media)
        (segment,) = (one for one in made.plan.segments if one.branch == modality)
    inputs = tuple(rows[name.partition(".")[2]] for name in segment.inputs)
    return Case(segment, made.modules[segment.name], inputs)


def packaged(config: str | Mapping[str, Any]) -> dict[str, Case]:
    """Every segment of a configuration, with noise for them, half the tokens masked, and every mix of modalities."""
    with Pipeline.load(config) as pipeline:
        made = cut(pipeline.graph)
    cases = {}
    for segment in made.plan.segments:
        inputs = dict(zip([*segment.inputs, *segment.reads], examples_of(made.plan, segment, ROWS), strict=True))
        for name, tensor in inputs.items():
            if name == PRESENCE:
                bits = torch.arange(1, ROWS + 1)[:, None] >> torch.arange(tensor.shape[1])
                inputs[name] = bits % 2 == 1
            elif "mask" in name:
                tensor[:, tensor.shape[1] // 2 :] = 0
        cases[segment.name] = Case(segment, made.modules[segment.name], tuple(inputs.values()))
    return cases


def error(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest of all outputs, against each one's largest magnitude."""
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in wanted]
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in wanted]
    return max(
        float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-30))
        for one, other in zip(found, wanted, strict=True)
    )


def permuted_alike(run: Lowered, case: Case) -> bool:
    """Whether rows in another order, and with other neighbours, have the same bits."""
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    first = [tensor.clone() for tensor in run(*case.inputs)]
    moved = [tensor.clone() for tensor in run(*(given[order].contiguous() for given in case.inputs))]
    alone = run(*(given[:1].expand_as(given).contiguous() for given in case.inputs))
    return all(
        torch.equal(one[order], other) and torch.equal(one[0], same[-1])
        for one, other, same in zip(first, moved, alone, strict=True)
    )


def case_of(module: nn.Module, *inputs: Tensor) -> Case:
    """Any module that torch.fx can trace, as a segment."""
    segment = Segment("image@0", 0, "image", (), (), (), 1)
    return Case(segment, fx.symbolic_trace(module), inputs)


class Small(nn.Module):
    """One product: what is quick to compile."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.relu(self.inner(x)),)


def small(seed: int = 0) -> Case:
    return case_of(Small(seed), torch.randn(4, 6))
