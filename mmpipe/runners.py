"""The plans of one pipeline, bound to memory and streams: one for batches, one for single calls, made when first used.

The graph is cut anew when it was edited. Of each kind one executor is open at a time, so that no two pools are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from mmpipe.build import Built
from mmpipe.config import Config
from mmpipe.fusion import gate
from mmpipe.graphs.backends import lower
from mmpipe.graphs.cut import Cut, cut
from mmpipe.graphs.fuse import FusedGraph
from mmpipe.graphs.plan import Plan
from mmpipe.observing import Observers
from mmpipe.placing import Resolved, placed, resolve
from mmpipe.runtime.device import Device
from mmpipe.runtime.executor import Executor
from mmpipe.runtime.lanes import Watch
from mmpipe.runtime.ledger import Gate, Outcome
from mmpipe.runtime.measure import expected_seconds, seconds_to_exits

Kind = Literal["batch", "call"]


class Runners:
    """Cut, plans and executors of a graph. Not safe for several threads: the pipeline's lock is."""

    def __init__(self, config: Config, built: Built, device: Device) -> None:
        self.config, self.built, self.device = config, built, device
        self.graph: FusedGraph = built.graph
        self.observers = Observers()
        self._cut: Cut | None = None
        self._version = -1
        self._resolved: dict[Kind, Resolved] = {}
        self._plans: dict[Kind, Plan] = {}
        self._executors: dict[Kind, tuple[bool, Executor]] = {}
        self._left: list[float] = []  # samples that each exit has answered so far

    @property
    def cut(self) -> Cut:
        """The graph as it is now, in segments."""
        if self._cut is None or self._version != self.graph.version:
            self._cut, self._version = cut(self.graph), self.graph.version
            self.forget_executors()
            self._plans.clear()
        return self._cut

    def resolved(self, kind: Kind = "batch") -> Resolved:
        """What every `auto` became, for this kind of run; decided once."""
        if kind not in self._resolved:
            measure = self._measured if kind == "call" else None
            self._resolved[kind] = resolve(self.config, self.cut, self.device, measure=measure)
        return self._resolved[kind]

    def plan(self, kind: Kind = "batch") -> Plan:
        made = self.cut
        if kind not in self._plans:
            self._plans[kind] = placed(made.plan, self.resolved(kind))
        return self._plans[kind]

    def executor(self, kind: Kind, exits: bool) -> Executor:
        """`exits` False: no sample leaves before the last stage."""
        plan = self.plan(kind)
        if kind in self._executors and self._executors[kind][0] != exits:
            self._executors.pop(kind)[1].close()
        if kind not in self._executors:
            watches, modules = self.observers.watches(self.graph, self.cut)
            made = self._bound(plan, modules, self.resolved(kind).threads, self._gate(exits), watches)
            self._executors[kind] = exits, made
        return self._executors[kind][1]

    def count(self, outcome: Outcome) -> None:
        """Remember where samples left: the rates decide what is fast."""
        exits = len(self.plan().exits)
        self._left = self._left if len(self._left) == exits else [0.0] * exits
        for index in range(exits):
            self._left[index] += float((outcome.exit_N == index).sum())

    def forget_executors(self) -> None:
        for _, executor in self._executors.values():
            executor.close()
        self._executors.clear()

    def close(self) -> None:
        self.forget_executors()
        self._plans.clear()
        self._cut, self._version = None, -1

    def _measured(self, plan: Plan, threads: int) -> float:
        """Seconds that a plan takes to answer one bucket, at the rates at which samples have left so far."""
        with contextlib.closing(self._bound(plan, self.cut.modules, threads, self._gate(False))) as executor:
            return expected_seconds(seconds_to_exits(executor), self._left or None)

    def _bound(
        self,
        plan: Plan,
        modules: Mapping[str, GraphModule],
        threads: int,
        gate: Gate | None,
        watches: Mapping[str, Watch] | None = None,
    ) -> Executor:
        backend, place = self.resolved().backend, self.device.place
        lowered = {s.name: lower(backend, s, place(modules[s.name])) for s in plan.segments}
        return Executor(plan, lowered, threads=threads, gate=gate, device=self.device, watches=watches)

    def _gate(self, exits: bool) -> Gate | None:
        if not self.cut.plan.exits:
            return None
        kind, thresholds, temperatures = self.built.confidence, self.built.thresholds, self.built.temperatures

        def decide(exit_index: int, logits_RL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            probabilities_RL = gate.probabilities(logits_RL, temperatures[exit_index])
            confidence_R = gate.confidence(probabilities_RL, kind)
            if exit_index == len(thresholds):
                return probabilities_RL, confidence_R, torch.isfinite(confidence_R)
            leaves_R = gate.leaves(confidence_R, thresholds[exit_index])
            return probabilities_RL, confidence_R, leaves_R if exits else torch.zeros_like(leaves_R)

        return decide
