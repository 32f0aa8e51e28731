"""The plans of one pipeline, bound to memory and streams: one for batches, one for single calls, made when first used.

The graph is cut anew when it was edited. Of each kind one executor is open at a time, so that no two pools are.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from mmpipe import media, number_types, resizing
from mmpipe.build import Built
from mmpipe.config import Config
from mmpipe.fusion import gate
from mmpipe.graphs.backends import OPERATION_BY_OPERATION, Target, lower
from mmpipe.graphs.cut import Cut, cut
from mmpipe.graphs.fuse import FusedGraph
from mmpipe.graphs.plan import Plan, Segment
from mmpipe.loading import give_back_freed_memory
from mmpipe.lowering import Lowering
from mmpipe.mapped import give_back
from mmpipe.observing import Observers
from mmpipe.parity import ROWS, Shift, compare, real_rows
from mmpipe.placing import resolve
from mmpipe.resolved import PLAIN, Kind, Resolved, placed
from mmpipe.runtime.device import Device
from mmpipe.runtime.executor import Executor, threads_of
from mmpipe.runtime.lanes import Watch
from mmpipe.runtime.ledger import Gate, Outcome
from mmpipe.runtime.measure import expected_seconds, leaving, seconds_a_bucket, seconds_to_exits
from mmpipe.tuned import Tuned, compiled_folder
from mmpipe.types import Sample

_MANY = 1_000_000


class Runners:
    """Cut, plans and executors of a graph. Not safe for several threads: the pipeline's lock is."""

    def __init__(self, config: Config, built: Built, device: Device) -> None:
        self.config, self.built, self.device = config, built, device
        self.graph: FusedGraph = built.graph
        self._as_built = self.graph.version
        self.observers = Observers()
        bound = built.calibration.binds_to if built.calibration else None
        self.lowering = Lowering(config, device, Tuned(), dict(built.shorter), bound)
        self.shift: Shift | None = None  # how far the lowered graph was from float32
        self.resizes = any(isinstance(one.prepare, resizing.Resized) for one in built.preparations.values())
        if self.resizes:
            resizing.take(compiled_folder())
        self._proved: set[Hashable] = set()  # what went through the parity gate
        self._cut: Cut | None = None
        self._version = -1
        self._resolved: dict[Kind, Resolved] = {}
        self._plans: dict[Kind, Plan] = {}
        self._executors: dict[Kind, Executor] = {}
        self._began = False  # a batch has run: its plan stays
        self._calls = 0  # single ones
        self._rows: dict[Kind, int] = {}  # of the job that each kind was decided for
        self._changing = built.calibration is None  # its exits hold for the backends that they were made with
        self._unproved_call = False  # single calls have another backend since
        self._call_before: Resolved | None = None  # what they had
        self._left: list[float] = []  # samples that each exit has answered so far

    @property
    def cut(self) -> Cut:
        """The graph as it is now, in segments."""
        if self._cut is None or self._version != self.graph.version:
            self._cut, self._version = cut(self.graph), self.graph.version
            self.forget_executors()
            self.lowering.forget()
            if self._version != self._as_built:  # edited: of the encoder as it was loaded nothing more can be made
                self.lowering.shorter.clear()
            self._plans.clear()
            self._proved.clear()
        return self._cut

    def resolved(self, kind: Kind = "batch", rows: int = 0) -> Resolved:
        """What every `auto` became, for this kind of run; decided once. `rows`: of the job that it is decided for."""
        if kind not in self._resolved:
            measure = self._answering if kind == "call" else self._throughput
            self._rows[kind] = rows or self._rows.get(kind, 0)  # decided anew, it is for the same job
            self._resolved[kind] = resolve(
                self.config,
                self.cut,
                self.device,
                kind,
                self.lowering,
                measure=measure,
                rows=self._rows[kind],
                alone=self._alone(),
            )
        return self._resolved[kind]

    def for_many(self) -> Resolved:
        """What a folder of very many samples would be run as: a process for each core, where that can be."""
        return resolve(self.config, self.cut, self.device, "batch", rows=_MANY)

    def _alone(self) -> str:
        """Why a job that begins now must be done in one process; "": it need not."""
        if self.observers.any():
            return "somebody observes what this process computes"
        if threading.current_thread() is not threading.main_thread():
            return "called on a thread that is not the main one, whose locks another process would find taken"
        return ""

    def called(self) -> None:
        """One more single call. They take the way without a compiler until so many have come that waiting for one would
        have been won back: from then on there may be as many again."""
        self._calls += 1
        way = self._resolved.get("call")
        if not self._changing or way is None or way.more_from is None or self._calls < way.more_from:
            return
        self._rows["call"], self._call_before = self._calls, way
        self._forget_call()
        self._unproved_call = True

    def _forget_call(self) -> None:
        self._forget_decision("call")
        if "call" in self._executors:
            self._executors.pop("call").close()

    def settle(self, samples: Sequence[Sample], limits: media.Limits) -> None:
        """Before the first batch: decide for a job of these samples, which may be worth measuring and compiling for,
        and make it ready."""
        if not self._began:
            self._forget_decision("batch")
            self._measure_types(samples, limits)
            resolved = self.resolved("batch", len(samples))
            if self.resizes:
                workers = resolved.processes * resolved.decode_workers
                resizing.settle(compiled_folder(), samples, limits, workers)
        self.prove("batch", samples, limits)
        if "batch" not in self._executors:
            self.lowering.forget_others(self.cut, self._resolved.values())
            give_back_freed_memory()  # of what was measured and not taken, and of the gate
        self.executor("batch", True)

    def _measure_types(self, samples: Sequence[Sample], limits: media.Limits) -> None:
        """In which number type small encoders are faster: once on a machine, by the first job that is long enough."""
        if len(samples) < number_types.LEAST_ROWS or not (small := self.lowering.undecided(self.cut)):
            return
        way = self.resolved("batch", len(samples))
        if len(samples) < number_types.LEAST_ROWS * way.processes * way.lanes:
            return
        real = real_rows(samples, self.built.preparations, limits)
        found = number_types.faster(self.cut.plan, small, way.threads, real)
        with contextlib.suppress(OSError):  # this job knows them in any case
            self.lowering.tuned.keep_dtypes(found)
        for kind in ("batch", "call"):
            self._forget_decision(kind)
        self.forget_executors()

    def prove(self, kind: Kind, samples: Sequence[Sample], limits: media.Limits) -> None:
        """Let what is lowered otherwise than eager float32 through the parity gate, on the first samples that come. An
        encoder that fails is decided on again, without."""
        if kind == "call" and self._unproved_call and samples:
            self._prove_call(samples, limits)
            return
        while samples and not self._ways(kind) <= self._proved:
            self.shift = self._shift(kind, real_rows(samples, self.built.preparations, limits))
            if self.shift.ok:
                self._proved |= self._ways(kind)
                return
            # one that turns without having been lowered (it makes NaN, say) has nothing to be refused
            turned = [branch for branch in self.shift.turned if branch not in self.lowering.refused]
            branches = turned or [s.branch for s in self._lowered_segments(kind)]
            self.lowering.refused.update(dict.fromkeys(branches, self.shift.why()))
            for one in ("batch", "call"):
                self._forget_decision(one)
            self.forget_executors()

    def _prove_call(self, samples: Sequence[Sample], limits: media.Limits) -> None:
        """The backend that single calls have changed to; where it fails they stay as they were, and batches too."""
        self._unproved_call = False
        if self._shift("call", real_rows(samples, self.built.preparations, limits)).ok:
            self._proved |= self._ways("call")
            return
        self._changing, self._rows["call"] = False, 0
        self._forget_call()
        if self._call_before is not None:
            self._resolved["call"] = self._call_before

    def _ways(self, kind: Kind) -> set[Hashable]:
        """What is lowered otherwise than eager float32: (segment, how, the bucket where that is built for one)."""
        names = {segment.name for segment in self.cut.plan.segments}  # first: an edit forgets what was proved
        way = self.resolved(kind)
        bucket = way.batch_size, way.threads
        return {
            (name, choice, () if choice.backend in OPERATION_BY_OPERATION else bucket)
            for name, choice in way.segments.items()
            if name in names
        }

    def _lowered_segments(self, kind: Kind) -> list[Segment]:
        return [self.cut.plan.segment(name) for name in self.resolved(kind).segments]

    def _shift(self, kind: Kind, real: Mapping[str, Sequence[Tensor]]) -> Shift:
        way, made = self.resolved(kind), self.cut
        any_rows = {c.backend for c in way.segments.values()}.issubset(OPERATION_BY_OPERATION)
        rows = min(way.batch_size, ROWS) if any_rows else way.batch_size
        placed_modules = {name: self.device.place(module) for name, module in made.modules.items()}
        plain = {s.name: lower("eager", s, placed_modules[s.name], Target(rows)) for s in made.plan.segments}
        lowered = {s.name: self.lowering.lower(made.plan, s, made.modules[s.name], way) for s in made.plan.segments}
        with threads_of(way.threads * way.processes):
            return compare(made.plan, plain, lowered, rows, real, self._gate(False), self.device.held)

    def _forget_decision(self, kind: Kind) -> None:
        self._resolved.pop(kind, None)
        self._plans.pop(kind, None)

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
            self.give_back_weights(kind)
        self._executors[kind].gate = self._gate(exits)
        return self._executors[kind]

    def give_back_weights(self, kind: Kind) -> None:
        """Where a segment computes with weights packed otherwise, or on a GPU, the graph's own need no memory: to be
        called when they have been read."""
        choices = self.resolved(kind).segments
        lowered = {s.name: choices.get(s.name, PLAIN) for s in self.cut.plan.segments}
        names = [
            name
            for name, choice in lowered.items()
            if self.device.kind != "cpu" or choice.dtype != "float32" or choice.backend not in OPERATION_BY_OPERATION
        ]
        modules = [self.cut.modules[name] for name in names]
        give_back(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))

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
        lowered = {s.name: self.lowering.lower(plan, s, modules[s.name], way) for s in plan.segments}
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
