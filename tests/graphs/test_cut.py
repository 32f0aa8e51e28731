"""The cut: stages by the backward slice, segments that together are the graph, values that can be carried."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parts import LABELS, ORDER, PARTS, batch, fused

from mmpipe.graphs.cut import cut, stages_of
from mmpipe.graphs.fuse import ExitSpec, Probe, outputs_of
from mmpipe.graphs.passes import optimise
from mmpipe.graphs.plan import HEAD, PRESENCE

aten = torch.ops.aten
WIDTH = {"image": 16, "text": 12, "audio": 8}
DEPTH = {"image": 3, "text": 2, "audio": 2}


def probe(branch, layer):
    torch.manual_seed(layer)
    mask = "mask" if branch == "text" else None
    weight = torch.randn(LABELS, WIDTH[branch])
    return ExitSpec(f"{branch}.layer{layer}", (branch,), probe=Probe(branch, layer, weight, torch.zeros(LABELS), mask))


def run_cut(made, rows):
    """Run all segments on all rows: what a run without gates computes."""
    known = dict(rows)
    with torch.no_grad():
        for segment in made.plan.segments:
            arguments = [known[name] for name in (*segment.inputs, *segment.reads)]
            known |= dict(zip(segment.writes, made.modules[segment.name](*arguments), strict=True))
    return known


@st.composite
def exits(draw):
    """Any legal list of exits: depths of the first encoder, growing sets of modalities, depths of the head."""
    order = draw(st.permutations(ORDER))
    found = [probe(order[0], layer) for layer in sorted(draw(st.sets(st.integers(1, DEPTH[order[0]] - 1))))]
    for count in sorted(draw(st.sets(st.integers(1, 2)))):
        sees = tuple(name for name in ORDER if name in order[:count])
        found.append(ExitSpec("+".join(sees), sees))
    if draw(st.booleans()):
        found.append(ExitSpec("head.layer1", ORDER, depth=1))
    return found


@settings(max_examples=12, deadline=None)
@given(exits(), st.booleans(), st.integers(1, 5))
def test_segments_together_are_the_graph(specs, optimised, rows):
    graph = fused(PARTS, specs)
    if optimised:
        optimise(graph)
    made = cut(graph)
    rows_by_name = batch(rows)
    with torch.no_grad():
        want = graph(*rows_by_name.values())
    known = run_cut(made, rows_by_name)
    for exit_ in made.plan.exits:
        assert (known[exit_.value] - want["exits"][exit_.name]).abs().max() <= 1e-6 * 5
    for branch, value in made.plan.embeddings:
        assert (known[value] - want["embeddings"][branch]).abs().max() <= 1e-6 * 5
    written = {name for segment in made.plan.segments for name in segment.writes}
    for segment in made.plan.segments:
        for name in segment.reads:
            writer = next(s for s in made.plan.segments if name in s.writes)
            assert (writer.stage, writer.branch == HEAD) <= (segment.stage, segment.branch == HEAD)
            assert name in written
    assert made.plan.segments == cut(graph).plan.segments


@settings(max_examples=12, deadline=None)
@given(exits())
def test_a_stage_is_the_first_exit_that_needs_the_node(specs):
    graph = fused(PARTS, specs)
    stage = stages_of(graph.graph)
    answers = list(outputs_of(graph.graph)["exits"].values())
    for number, answer in enumerate(answers):
        assert stage[answer] <= number
        for argument in answer.all_input_nodes:
            if argument in stage:
                assert stage[argument] <= stage[answer]
    for node, number in stage.items():
        for argument in node.all_input_nodes:
            if argument in stage:
                assert stage[argument] <= number


def test_an_exit_after_image_leaves_the_others_to_later_stages():
    plan = cut(fused(PARTS, [ExitSpec("image", ("image",)), ExitSpec("image+text", ("image", "text"))])).plan
    assert [segment.name for segment in plan.segments] == ["image@0", "head@0", "text@1", "head@1", "audio@2", "head@2"]
    assert [exit_.brings for exit_ in plan.exits] == [("image",), ("text",), ("audio",)]
    assert [segment.every_row for segment in plan.segments if segment.branch == HEAD] == [False, False, True]


def test_no_exits_is_one_stage():
    plan = cut(fused(PARTS, [])).plan
    assert {segment.stage for segment in plan.segments} == {0}
    assert [exit_.name for exit_ in plan.exits] == ["all"]


def test_a_head_that_goes_on_runs_for_every_row():
    plan = cut(fused(PARTS, [ExitSpec("image", ("image",)), ExitSpec("head.layer1", ORDER, depth=1)])).plan
    rows = {segment.name: segment.every_row for segment in plan.segments if segment.branch == HEAD}
    assert rows == {"head@0": False, "head@1": True, "head@2": True}
    assert next(exit_ for exit_ in plan.exits if exit_.name == "head.layer1").brings == ("text", "audio")


def test_a_carried_value_has_the_batch_alone_in_front():
    made = cut(fused(PARTS, [probe("audio", 1), ExitSpec("audio", ("audio",))]))
    for value in made.plan.values:
        assert all(isinstance(size, int) for size in value.shape)
    carried = [name for s in made.plan.segments if s.name == "audio@1" for name in s.reads]
    assert carried
    for name in carried:
        assert made.plan.value(name).shape == (16, 8)


def test_a_cut_through_windows_moves_to_where_rows_are_whole():
    """An exit that reads inside the windows: what undoes them joins the earlier stage, and nothing changes."""
    graph = fused(PARTS, [ExitSpec("audio", ("audio",))])
    nodes = list(graph.graph.nodes)
    products = [n for n in nodes if n.target is aten.matmul.default and n.meta["mmpipe"].branch == "audio"]
    inside = products[1]  # softmax · v of the first layer
    assert inside.meta["mmpipe"].shape[0] == "4*B"
    output = next(n for n in nodes if n.op == "output")
    with graph.graph.inserting_before(output):  # an exit made of windows: [4 × batch, …] → [batch, labels]
        rows = graph.graph.call_function(aten.reshape.default, (inside, [-1, 4 * 4 * 8]))
        logits = graph.graph.call_function(aten.slice.Tensor, (rows, 1, 0, LABELS))
    found = outputs_of(graph.graph)
    output.args = ({"exits": {"inside": logits, **found["exits"]}, "embeddings": found["embeddings"]},)
    graph.recompile()
    made = cut(graph)
    given_rows = batch(3)
    with torch.no_grad():
        want = graph(*given_rows.values())["exits"]
    known = run_cut(made, given_rows)
    for exit_ in made.plan.exits:
        assert torch.allclose(known[exit_.value], want[exit_.name], atol=1e-6)
    assert [segment.stage for segment in made.plan.segments if segment.branch == "audio"] == [0, 1]


def test_batch_sizes_are_never_carried():
    made = cut(fused(PARTS, [probe("image", 1), probe("image", 2), ExitSpec("image", ("image",))]))
    for segment in made.plan.segments:
        for name in (*segment.inputs, *segment.reads):
            assert made.plan.value(name).dtype is not None
    assert PRESENCE in [value.name for value in made.plan.values]


def test_an_edited_node_is_cut_as_edited():
    graph = fused(PARTS, [ExitSpec("image", ("image",))])
    rows = batch(4)
    before = run_cut(cut(graph), rows)
    node = outputs_of(graph.graph)["exits"]["all"]
    with graph.graph.inserting_after(node):
        doubled = graph.graph.call_function(torch.ops.aten.mul.Tensor, (node, 2.0))
    node.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    version = graph.version
    graph.recompile()
    assert graph.version > version
    made = cut(graph)
    after = run_cut(made, rows)
    assert torch.allclose(after[made.plan.exits[-1].value], before[node.name] * 2)
