"""Which backend and number type each segment gets on this machine, and why; and the lowered segments, kept.

    runtime.dtype    as configured; auto: what a calibration has; else, where the device multiplies it faster, bfloat16
                     for large encoders, and for small ones where that was measured (`mmpipe.number_types`)
    runtime.backend  as configured; auto: what `mmpipe autotune` found fastest for a segment; where nothing was, or that
                     can't be had any more, native if this machine has it, else eager

Heads stay float32 and eager: they cost little, and confidence is made there. An encoder whose short twin fails the
parity gate (`mmpipe.parity`) stays float32 and eager too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.fx import GraphModule

from mmpipe.calibrated import BindsTo
from mmpipe.capturing import Shorter
from mmpipe.config import Config
from mmpipe.graphs import cost
from mmpipe.graphs.backends import OPERATION_BY_OPERATION, Lowered, Target, Unlowerable, examples_of, kernels, lower
from mmpipe.graphs.backends.native import saved_seconds
from mmpipe.graphs.cut import Cut, cut
from mmpipe.graphs.fuse import fuse
from mmpipe.graphs.lengths import ByLength, in_order, lengths_of, rows_at, share_with
from mmpipe.graphs.passes import optimise
from mmpipe.graphs.plan import HEAD, GraphError, Plan, Segment
from mmpipe.graphs.precision import sharing
from mmpipe.resolved import PLAIN, Choice, Resolved
from mmpipe.runtime.device import Device
from mmpipe.tuned import WON_BACK, Tuned, compiled_folder

# Below it an encoder is mostly calls and copies: a shorter type brings little, and its rounding is felt as much.
LARGE_NUMBERS = 5_000_000
TOKENS_FOR_LENGTHS = 65_536  # of a job's texts, padded: a text encoder is captured for several lengths meanwhile
_FORKS_BRING = 1.1  # a process for each core, against one of as many threads: where it was not measured
_GAIN = 1.3  # how much faster a product has to be
# Of a row, by native code: Python has to call it, and a segment without any runs without Python (interpreted.py).
_LEAST_SAVED_S = 30e-6


@dataclass(frozen=True)
class Chosen:
    """For one bucket size and number of threads: what each segment is lowered to, and what to tell of it."""

    segments: Mapping[str, Choice]  # otherwise than eager float32
    dtype: str
    backend: str
    reasons: Mapping[str, str]
    more_from: int | None  # rows of a job for which a compiler would be waited for that isn't here; None: no number


@dataclass
class Lowering:
    """Chooses and lowers for one pipeline. Not safe for several threads: the pipeline's lock is."""

    config: Config
    device: Device
    tuned: Tuned
    shorter: dict[str, Shorter] = field(default_factory=dict)  # branches that may be computed at a text's length
    bound: BindsTo | None = None  # what a calibration's exits hold for, which `auto` then is; None: there is none
    refused: dict[str, str] = field(default_factory=dict)  # branch → why it stays float32 and eager
    _lengths: dict[int, Mapping[int, Cut]] = field(default_factory=dict)  # id of a module → by length
    _kept: dict[tuple[object, ...], tuple[GraphModule, Lowered]] = field(default_factory=dict)

    def choose(self, made: Cut, rows: int, threads: int, job_rows: int = 0, *, forked: bool = False) -> Chosen:
        """`job_rows`: of the job that is about to begin; a compiler is waited for only where that is won back.
        `forked`: for processes, in which what was tuned to be a compiler's, with threads of its own, can't run."""
        segments: dict[str, Choice] = {}
        told: list[str] = []
        at_lengths: list[str] = []
        waiting: list[int] = []
        for segment in made.plan.segments:
            choice, why, pays_from = self._one(made, segment, rows, threads, job_rows, forked)
            choice = self._by_length(made, segment, choice, job_rows)
            if pays_from is not None:
                waiting.append(pays_from)
            if choice != PLAIN:
                segments[segment.name] = choice
            if choice.lengths:
                at_lengths.append(f"{segment.name}: texts padded to {', '.join(map(str, choice.lengths))} as they need")
            if why and why not in told:
                told.append(why)
        dtypes = {choice.dtype for choice in segments.values()} - {"float32"}
        backends = {choice.backend for choice in segments.values()} - {"eager"}
        refused = [f"{branch} stays float32: {why}" for branch, why in self.refused.items()]
        dtype_why = "; ".join([self._why_dtype(bool(dtypes)), *refused])
        return Chosen(
            segments,
            dtype="+".join(sorted(dtypes)) or "float32",
            backend="+".join(sorted(backends)) or "eager",
            reasons={"dtype": dtype_why, "backend": "; ".join([*(told or [self._why_backend()]), *at_lengths])},
            more_from=min(waiting, default=None),
        )

    def quicker_forked(self, made: Cut, whole: Resolved, rows: int, count: int) -> bool:
        """Whether `count` processes of one thread, with buckets of `rows` and no compiler, are faster than one process
        as `whole` with what was tuned: by what was measured."""
        one = several = 0.0
        lanes = whole.lanes if whole.streams == "lanes" else 1  # that compute side by side
        for segment in made.plan.segments:
            if segment.branch == HEAD:
                continue
            module = made.modules[segment.name]
            tuned = self.tuned.best(module, whole.batch_size, whole.threads)
            apart = self.tuned.best(module, rows, 1)
            if tuned is None:
                return False
            one += tuned.row_seconds / lanes
            alike = tuned.plain_row_seconds / lanes / _FORKS_BRING
            several += alike if apart is None else apart.plain_row_seconds / count
        return several <= one

    def copied_bytes(self, made: Cut) -> int:
        """What lowered segments hold beside the graph's own weights, which stay for parity and for edits: packed copies
        in a shorter type, or a compiler's own."""
        total = 0
        for segment in made.plan.segments:
            if segment.branch == HEAD or segment.branch in self.refused:
                continue
            whole = cost.weight_bytes([made.modules[segment.name]])
            if self.config.runtime.backend not in ("auto", *OPERATION_BY_OPERATION):
                total += whole
            elif self._eager(made, segment.branch).dtype != "float32":
                total += whole // 2
        return total

    def give_up_copies(self, made: Cut) -> bool:
        """Where nothing fits with packed copies and nobody asked for them: float32 for all. False: there are none."""
        if self.config.runtime.dtype != "auto" or self.config.runtime.backend not in ("auto", *OPERATION_BY_OPERATION):
            return False
        if not self.copied_bytes(made):
            return False
        branches = (segment.branch for segment in made.plan.segments if segment.branch != HEAD)
        self.refused.update(dict.fromkeys(branches, "weights packed in bfloat16 do not fit runtime.memory_limit too"))
        return True

    def lower(self, plan: Plan, segment: Segment, module: GraphModule, way: Resolved) -> Lowered:
        """One segment's module as `way`, which `choose` had a part in, has it. Raises ConfigError where the configured
        backend can't, Unlowerable where a tuned one can't for a graph that was edited since."""
        choice = way.segments.get(segment.name, PLAIN)
        try:
            memory = _memory_inside(plan, way)
            return self._made(plan, segment, module, choice, way.batch_size, way.threads, memory)
        except Unlowerable as error:
            if choice.backend == "native" and self.config.runtime.backend == "auto":  # an edit left nothing for it
                return self._made(plan, segment, module, replace(choice, backend="eager"), way.batch_size, way.threads)
            if self.config.runtime.backend == "auto":
                raise
            hint = "runtime.backend: eager runs anywhere"
            raise self.config.error("runtime.backend", str(error), hint) from error

    def _made(
        self,
        plan: Plan,
        segment: Segment,
        module: GraphModule,
        choice: Choice,
        rows: int,
        threads: int,
        memory: int | None = None,
    ) -> Lowered:
        """Lowered, or kept from before."""
        if choice.lengths and id(module) not in self._lengths:  # somebody watches it: it returns more
            choice = replace(choice, lengths=())
        target = Target(rows, getattr(torch, choice.dtype), threads, compiled_folder(), memory, self.device.name)
        # an engine is built from the host's weights, and holds its own
        placed = module if choice.backend == "tensorrt" else self.device.place(module)
        if choice == PLAIN:  # its weights are the graph's own, so that an edit is seen
            return lower("eager", segment, placed, target)
        inside = memory if choice.backend == "tensorrt" else None
        any_rows = choice.backend in OPERATION_BY_OPERATION
        sized = not any_rows or bool(choice.lengths)
        key = (id(module), choice, *((rows, threads) if sized else (0, 0)), inside)
        if key not in self._kept:
            # the plain backend looks where they are, not at them
            examples = examples_of(plan, segment, 1 if any_rows else rows)
            if choice.backend != "tensorrt":
                examples = tuple(map(self.device.held, examples))
            if choice.lengths:
                made = self._family(plan, segment, placed, choice, target)
            else:
                made = lower(choice.backend, segment, placed, target, examples)
            self._kept[key] = module, made
        return self._kept[key][1]

    def _by_length(self, made: Cut, segment: Segment, choice: Choice, job_rows: int) -> Choice:
        """At the lengths of its texts, where that is captured quickly enough for so many of them."""
        may_be = self.shorter.get(segment.branch)
        here = choice.backend in OPERATION_BY_OPERATION and self.device.kind == "cpu"
        if may_be is None or segment.branch in self.refused or not here:
            return choice
        whole = segment.writes == (made.plan.embedding(segment.branch),) and not segment.reads
        if job_rows * may_be.longest < TOKENS_FOR_LENGTHS or not whole or set(segment.inputs) != may_be.inputs:
            return choice
        try:
            return replace(choice, lengths=(*self._of_lengths(made.modules[segment.name], may_be), may_be.longest))
        except GraphError:  # a model that knows one length alone
            del self.shorter[segment.branch]
            return choice

    def _of_lengths(self, module: GraphModule, may_be: Shorter) -> Mapping[int, Cut]:
        """length → the encoder alone, captured for it, with the segment's own weights. Raises GraphError."""
        if id(module) not in self._lengths:
            found = {}
            for length in lengths_of(may_be.longest)[:-1]:
                graph = fuse([may_be.captured(length)], None, [])
                optimise(graph)
                found[length] = cut(graph)
                (one,) = found[length].plan.segments
                share_with(found[length].modules[one.name], module)
            self._lengths[id(module)] = found
        return self._lengths[id(module)]

    def _family(self, plan: Plan, segment: Segment, module: GraphModule, choice: Choice, target: Target) -> Lowered:
        """A segment lowered for each length of its texts."""
        may_be, parts = self.shorter[segment.branch], {}
        with sharing():
            for length in choice.lengths:
                one, its = segment, module
                if length < may_be.longest:
                    short = self._of_lengths(module, may_be)[length]
                    (one,) = short.plan.segments
                    its = short.modules[one.name]
                at = replace(target, rows=rows_at(length, target.rows))
                parts[length] = in_order(
                    segment, one, lower(choice.backend, one, its, at, examples_of(plan, segment, 1))
                )
        names = list(segment.inputs)
        return ByLength(parts, names.index(f"{segment.branch}.{may_be.mask}"), [names.index(n) for n in may_be.long])

    def forget_others(self, made: Cut, ways: Iterable[Resolved]) -> None:
        """What was lowered to be measured or looked at, and is in none of these ways, needs no memory."""
        used = {
            (id(made.modules[segment.name]), way.segments.get(segment.name, PLAIN))
            for way in ways
            for segment in made.plan.segments
        }
        self._kept = {key: kept for key, kept in self._kept.items() if key[:2] in used}

    def forget(self) -> None:
        """What was lowered of a graph that is no more."""
        self._kept.clear()
        self._lengths.clear()

    def _one(
        self, made: Cut, segment: Segment, rows: int, threads: int, job_rows: int, forked: bool
    ) -> tuple[Choice, str, int | None]:
        """What it is lowered to, why, and the rows from which a compiler would be waited for that isn't here."""
        runtime = self.config.runtime
        if segment.branch == HEAD or segment.branch in self.refused:
            return PLAIN, "", None
        module = made.modules[segment.name]
        if runtime.backend == "auto":
            # what was measured on the processor says nothing of another device
            best = self.tuned.best(module, rows, threads) if self.device.kind == "cpu" else None
            if best is None or runtime.dtype not in ("auto", best.choice.dtype):
                return self._plain(made, segment, job_rows)
            if not self._holds_for(made, segment.branch, best.choice):
                choice, _, _ = self._plain(made, segment, job_rows)
                was = f"{best.choice.backend} {best.choice.dtype}"
                return choice, f"{segment.name} not {was}, which was fastest: the calibration is of another", None
            if forked and best.choice.backend not in OPERATION_BY_OPERATION:
                choice, _, _ = self._plain(made, segment, job_rows)
                return choice, f"{segment.name} not {best.choice.backend}, which needs one process for all cores", None
            if not best.pays(job_rows) and self.bound is None:  # what was calibrated with a compiler waits for it
                choice, _, _ = self._plain(made, segment, job_rows)
                return choice, f"{segment.name} {best.not_yet(job_rows)}", best.pays_from
            try:  # now, so that what is resolved is what runs
                self._made(made.plan, segment, module, best.choice, rows, threads)
            except Unlowerable as error:
                choice, _, _ = self._plain(made, segment, job_rows)
                return choice, f"{segment.name} not {best.choice.backend}, which was fastest: {error}", None
            return best.choice, f"tuned: {segment.name} {best.told}", None
        dtype = self._eager(made, segment.branch).dtype
        if runtime.backend == "onnx" and runtime.dtype == "auto":
            dtype = "float32"  # the only one that ONNX Runtime multiplies on a CPU
        if runtime.backend == "native" and not (
            saved_seconds(module) and (dtype == "bfloat16" or runtime.dtype != "auto")
        ):
            return Choice("eager", dtype), "configured; eager where there is nothing for it in bfloat16", None
        return Choice(runtime.backend, dtype), "configured", None

    def _plain(self, made: Cut, segment: Segment, job_rows: int) -> tuple[Choice, str, int | None]:
        """What needs no tuning: code of our own where it can be had, without waiting for a compiler in vain."""
        module = made.modules[segment.name]
        choice = self._eager(made, segment.branch)
        if choice.dtype != "bfloat16" or self.device.kind != "cpu" or not _native_saves(module):
            return choice, "", None
        if why := kernels.why_not():
            return choice, f"not native: {why}", None
        calibrated = self.bound is not None and "native" in _backends(self.bound)
        if self.bound is not None and not calibrated:
            return choice, f"not native: the calibration was made with {' and '.join(self.bound.backends)}", None
        if not calibrated and not kernels.ready(compiled_folder()):
            branches = (s for s in made.plan.segments if s.branch != HEAD and s.branch not in self.refused)
            short = [made.modules[s.name] for s in branches if self._eager(made, s.branch).dtype == "bfloat16"]
            saved = sum(map(_native_saves, short))
            pays_from = math.ceil(WON_BACK * kernels.SECONDS / saved)
            if job_rows < pays_from:
                why = f"{job_rows} rows would save {job_rows * saved:.1f} s, compiling takes {kernels.SECONDS:.0f} s"
                return choice, f"not native: {why}, once", pays_from
        try:  # now, so that what is resolved is what runs
            kernels.load(compiled_folder())
        except Unlowerable as error:
            return choice, f"not native: {error}", None
        return replace(choice, backend="native"), "native: attention, MLPs and norms compiled for this processor", None

    def _eager(self, made: Cut, branch: str) -> Choice:
        """The plain backend, in the type that is configured, that the calibration has, else in the one that pays: one
        for all segments of an encoder."""
        asked, gain = self.config.runtime.dtype, self.device.bfloat16_gain()
        if asked != "auto":
            return Choice("eager", asked)
        if self.bound is not None and (dtype := self.bound.dtype_of(branch)) is not None:
            return Choice("eager", dtype if dtype != "bfloat16" or gain else "float32")
        pays = _large(made, branch) or (self.bound is None and self._measured_short(made, branch))
        return Choice("eager", "bfloat16" if pays and gain >= _GAIN else "float32")

    def undecided(self, made: Cut) -> dict[str, dict[Segment, GraphModule]]:
        """Encoders that are small: which number type is faster there, no rule says, and nobody has measured yet."""
        runtime = self.config.runtime
        free = runtime.dtype == "auto" and runtime.backend in ("auto", *OPERATION_BY_OPERATION) and self.bound is None
        if not free or self.device.kind != "cpu" or self.device.bfloat16_gain() < _GAIN:
            return {}
        names = [branch.name for branch in made.plan.branches if branch.name not in self.refused]
        found = {branch: _segments(made, branch) for branch in names}
        return {
            branch: its
            for branch, its in found.items()
            if not _large(made, branch) and any(self.tuned.dtype(module) is None for module in its.values())
        }

    def _measured_short(self, made: Cut, branch: str) -> bool:
        measured = map(self.tuned.dtype, _segments(made, branch).values())
        return self.device.kind == "cpu" and all(dtype == "bfloat16" for dtype in measured)

    def _holds_for(self, made: Cut, branch: str, choice: Choice) -> bool:
        """Whether what was calibrated holds for an encoder that is computed so."""
        if self.bound is None:
            return True
        backends = _backends(self.bound)
        if choice.backend not in backends or (choice.backend == "eager" and "native" in backends):
            return False
        return choice.dtype == self._eager(made, branch).dtype

    def _why_dtype(self, short: bool) -> str:
        if self.config.runtime.dtype != "auto":
            return "configured"
        gain = self.device.bfloat16_gain()
        if gain == 0:
            return f"this {'processor' if self.device.kind == 'cpu' else 'GPU'} does not multiply bfloat16 itself"
        if self.bound is not None and (self.bound.dtype == "float32" or self.bound.dtypes):
            return f"the calibration is of {self.bound.dtype}"
        measured = f"a product in bfloat16 takes {1 / gain:.2f} of float32's time here"
        if short or gain < _GAIN:
            return measured
        return f"{measured}, but no encoder is large enough to gain, and none was measured to"

    def _why_backend(self) -> str:
        if self.config.runtime.backend != "auto":
            return "configured"
        return "nothing was tuned for these segments and buckets; mmpipe autotune finds whether a compiler pays"


def _native_saves(module: GraphModule) -> float:
    """Seconds of a row; 0: not worth it."""
    saved = saved_seconds(module)
    return saved if saved >= _LEAST_SAVED_S else 0.0


def _backends(bound: BindsTo) -> set[str]:
    """That a calibrated plan may have: those that were beside others were told with a + between."""
    return {"eager", *"+".join(bound.backends).split("+")}


def _large(made: Cut, branch: str) -> bool:
    return cost.weight_bytes(list(_segments(made, branch).values())) >= 4 * LARGE_NUMBERS


def _segments(made: Cut, branch: str) -> dict[Segment, GraphModule]:
    return {segment: made.modules[segment.name] for segment in made.plan.segments if segment.branch == branch}


def _memory_inside(plan: Plan, way: Resolved) -> int | None:
    """Bytes that each encoder's segment may take on each lane for what is inside it: what `memory_limit` leaves, in
    equal shares."""
    encoders = sum(segment.branch != HEAD for segment in plan.segments)
    if not way.memory or not encoders:
        return None
    rest = sum(way.memory.values()) - way.memory["workspaces"]
    return (way.memory_limit - rest) // (encoders * way.lanes)
