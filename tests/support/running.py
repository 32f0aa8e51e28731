"""The parts, cut, scheduled and bound: an executor to run, and a feed for it."""

from __future__ import annotations

import torch

from mmpipe.errors import MediaError
from mmpipe.fusion import gate
from mmpipe.graphs.backends import lower
from mmpipe.graphs.cut import cut
from mmpipe.graphs.fuse import ExitSpec, Probe
from mmpipe.graphs.passes import optimise
from mmpipe.graphs.schedule import place
from mmpipe.runtime.executor import Executor
from support.parts import LABELS, ORDER, PARTS, fused

MODALITY_EXITS = [ExitSpec("image", ("image",)), ExitSpec("image+text", ("image", "text"))]
torch.manual_seed(5)
DEPTH_EXITS = [
    ExitSpec("image.layer1", ("image",), probe=Probe("image", 1, torch.randn(LABELS, 16), torch.zeros(LABELS))),
    ExitSpec("image", ("image",)),
    ExitSpec("head.layer1", ORDER, depth=1),
]


class Rows:
    """A feed from tensors, which remembers what it was asked for; `broken` (row, modality) fail to open."""

    def __init__(self, rows, broken=()):
        self.rows, self.broken, self.asked = rows, set(broken), []

    def __call__(self, branch, rows, media):
        for row in rows:
            self.asked.append((row, branch))
            if (row, branch) in self.broken:
                yield MediaError(branch, "truncated", "ends early")
            else:
                slot = media.take()
                media.fill(slot, {name: self.rows[f"{branch}.{name}"][row] for name in media.tables})
                yield slot


def executor(specs, thresholds, *, rows=8, device=None, watches=None, **placed):
    graph = fused(PARTS, specs)
    optimise(graph)
    made = cut(graph)

    def decide(index, logits):
        probabilities = gate.probabilities(logits)
        confidence = gate.confidence(probabilities)
        last = index == len(thresholds)
        leaves = torch.isfinite(confidence) if last else gate.leaves(confidence, thresholds[index])
        return probabilities, confidence, leaves

    place_module = (lambda module: module) if device is None else device.place
    lowered = {s.name: lower("eager", s, place_module(made.modules[s.name])) for s in made.plan.segments}
    plan = place(made.plan, rows=rows, **{"layout": "one", "slots": 64, **placed})
    return Executor(plan, lowered, threads=1, gate=decide, device=device, watches=watches), graph


def subset(rows, keep):
    return {name: tensor[keep] for name, tensor in rows.items()}
