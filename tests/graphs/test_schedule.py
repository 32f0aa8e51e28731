"""Schedules, memory and proofs, over thousands of random plans: what is built passes, what is broken is caught."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from support.parts import LABELS, ORDER, PARTS, fused

from mmpipe.graphs import memory
from mmpipe.graphs.check import check, check_stage
from mmpipe.graphs.cut import cut
from mmpipe.graphs.fuse import ExitSpec, Probe
from mmpipe.graphs.order import before
from mmpipe.graphs.plan import (
    HEAD,
    PRESENCE,
    Branch,
    Buffer,
    Exit,
    Plan,
    PlanError,
    Segment,
    Step,
    Value,
    from_json,
    to_json,
)
from mmpipe.graphs.schedule import LAYOUTS, place

PLANS = 2000
MODALITIES = ("image", "text", "audio", "video", "touch")


def random_plan(dice: random.Random) -> Plan:
    """Any cut that could be: branches, depth exits anywhere, heads that carry state, inputs that are needed again."""
    names = MODALITIES[: dice.randint(1, 5)]
    stages = dice.randint(1, 5)
    values: list[Value] = []

    def value(name: str) -> str:
        shape = tuple(dice.randint(1, 40) for _ in range(dice.randint(0, 3)))
        values.append(Value(name, shape, dice.choice([torch.float32, torch.bfloat16, torch.int64, torch.uint8])))
        return name

    value(PRESENCE)
    inputs = {name: tuple(value(f"{name}.{part}") for part in "ab"[: dice.randint(1, 2)]) for name in names}
    segments: list[Segment] = []
    carried: dict[str, str] = {}  # branch → what its latest segment hands on
    done: dict[str, str] = {}  # branch → its embedding
    opened: list[str] = []
    exits = []
    for stage in range(stages):
        last = stage == stages - 1
        for name in names:
            if name in done or not (last or dice.random() < 0.5):
                continue
            ends = last or dice.random() < 0.6
            writes = [value(f"{name}_{stage}_{number}") for number in range(dice.randint(1, 3))]
            reads = (carried[name],) if name in carried else ()
            again = tuple(i for i in inputs[name] if dice.random() < 0.3) if name in carried else inputs[name]
            segments.append(Segment(f"{name}@{stage}", stage, name, again, reads, tuple(writes), 1))
            carried[name] = writes[0]
            opened += [name] if name not in opened else []
            if ends:
                done[name] = writes[0]
        seen = tuple(done.values())
        state = [s.writes[-1] for s in segments if s.branch == HEAD and len(s.writes) > 1 and dice.random() < 0.5]
        again = tuple(i for name in opened for i in inputs[name] if dice.random() < 0.2)
        reads = tuple(dict.fromkeys((*seen, *carried.values(), *state)))
        writes = [value(f"logits_{stage}")] + ([value(f"state_{stage}")] if dice.random() < 0.4 else [])
        if reads or again:
            presence = (PRESENCE,) if dice.random() < 0.7 else ()
            segments.append(Segment(f"head@{stage}", stage, HEAD, (*again, *presence), reads, tuple(writes), 1, True))
        exits.append(Exit(f"exit {stage}", f"logits_{stage}", tuple(opened), tuple(opened)))
    return Plan(
        tuple(Branch(name, inputs[name], 4) for name in names if any(s.branch == name for s in segments)),
        tuple(exits),
        tuple(segments),
        tuple(values),
        tuple(done.items()),
    )


def any_layout(dice: random.Random):
    """A layout of ours, or each kind of work of each branch anywhere on a few streams."""
    if dice.random() < 0.5:
        return dice.choice(list(LAYOUTS))
    count, chosen = dice.randint(1, 6), {}
    return lambda step: chosen.setdefault(step.name, f"stream {dice.randrange(count)}")


def placed(dice: random.Random) -> Plan:
    return place(
        random_plan(dice),
        rows=dice.choice([1, 4, 8, 32]),
        layout=any_layout(dice),
        lanes=dice.randint(1, 3),
        slots=dice.choice([8, 64, 1000]),
        parallel=dice.random() < 0.5,
    )


def written_before(plan: Plan, index: int) -> set[str]:
    return {name for other in plan.stage_plans[:index] for step in other.steps for name in step.writes}


def test_every_plan_that_is_built_passes_and_reads_back_as_it_was():
    dice = random.Random(1)
    for _ in range(PLANS):
        plan = placed(dice)  # place() checks
        if dice.random() < 0.05:
            assert from_json(to_json(plan)) == plan


def test_deleting_any_wait_is_caught():
    dice = random.Random(2)
    waits = caught = 0
    for _ in range(PLANS // 4):
        plan = placed(dice)
        for index, stage_plan in enumerate(plan.stage_plans):
            for place_, step in enumerate(stage_plan.steps):
                for wait in step.waits:
                    waits += 1
                    less = replace(step, waits=tuple(name for name in step.waits if name != wait))
                    steps = (*stage_plan.steps[:place_], less, *stage_plan.steps[place_ + 1 :])
                    with pytest.raises(PlanError) as caught_error:
                        check_stage(replace(stage_plan, steps=steps), written_before(plan, index))
                    text = str(caught_error.value)
                    caught += step.name in text or wait in text
    assert waits > 4_000
    assert caught == waits  # each names one of the two steps


def test_moving_a_buffer_onto_a_live_one_is_caught():
    dice = random.Random(3)
    moved = 0
    for _ in range(PLANS // 4):
        plan = placed(dice)
        for index, stage_plan in enumerate(plan.stage_plans):
            apart = memory.conflicts(stage_plan.steps, stage_plan.buffers)
            for number, buffer in enumerate(stage_plan.buffers):
                live = [b for b in stage_plan.buffers if b.name in apart.get(buffer.name, ())]
                for other in dice.sample(live, min(2, len(live))):
                    there = replace(buffer, offset=other.offset)
                    buffers = (*stage_plan.buffers[:number], there, *stage_plan.buffers[number + 1 :])
                    room = stage_plan.scratch_bytes + buffer.bytes
                    with pytest.raises(PlanError, match="share bytes"):
                        check_stage(
                            replace(stage_plan, buffers=buffers, scratch_bytes=room), written_before(plan, index)
                        )
                    moved += 1
    assert moved > 5_000


def test_scratch_is_close_to_the_least_that_any_plan_could_need():
    dice = random.Random(4)
    ratios = []
    for _ in range(400):
        for stage_plan in placed(dice).stage_plans:
            least = memory.lower_bound(stage_plan.steps, stage_plan.buffers)
            assert least <= stage_plan.scratch_bytes
            if least:
                ratios.append(stage_plan.scratch_bytes / least)
    ratios.sort()
    assert ratios[len(ratios) // 2] == 1.0
    assert ratios[int(len(ratios) * 0.99)] <= 1.15


def test_no_wait_is_more_than_is_needed():
    """Without a wait, the two steps that it orders are unordered: nothing else implies it."""
    dice = random.Random(5)
    for _ in range(300):
        for stage_plan in placed(dice).stage_plans:
            steps = list(stage_plan.steps)
            place_ = {step.name: index for index, step in enumerate(steps)}
            for index, step in enumerate(steps):
                for wait in step.waits:
                    less = [*steps]
                    less[index] = replace(step, waits=tuple(name for name in step.waits if name != wait))
                    assert not before(less)[index] >> place_[wait] & 1


def errors_of_the_race_check(stage_plan, steps) -> int:
    """Replay steps through PyTorch's own race check for CUDA streams; scratch by the bytes, cut where buffers begin."""
    sanitizer = pytest.importorskip("torch.cuda._sanitizer")
    handler = sanitizer.EventHandler()
    scratch = [b for b in stage_plan.buffers if b.home == "scratch"]
    edges = sorted({edge for b in scratch for edge in (b.offset, b.offset + b.bytes)})
    cells = {b.name: {e for e in edges if b.offset <= e < b.offset + b.bytes} for b in scratch}
    others = [b for b in stage_plan.buffers if b.home != "scratch"]
    cells |= {b.name: {-1 - number} for number, b in enumerate(others)}
    streams = {name: 1 + number for number, name in enumerate(stage_plan.streams)}
    events = {step.name: 1 + number for number, step in enumerate(steps)}
    found = 0
    for step in steps:
        for name in step.waits:
            handler.syncs.stream_wait_for_event(streams[step.stream], events[name])
        written = set().union(*(cells[name] for name in step.writes)) if step.writes else set()
        read = set().union(*(cells[name] for name in step.reads)) if step.reads else set()
        aliases = {cell: [step.name] for cell in read | written}
        found += len(
            handler._handle_kernel_launch(streams[step.stream], read - written, written, set(), step.name, aliases)
        )
        if step.records:
            handler.syncs.create_event(events[step.name])
            handler.syncs.record_state(events[step.name], streams[step.stream])
    return found


def test_the_race_check_of_cuda_agrees():
    dice = random.Random(6)
    without = 0
    for _ in range(150):
        for stage_plan in placed(dice).stage_plans:
            steps = list(stage_plan.steps)
            assert errors_of_the_race_check(stage_plan, steps) == 0
            waiting = [index for index, step in enumerate(steps) if step.waits]
            for index in dice.sample(waiting, min(3, len(waiting))):
                gone = dice.choice(steps[index].waits)
                less = [*steps]
                less[index] = replace(steps[index], waits=tuple(n for n in steps[index].waits if n != gone))
                assert errors_of_the_race_check(stage_plan, less) > 0, (stage_plan.name, steps[index].name, gone)
                without += 1
    assert without > 300


torch.manual_seed(5)
DEPTH_EXITS = [
    ExitSpec("image.layer1", ("image",), probe=Probe("image", 1, torch.randn(LABELS, 16), torch.zeros(LABELS))),
    ExitSpec("text.layer1", ("text",), probe=Probe("text", 1, torch.randn(LABELS, 12), torch.zeros(LABELS), "mask")),
    ExitSpec("image", ("image",)),
    ExitSpec("head.layer1", ORDER, depth=1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parallel", [False, True])
def test_a_real_cut_is_scheduled(layout, parallel):
    plan = place(cut(fused(PARTS, DEPTH_EXITS)).plan, rows=8, layout=layout, lanes=2, parallel=parallel)
    assert [s.stages for s in plan.stage_plans] == ([(0, 1, 2, 3, 4)] if parallel else [(0,), (1,), (2,), (3,), (4,)])
    ran = [step.segment for s in plan.stage_plans for step in s.steps if step.does == "run"]
    assert sorted(ran) == sorted(segment.name for segment in plan.segments)
    if layout == "one":
        assert all(not step.waits for s in plan.stage_plans for step in s.steps)
    assert "slots/text.mask" in {name for s in plan.stage_plans for step in s.steps for name in step.writes}


# --- what check says, by hand -----------------------------------------------------------------------------------------


def a_stage():
    plan = place(cut(fused(PARTS, [])).plan, rows=8, layout="branches")
    return plan.stage_plans[0]


def with_step(stage_plan, name, **change):
    steps = tuple(replace(step, **change) if step.name == name else step for step in stage_plan.steps)
    return replace(stage_plan, steps=steps)


def test_a_wait_for_what_comes_later_a_cycle_and_a_wait_for_nothing_are_told_apart():
    made = a_stage()
    with pytest.raises(PlanError, match=r"in:image@0 waits for in:head@0.*submitted later|a cycle"):
        check_stage(with_step(made, "in:image@0", waits=("in:head@0",)))
    with pytest.raises(PlanError, match="wait for each other: a cycle"):
        check_stage(with_step(made, "in:image@0", waits=("image@0",)))
    with pytest.raises(PlanError, match="waits for nobody, which there is not"):
        check_stage(with_step(made, "image@0", waits=("nobody",)))
    with pytest.raises(PlanError, match="records no event"):
        check_stage(with_step(made, "image@0", records=False))


def test_a_read_of_what_nothing_wrote_names_the_step_and_the_buffer():
    made = a_stage()
    extra = Buffer("image@0/in/ghost", (1,), torch.float32, 8, "scratch", offset=made.scratch_bytes)
    ghost = replace(
        with_step(made, "image@0", reads=("image@0/in/image.pixels", "image@0/in/ghost")),
        buffers=(*made.buffers, extra),
        scratch_bytes=made.scratch_bytes + 64,
    )
    with pytest.raises(PlanError, match="image@0 reads image@0/in/ghost, which nothing wrote"):
        check_stage(ghost)


def test_slots_that_an_earlier_stage_did_not_write_are_no_input():
    plan = place(cut(fused(PARTS, [ExitSpec("image", ("image",))])).plan, rows=8, layout="one")
    with pytest.raises(PlanError, match=r"in:head@1 reads slots/.*, which nothing wrote"):
        check(replace(plan, stage_plans=plan.stage_plans[1:]))
    with pytest.raises(PlanError, match="no stage plan runs stage 1"):
        check(replace(plan, stage_plans=plan.stage_plans[:1]))


def test_an_end_too_few_is_caught():
    made = a_stage()
    with pytest.raises(PlanError, match="may still run when the host has seen the ends"):
        check_stage(replace(made, ends=("out:image@0",)))


def test_two_names_that_are_one_and_a_buffer_outside_scratch():
    made = a_stage()
    with pytest.raises(PlanError, match="two of its steps are called"):
        check_stage(replace(made, steps=(*made.steps, made.steps[0])))
    buffers = tuple(replace(b, offset=b.offset + 32) if b.home == "scratch" else b for b in made.buffers)
    with pytest.raises(PlanError, match="not aligned, or not within scratch"):
        check_stage(replace(made, buffers=buffers))
    with pytest.raises(PlanError, match="on stream moon, which there is not"):
        check_stage(with_step(made, "image@0", stream="moon"))


def test_lanes_with_streams_of_their_own_follow_one_another():
    """Without it, a gather could come before the scatter of the run before, which is on other streams."""
    plan = place(cut(fused(PARTS, [ExitSpec("image", ("image",))])).plan, rows=8, layout="lanes", lanes=3)
    assert plan.own_streams
    assert plan.stage_plans[0].follows == ("out:image@0",)
    assert plan.stage_plans[1].follows == ("out:audio@1",)  # text's comes before it, on the same stream
    for number, stage_plan in enumerate(plan.stage_plans):
        for step in stage_plan.follows:
            less = replace(stage_plan, follows=tuple(name for name in stage_plan.follows if name != step))
            broken = (*plan.stage_plans[:number], less, *plan.stage_plans[number + 1 :])
            with pytest.raises(PlanError, match="of the run before has written"):
                check(replace(plan, stage_plans=broken))


def test_the_run_before_is_covered_too():
    """What one run scatters into slots, a later run in another lane gathers: the order must hold between runs."""
    reads = Step("in:b", "in", "b", 0, "b", "x", ("slots/v",), ("b/in/v",))
    writes = Step("out:a", "out", "a", 0, "a", "y", ("a/out/v",), ("slots/v",), records=True)
    source = Step("a", "run", "a", 0, "a", "y", (), ("a/out/v",))
    made = a_stage()
    buffers = (
        Buffer("slots/v", (1,), torch.float32, 8, "slots"),
        Buffer("a/out/v", (1,), torch.float32, 8, "scratch", 0),
        Buffer("b/in/v", (1,), torch.float32, 8, "scratch", 64),
    )
    last = replace(reads, waits=("out:a",), records=True)
    good = replace(
        made, streams=("x", "y"), steps=(source, writes, last), buffers=buffers, scratch_bytes=128, ends=("in:b",)
    )
    check_stage(good)
    # the same on streams that differ from run to run would not hold: reading first, on a slot of an earlier stage
    early = replace(reads, records=True)
    with pytest.raises(PlanError):
        check_stage(
            replace(good, steps=(early, source, replace(writes, waits=("in:b",))), ends=("out:a",)), {"slots/v"}
        )
