"""Segments → steps on streams, with the fewest waits that order every read after its write.

    place       a cut plan → the same with its stage plans: one for each stage, or one for all of them
    steps_of    segments → steps and buffers: in, run, out for each
    in_order    steps in an order that can be submitted
    waits       steps with streams → the same with what they wait for

The rows of a run differ from segment to segment (who has the modality, who is still live), so that what one segment
writes and another reads goes through slots, by row: out:image@0 scatters embeddings, in:head@0 gathers them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

import torch

from mmpipe.graphs import memory
from mmpipe.graphs.check import check, check_stage
from mmpipe.graphs.order import before, members
from mmpipe.graphs.plan import HEAD, PRESENCE, Buffer, Plan, PlanError, Segment, StagePlan, Step

Layout = Callable[[Step], str]  # step → the stream that it is on

_BESIDE = {"in": "in", "out": "out", "restore": "out"}  # where staging is beside computing

LAYOUTS: dict[str, Layout] = {
    "one": lambda step: "main",
    "caller": lambda step: "caller",  # one, and no thread of its own: the caller's
    "lanes": lambda step: "main",  # one for each lane: buckets side by side, each computed by fewer threads
    "staged": lambda step: _BESIDE.get(step.does, "main"),
    "branches": lambda step: _BESIDE.get(step.does, step.branch),
    "parallel": lambda step: step.branch,  # a branch's own copies too: no branch waits for another's media
}


def place(
    plan: Plan,
    *,
    rows: int,
    layout: str | Layout,
    lanes: int = 1,
    slots: int | None = None,
    media: int | None = None,
    parallel: bool = False,
    restores: Collection[str] = (),
) -> Plan:
    """Schedule, place in memory and prove: `plan` with its stage plans for buckets of `rows`.

    `layout`: a name of LAYOUTS, or your own. `parallel`: one stage plan for all stages, which starts every branch at
    once. `slots`: samples that may be live at once; `media`: decoded media of one modality that may wait (default:
    three buckets: one being filled, one read, one ahead). `restores`: branches whose embeddings the host may give; each
    must be `restorable`. Raises PlanError where a proof fails.
    """
    on = LAYOUTS[layout] if isinstance(layout, str) else layout
    slots = max(rows * lanes, rows if slots is None else slots)
    media = 3 * rows if media is None else media
    for branch in restores:
        if not plan.restorable(branch):
            raise PlanError(f"{branch} can't be restored: more than its embedding is read from it")
    plan = replace(plan, restores=tuple(branch.name for branch in plan.branches if branch.name in restores))
    groups = [tuple(range(plan.stages))] if parallel else [(stage,) for stage in range(plan.stages)]
    own = layout == "lanes"
    made: list[StagePlan] = []
    for group in groups:
        segments = [segment for segment in plan.segments if segment.stage in group]
        steps, buffers = steps_of(plan, segments, rows=rows, slots=slots, media=media)
        steps = waits([replace(step, stream=on(step)) for step in in_order(steps)])
        steps, ends = _ends(steps)
        placed, size = memory.assign(steps, buffers)
        streams = tuple(dict.fromkeys(step.stream for step in steps))
        follows = _follows(steps) if own else ()
        steps = [replace(step, records=step.records or step.name in follows) for step in steps]
        stage_plan = StagePlan(group, rows, streams, tuple(steps), placed, size, ends, follows)
        made.append(_least_follows(stage_plan, {name for one in made for step in one.steps for name in step.writes}))
    scheduled = replace(plan, stage_plans=tuple(made), lanes=lanes, slots=slots, own_streams=own)
    check(scheduled)
    return scheduled


def steps_of(
    plan: Plan, segments: Sequence[Segment], *, rows: int, slots: int, media: int
) -> tuple[list[Step], tuple[Buffer, ...]]:
    """in, run and out of each segment, in the plan's order and on no stream yet, with the buffers that they use.

    Four buffers hold row numbers, one for each row of the bucket: NAME/media and NAME/get say where its rows are taken
    from, NAME/put where in the slots they go to, NAME/back where restored ones go to.
    """
    buffers: dict[str, Buffer] = {}

    def buffer(name: str, value: str, home: str, count: int) -> str:
        found = plan.value(value)
        buffers[name] = Buffer(name, found.shape, found.dtype, count, home)  # type: ignore[arg-type]
        return name

    def numbers(name: str) -> str:
        buffers[name] = Buffer(name, (), torch.int64, rows, "host")
        return name

    steps = []
    for segment in segments:
        name = segment.name
        arguments = (*segment.inputs, *segment.reads)
        if segment.branch in plan.restores and plan.later_reads(value := plan.embedding(segment.branch)):
            given = (numbers(f"{name}/back"), buffer(f"{name}/known/{value}", value, "host", rows))
            bucket = buffer(f"{name}/restored/{value}", value, "scratch", rows)
            back = (bucket, buffer(f"slots/{value}", value, "slots", slots))
            steps.append(Step(f"restore:{name}", "restore", name, segment.stage, segment.branch, "", given, back))
        taken: list[str] = []
        put = [buffer(f"{name}/in/{value}", value, "scratch", rows) for value in arguments]
        feeds = segment.branch != HEAD and plan.feeder(segment.branch).name == name
        if feeds:
            taken.append(numbers(f"{name}/media"))
            kept = plan.kept_inputs(segment.branch)
            fed = [value for value in segment.inputs if value.startswith(f"{segment.branch}.")]
            taken += [buffer(f"media/{value}", value, "media", media) for value in dict.fromkeys((*fed, *kept))]
            put = [buffer(f"{name}/in/{value}", value, "scratch", rows) for value in dict.fromkeys((*arguments, *kept))]
            put += [buffer(f"slots/{value}", value, "slots", slots) for value in kept]
            if kept:
                taken.append(numbers(f"{name}/put"))
            arguments = tuple(value for value in arguments if value not in fed)
        for value in arguments:
            home = "host" if value == PRESENCE else "slots"
            owner, count = (name, rows) if home == "host" else ("slots", slots)
            taken.append(buffer(f"{owner}/{value}", value, home, count))
        if any(taken_name.startswith("slots/") for taken_name in taken):
            taken.append(numbers(f"{name}/get"))
        steps.append(Step(f"in:{name}", "in", name, segment.stage, segment.branch, "", tuple(taken), tuple(put)))
        results: list[str] = [buffer(f"{name}/out/{value}", value, "scratch", rows) for value in segment.writes]
        inputs = tuple(f"{name}/in/{value}" for value in (*segment.inputs, *segment.reads))
        steps.append(Step(name, "run", name, segment.stage, segment.branch, "", inputs, tuple(results)))
        left = []
        for value in segment.writes:
            if plan.later_reads(value):
                left.append(buffer(f"slots/{value}", value, "slots", slots))
            if value in answers(plan):
                left.append(buffer(f"{name}/answer/{value}", value, "host", rows))
        if any(target.startswith("slots/") for target in left):
            results.append(numbers(f"{name}/put"))
        steps.append(Step(f"out:{name}", "out", name, segment.stage, segment.branch, "", tuple(results), tuple(left)))
    return steps, tuple(buffers.values())


def answers(plan: Plan) -> set[str]:
    """Values that the host reads: the logits of every exit, and embeddings."""
    return {exit_.value for exit_ in plan.exits} | {value for _, value in plan.embeddings}


def in_order(steps: Sequence[Step]) -> list[Step]:
    """An order of submission: stage by stage, and within one as early as what a step needs allows.

    So on a stream that several branches share, a copy for one never stands behind a copy that waits for another.
    """
    level: dict[str, int] = {}
    written: dict[str, int] = {}  # buffer → level of its latest write
    read: dict[str, int] = {}
    for step in steps:
        after = [written.get(name, -1) for name in (*step.reads, *step.writes)] + [read.get(n, -1) for n in step.writes]
        level[step.name] = 1 + max(after, default=-1)
        for name in step.writes:
            written[name] = level[step.name]
        for name in step.reads:
            read[name] = max(read.get(name, -1), level[step.name])
    return sorted(steps, key=lambda step: (step.stage, level[step.name]))


def waits(steps: Sequence[Step]) -> list[Step]:
    """Steps in order of submission, on streams → what each waits for.

    A step must come after every earlier step that writes what it uses, or uses what it writes. Of these, its own
    stream orders some, and others come before one another: what is left is the transitive reduction, which is unique,
    and no set of waits that gives this order and no more is smaller.
    """
    made: list[Step] = []
    earlier: list[int] = []
    last: dict[str, int] = {}
    used: dict[str, tuple[int, int]] = {}  # buffer → (uses, writes) so far
    for index, step in enumerate(steps):
        needed = 0
        for name in step.reads:
            needed |= used.get(name, (0, 0))[1]
        for name in step.writes:
            needed |= used.get(name, (0, 0))[0]
        known = 0
        if step.stream in last:
            known = earlier[last[step.stream]] | 1 << last[step.stream]
        missing = members(needed & ~known)
        implied = known
        for other in missing:
            implied |= earlier[other]
        direct = [other for other in missing if not implied >> other & 1]
        for other in direct:
            known |= earlier[other] | 1 << other
        earlier.append(known)
        last[step.stream] = index
        for name in {*step.reads, *step.writes}:
            uses, writes = used.get(name, (0, 0))
            used[name] = uses | 1 << index, writes | (1 << index if name in step.writes else 0)
        made.append(replace(step, waits=tuple(steps[other].name for other in direct)))
    return made


def _follows(steps: Sequence[Step]) -> tuple[str, ...]:
    """Steps that scatter into slots which this stage plan gathers from: a gather comes after its own run's scatter,
    and that one after those of all runs before."""
    read = {name for step in steps for name in step.reads if name.startswith("slots/")}
    return tuple(step.name for step in steps if read & {*step.writes})


def _least_follows(plan: StagePlan, written: set[str]) -> StagePlan:
    """Without those that the others imply."""
    for name in plan.follows:
        less = replace(plan, follows=tuple(other for other in plan.follows if other != name))
        try:
            check_stage(less, written, own_streams=True)
        except PlanError:
            continue
        plan = less
    return plan


def _ends(steps: Sequence[Step]) -> tuple[list[Step], tuple[str, ...]]:
    """Mark who records an event: whom others wait for, whom the host reads from, and those that nothing comes after."""
    earlier = before(steps)
    covered = 0
    for bits in earlier:
        covered |= bits
    ends = tuple(step.name for index, step in enumerate(steps) if not covered >> index & 1)
    awaited = {name for step in steps for name in step.waits} | {*ends}
    records: Iterable[Step] = (
        replace(step, records=step.name in awaited or step.does != "run") for step in steps
    )  # the host waits for "in" before media are free, for "out" before it reads answers
    return list(records), ends
