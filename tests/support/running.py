"""The parts, cut, scheduled and bound: an executor to run, and a feed for it."""

from __future__ import annotations

from collections import deque

import torch

from mmpipe.errors import MediaError
from mmpipe.fusion import gate
from mmpipe.graphs.backends import Target, lower
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
        self.rows, self.broken, self.asked, self.closed = rows, set(broken), [], False

    def open(self, branch, media):
        return Source(self, branch, media)

    def computing(self):
        pass

    def close(self):
        self.closed = True


class Source:
    def __init__(self, feed, branch, media):
        self.feed, self.branch, self.media, self.waiting = feed, branch, media, deque()

    def put(self, rows):
        self.waiting.extend(rows)

    def ready(self):
        return bool(self.waiting) and self.media.has_free()

    def get(self):
        row = self.waiting.popleft()
        self.feed.asked.append((row, self.branch))
        if (row, self.branch) in self.feed.broken:
            return MediaError(self.branch, "truncated", "ends early")
        slot = self.media.take()
        self.media.fill(slot, {name: self.feed.rows[f"{self.branch}.{name}"][row] for name in self.media.tables})
        return slot

    def unstarted(self):
        return len(self.waiting)

    def drop(self):
        self.waiting.clear()


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
    lowered = {s.name: lower("eager", s, place_module(made.modules[s.name]), Target(1)) for s in made.plan.segments}
    plan = place(made.plan, rows=rows, **{"layout": "one", "slots": 64, **placed})
    return Executor(plan, lowered, threads=1, gate=decide, device=device, watches=watches), graph


def subset(rows, keep):
    return {name: tensor[keep] for name, tensor in rows.items()}
