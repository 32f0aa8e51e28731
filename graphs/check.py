"""The proofs. Every plan passes them before it runs; what fails names the two steps and the buffer.

    check        a whole plan: every stage plan, and what one leaves in the slots for another
    check_stage  one stage plan:
                 1  steps, streams, buffers and events are named once, and exist
                 2  every event is recorded, and submitted before the wait for it; no cycle
                 3  every read comes after a write
                 4  two accesses to a buffer, one of them a write, are ordered
                 5  buffers that share bytes are never live at once
                 6  when the ends have come, every step has ended
                 7  what a run wrote into slots is there for the runs after it, in whatever lane they are

Rows keep runs apart where order does not: slots and media of a row are given to another sample only after the host has
seen the ends of the run that read them (`mmpipe.runtime.pool` keeps that account).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

from mmpipe.graphs.memory import ALIGNMENT, conflicts
from mmpipe.graphs.order import accesses, before, members
from mmpipe.graphs.plan import Plan, PlanError, StagePlan, Step


def check(plan: Plan) -> None:
    """Prove a scheduled plan. Raises PlanError that names what is wrong."""
    written: set[str] = set()
    covered: set[int] = set()
    for stage_plan in plan.stage_plans:
        check_stage(stage_plan, written, own_streams=plan.own_streams)
        written |= {name for step in stage_plan.steps for name in step.writes}
        covered |= set(stage_plan.stages)
    lost = set(range(plan.stages)) - covered
    if plan.stage_plans and lost:
        raise PlanError(f"no stage plan runs stage {min(lost)}")
    for stage_plan in plan.stage_plans:
        for segment in plan.segments:
            if segment.stage in stage_plan.stages and all(step.name != segment.name for step in stage_plan.steps):
                raise PlanError(f"{stage_plan.name}: segment {segment.name} has no step")


def check_stage(plan: StagePlan, written_before: Set[str] = frozenset(), *, own_streams: bool = False) -> None:
    """Prove one stage plan. `written_before`: buffers that earlier stages have written. `own_streams`: a lane's streams
    are its own."""
    _names(plan)
    _events(plan)
    earlier = before(plan.steps)
    _reads(plan, earlier, written_before)
    _races(plan, earlier)
    _bytes(plan)
    _ends(plan, earlier)
    _runs(plan, own_streams)


def _fail(plan: StagePlan, text: str) -> None:
    raise PlanError(f"{plan.name}: {text}")


def _names(plan: StagePlan) -> None:
    buffers = {buffer.name for buffer in plan.buffers}
    for names, kind in (([s.name for s in plan.steps], "step"), ([b.name for b in plan.buffers], "buffer")):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            _fail(plan, f"two of its {kind}s are called {twice}")
    for step in plan.steps:
        if step.stream not in plan.streams:
            _fail(plan, f"{step.name} is on stream {step.stream}, which there is not")
        for name in (*step.reads, *step.writes):
            if name not in buffers:
                _fail(plan, f"{step.name} uses buffer {name}, which there is not")


def _events(plan: StagePlan) -> None:
    seen: dict[str, Step] = {}
    names = {step.name for step in plan.steps}
    for step in plan.steps:
        for name in step.waits:
            if name not in names:
                _fail(plan, f"{step.name} waits for {name}, which there is not")
            if name not in seen:
                before(plan.steps)  # a cycle is the better explanation
                _fail(plan, f"{step.name} waits for {name}, which is submitted later: its event is not recorded yet")
            if not seen[name].records:
                _fail(plan, f"{step.name} waits for {name}, which records no event")
        seen[step.name] = step
    for name in plan.ends:
        if name not in seen or not seen[name].records:
            _fail(plan, f"the host waits for {name}, which records no event")


def _reads(plan: StagePlan, earlier: Sequence[int], written_before: Set[str]) -> None:
    home = {buffer.name: buffer.home for buffer in plan.buffers}
    used = accesses(plan.steps)
    for index, step in enumerate(plan.steps):
        for name in step.reads:
            if home[name] in ("media", "host") or (home[name] == "slots" and name in written_before):
                continue  # the host, or an earlier stage, wrote it before this run was submitted
            if used[name][1] & earlier[index] == 0:
                writers = members(used[name][1] & ~(1 << index))
                if writers:
                    writer = plan.steps[writers[0]].name
                    _fail(plan, f"{step.name} reads {name}, and nothing makes {writer} write first")
                _fail(plan, f"{step.name} reads {name}, which nothing wrote")


def _races(plan: StagePlan, earlier: Sequence[int]) -> None:
    for name, (uses, writes) in accesses(plan.steps).items():
        for write in members(writes):
            for use in members(uses & ~(1 << write)):
                if not (earlier[use] >> write & 1 or earlier[write] >> use & 1):
                    one, other = plan.steps[min(write, use)].name, plan.steps[max(write, use)].name
                    _fail(plan, f"{one} and {other} both use {name}, one writes it, and neither waits for the other")


def _bytes(plan: StagePlan) -> None:
    scratch = sorted((b for b in plan.buffers if b.home == "scratch"), key=lambda buffer: buffer.offset)
    for buffer in scratch:
        if buffer.offset < 0 or buffer.offset % ALIGNMENT or buffer.offset + buffer.bytes > plan.scratch_bytes:
            _fail(plan, f"{buffer.name} at {buffer.offset} is not aligned, or not within scratch")
    apart = conflicts(plan.steps, plan.buffers)
    for position, one in enumerate(scratch):
        for other in scratch[position + 1 :]:
            if other.offset >= one.offset + one.bytes:
                break  # sorted: the rest begins even later
            if other.name in apart[one.name] and other.bytes:
                users = [step.name for step in plan.steps if one.name in (*step.reads, *step.writes)]
                others = [step.name for step in plan.steps if other.name in (*step.reads, *step.writes)]
                _fail(
                    plan,
                    f"{one.name} and {other.name} share bytes, and both may be live at once "
                    f"({users[-1]} uses one, {others[0]} the other)",
                )


def _ends(plan: StagePlan, earlier: Sequence[int]) -> None:
    ended = 0
    for index, step in enumerate(plan.steps):
        if step.name in plan.ends:
            ended |= earlier[index] | 1 << index
    for index, step in enumerate(plan.steps):
        if not ended >> index & 1:
            _fail(plan, f"{step.name} may still run when the host has seen the ends ({', '.join(plan.ends)})")


def _runs(plan: StagePlan, own_streams: bool) -> None:
    """Three runs in three lanes: what the first wrote into slots is there when the others read.

    Three, because what holds from one run to the next, and over one between them, holds over any number.
    """
    slots = {buffer.name for buffer in plan.buffers if buffer.home == "slots"}
    if not any(slots & {*step.reads} for step in plan.steps):
        return
    unrolled = [
        replace(
            step,
            name=f"{run} {step.name}",
            stream=f"{run} {step.stream}" if own_streams else step.stream,
            waits=(
                *(f"{run} {name}" for name in step.waits),
                *((f"{run - 1} {step.name}",) if run and step.name in plan.follows else ()),
            ),
        )
        for run in range(3)
        for step in plan.steps
    ]
    earlier, count = before(unrolled), len(plan.steps)
    for write, writer in enumerate(plan.steps):
        for read, reader in enumerate(plan.steps):
            shared = slots & {*writer.writes} & {*reader.reads}
            if not shared or write == read:
                continue
            for later in (1, 2):
                if not earlier[later * count + read] >> write & 1:
                    text = f"perhaps before {writer.name} of the run before has written"
                    _fail(plan, f"{reader.name} reads {min(shared)}, {text}")
