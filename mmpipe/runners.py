"""The plans of one pipeline, bound to memory and streams: one for batches, one for single calls, made when first used.

The graph is cut anew when it was edited. Of each kind one executor is open at a time, so that no two pools are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule

from mmpipe.build import Built
from mmpipe.config import Config
from mmpipe.fusion import gate
from mmpipe.graphs.backends import Target, lower
from mmpipe.graphs.cut import Cut, cut
from mmpipe.graphs.fuse import FusedGraph
from mmpipe.graphs.plan import Plan
from mmpipe.observing import Observers
from mmpipe.placing import resolve
from mmpipe.resolved import Kind, Resolved, placed
from mmpipe.runtime.device import Device
from mmpipe.runtime.executor import Executor
from mmpipe.runtime.lanes import Watch
from mmpipe.runtime.ledger import Gate, Outcome
from mmpipe.runtime.measure import expected_seconds, leaving, seconds_a_bucket, seconds_to_exits


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
        self._executors: dict[Kind, Executor] = {}
        self._began = False  # a batch has run: its plan stays
        self._left: list[float] = []  # samples that each exit has answered so far

    @property
    def cut(self) -> Cut:
        """The graph as it is now, in segments."""
        if self._cut is None or self._version != self.graph.version:
            self._cut, self._version = cut(self.graph), self.graph.version
            self.forget_executors()
            self._plans.clear()
        return self._cut

    def resolved(self, kind: Kind = "batch", rows: int = 0) -> Resolved:
        """What every `auto` became, for this kind of run; decided once. `rows`: of the job that it is decided for."""
        if kind not in self._resolved:
            measure = self._answering if kind == "call" else self._throughput
            self._resolved[kind] = resolve(self.config, self.cut, self.device, kind, measure=measure, rows=rows)
        return self._resolved[kind]

    def settle(self, rows: int) -> None:
        """Before the first batch: decide for a job of so many rows, which may be worth measuring for."""
        if not self._began:
            self._resolved.pop("batch", None)
            self._plans.pop("batch", None)
            self.resolved("batch", rows)

    def plan(self, kind: Kind = "batch") -> Plan:
        made = self.cut
        if kind not in self._plans:
            self._plans[kind] = placed(made.plan, self.resolved(kind))
        return self._plans[kind]

    def executor(self, kind: Kind, exits: bool) -> Executor:
        """`exits` False: no sample leaves before the last stage. The same pool and streams run both ways."""
        plan = self.plan(kind)
        self._began |= kind == "batch"
        if kind not in self._executors:
            watches, modules = self.observers.watches(self.graph, self.cut)
            self._executors[kind] = self._bound(plan, modules, self.resolved(kind), None, watches)
        self._executors[kind].gate = self._gate(exits)
        return self._executors[kind]

    def count(self, outcome: Outcome) -> None:
        """Remember where samples left: the rates decide what is fast."""
        exits = len(self.plan().exits)
        self._left = self._left if len(self._left) == exits else [0.0] * exits
        for index in range(exits):
            self._left[index] += float((outcome.exit_N == index).sum())

    def forget_executors(self) -> None:
        for executor in self._executors.values():
            executor.close()
        self._executors.clear()

    def close(self) -> None:
        self.forget_executors()
        self._plans.clear()
        self._cut, self._version = None, -1

    def _answering(self, way: Resolved) -> float:
        """Seconds in which a way answers one bucket, at the rates at which samples have left so far."""
        plan = placed(self.cut.plan, way)
        with contextlib.closing(self._bound(plan, self.cut.modules, way, self._gate(False))) as executor:
            return expected_seconds(seconds_to_exits(executor), self._left or None)

    def _throughput(self, way: Resolved) -> float:
        """Seconds a bucket when there are many, at these rates."""
        plan = placed(self.cut.plan, way)
        gate = leaving(self._left or None, len(plan.exits)) if plan.exits else None
        with contextlib.closing(self._bound(plan, self.cut.modules, way, gate)) as executor:
            return seconds_a_bucket(executor)

    def _bound(
        self,
        plan: Plan,
        modules: Mapping[str, GraphModule],
        way: Resolved,
        gate: Gate | None,
        watches: Mapping[str, Watch] | None = None,
    ) -> Executor:
        place = self.device.place
        target = Target(way.batch_size, threads=way.threads)
        lowered = {s.name: lower(way.backend, s, place(modules[s.name]), target) for s in plan.segments}
        return Executor(plan, lowered, threads=way.threads, gate=gate, device=self.device, watches=watches)

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
