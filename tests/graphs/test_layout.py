"""Chains of views, transpositions and copies in normal form: every bit stays where it was, and no chain gets longer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmpipe.graphs import passes
from mmpipe.graphs.capture import capture
from mmpipe.graphs.cut import cut
from mmpipe.graphs.fuse import fuse
from mmpipe.graphs.layout import straighten

aten = torch.ops.aten
BATCHES = (1, 2, 3, 5)


class Chain(nn.Module):
    """Steps over a value of one more dimension than `shape`, between an operation before and one after."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def forward(self, x):
        y = x * 2
        for step in self.steps:
            y = step(y)
        return (y + 1).reshape(x.shape[0], -1)


def straight(module, *examples):
    """Its graph, and how many operations there were before."""
    names = [f"x{n}" for n in range(len(examples))] if len(examples) > 1 else ["x"]
    graph = fuse([capture(module.eval(), dict(zip(names, examples, strict=True)), name="image")], None, [])
    passes.drop_noops(graph)
    before, nodes = operations(graph), len(graph.graph.nodes)
    assert straighten(graph) == nodes - len(graph.graph.nodes)
    passes.verify(graph)
    graph.recompile()
    return graph, before


def operations(graph):
    return sum(node.op == "call_function" for node in graph.graph.nodes)


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def run(graph, *rows):
    with torch.no_grad():
        return graph(*rows)["embeddings"]["image"]


def numbers(rows, shape):
    """Each number another, so that one in a wrong place shows."""
    return torch.arange(rows * math.prod(shape), dtype=torch.float32).reshape(rows, *shape)


def shape_after(step, shape):
    return tuple(step(torch.zeros(7, *shape)).shape[1:])


# --- any chain --------------------------------------------------------------------------------------------------------


@st.composite
def chains(draw):
    """A shape, and steps that fit it; the batch stays first, or is moved and brought back at the end."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 16]), min_size=1, max_size=4)))
    steps, words, first = [], [], shape

    def take(word, step):
        nonlocal shape
        steps.append(step)
        words.append(word)
        shape = shape_after(step, shape)

    for _ in range(draw(st.integers(1, 6))):
        rank = len(shape) + 1
        dim = draw(st.integers(1, rank - 1))
        size = shape[dim - 1]
        kind = draw(
            st.sampled_from(["permute", "split", "merge", "roll", "slice", "copy", "select", "unsqueeze", "second"])
        )
        if kind == "permute":
            order = [0, *draw(st.permutations(range(1, rank)))]
            take(f"permute {order}", lambda x, order=order: x.permute(order))
        elif kind == "split":
            part = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
            take(f"split {dim} {part}", lambda x, dim=dim, part=part: x.unflatten(dim, (-1, part)))
        elif kind == "merge" and rank > 2 and dim < rank - 1:
            take(f"merge {dim}", lambda x, dim=dim: x.flatten(dim, dim + 1))
        elif kind == "roll":
            by = draw(st.integers(-size, size))
            take(f"roll {dim} {by}", lambda x, dim=dim, by=by: x.roll(by, dim))
        elif kind == "slice":
            start = draw(st.integers(0, size - 1))
            stop = draw(st.integers(start + 1, size))
            take(f"slice {dim} {start}:{stop}", lambda x, d=dim, a=start, b=stop: x.narrow(d, a, b - a))
        elif kind == "copy":
            take("copy", lambda x: x.contiguous())
        elif kind == "select" and rank > 2:
            at = draw(st.integers(0, size - 1))
            take(f"select {dim} {at}", lambda x, dim=dim, at=at: x.select(dim, at))
        elif kind == "unsqueeze":
            take(f"unsqueeze {dim}", lambda x, dim=dim: x.unsqueeze(dim))
        elif kind == "second" and rank > 2:  # the batch second, and back
            take("second", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))
    return first, steps, words


@settings(max_examples=40, deadline=None)
@given(chains())
def test_any_chain_keeps_every_number_and_never_gets_longer(chain):
    shape, steps, words = chain
    module = Chain(steps)
    graph, before = straight(module, torch.zeros(shape))
    assert operations(graph) <= before, words
    for rows in BATCHES:
        x = numbers(rows, shape)
        assert torch.equal(run(graph, x), module(x)), words


@settings(max_examples=25, deadline=None)
@given(chains(), chains())
def test_done_twice_it_does_nothing_more(one, other):
    shape, steps, words = one
    graph, _ = straight(Chain(steps), torch.zeros(shape))
    before = operations(graph)
    straighten(graph)
    assert operations(graph) == before, words


# --- chains that models write -----------------------------------------------------------------------------------------


def test_views_and_transpositions_of_heads_become_one_of_each():
    class Heads(nn.Module):
        def forward(self, x):
            y = (x * 2).transpose(0, 1).contiguous()  # [token, batch, feature]
            y = y.view(6, -1, 8).transpose(0, 1).reshape(-1, 4, 6, 8)
            return (y + 1).reshape(x.shape[0], -1)

    graph, _ = straight(Heads(), torch.zeros(6, 32))
    moved = [target for target in targets(graph) if target not in (aten.sym_size.int, aten.mul.Tensor, aten.add.Tensor)]
    # dense as the model's own copy left it; the last is the test's own
    assert moved == [aten.reshape.default, aten.permute.default, aten.contiguous.default, aten.reshape.default]
    for rows in BATCHES:
        x = numbers(rows, (6, 32))
        assert torch.equal(run(graph, x), Heads()(x))


def test_what_undoes_itself_is_gone():
    graph, _ = straight(Chain([lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2)]), torch.zeros(3, 5))
    assert not set(targets(graph)) & {aten.transpose.int, aten.permute.default}


class Windows(nn.Module):
    """8×8 places of 16 numbers, rolled by 2, in windows of 4×4, as Swin does."""

    def forward(self, x):
        y = (x * 2).view(-1, 8, 8, 16)
        y = y.roll((-2, -2), (1, 2))
        y = y.view(-1, 2, 4, 2, 4, 16).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 16, 16)
        return (y + 1).reshape(x.shape[0], -1)


def test_rolled_windows_are_one_choice_of_rows():
    graph, before = straight(Windows(), torch.zeros(64, 16))
    found = targets(graph)
    assert found.count(aten.index_select.default) == 1
    assert not set(found) & {aten.roll.default, aten.permute.default, aten.cat.default, aten.slice.Tensor}
    assert operations(graph) < before
    for rows in BATCHES:
        x = numbers(rows, (64, 16))
        assert torch.equal(run(graph, x), Windows()(x))


def test_rows_of_few_numbers_are_not_picked_one_by_one():
    class Narrow(nn.Module):
        def forward(self, x):
            return ((x * 2).roll(1, 1) + 1).reshape(x.shape[0], -1)

    graph, _ = straight(Narrow(), torch.zeros(8, 4))
    assert aten.index_select.default not in targets(graph)
    assert torch.equal(run(graph, numbers(3, (8, 4))), Narrow()(numbers(3, (8, 4))))


def test_samples_that_change_places_are_left_alone():
    """The same numbers, but of other samples: no choice within a sample says it."""
    graph, _ = straight(Chain([lambda x: x.roll(1, 0), lambda x: x.contiguous()]), torch.zeros(4, 16))
    for rows in BATCHES:
        x = numbers(rows, (4, 16))
        assert torch.equal(run(graph, x), (x.roll(1, 0) * 2 + 1).flatten(1))


def test_two_sources_joined_are_left_alone():
    class Joined(nn.Module):
        def forward(self, x0, x1):
            y = torch.cat([x0 * 2, x1 * 3], 1).transpose(1, 2).contiguous()
            return (y + 1).reshape(x0.shape[0], -1)

    graph, _ = straight(Joined(), torch.zeros(2, 16), torch.zeros(3, 16))
    one, other = numbers(3, (2, 16)), -numbers(3, (3, 16))
    assert torch.equal(run(graph, one, other), Joined()(one, other))


def test_a_product_keeps_a_dense_operand():
    """A convolution and a product of a turned value each take it apart; a copy before is one, not many."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(6, 5)

        def forward(self, x):
            return self.out((x * 2).unsqueeze(1).transpose(2, 3).squeeze(1).contiguous()).flatten(1)

    module = Turned()
    graph, _ = straight(module, torch.zeros(6, 4))
    (product,) = (node for node in graph.graph.nodes if node.target is aten.linear.default)
    assert product.args[0].target is aten.contiguous.default
    for rows in BATCHES:
        assert torch.allclose(run(graph, numbers(rows, (6, 4))), module(numbers(rows, (6, 4))), rtol=1e-5)


@pytest.mark.parametrize("steps", [2, 4])
def test_an_encoder_that_only_turns_its_input_and_back_still_has_a_segment(steps):
    class Back(nn.Module):
        def forward(self, x):
            for _ in range(steps):
                x = x.view(-1, 2, 3).transpose(1, 2).contiguous().transpose(1, 2).reshape(-1, 6)
            return x

    graph = fuse([capture(Back().eval(), {"x": torch.zeros(6)}, name="image")], None, [])
    passes.optimise(graph)
    (segment,) = cut(graph).modules.values()
    x = torch.randn(3, 6)
    assert torch.equal(segment(x)[0], x)


# --- learned products behind a transposition of the batch -------------------------------------------------------------


class Second(nn.Module):
    """A product of [token, batch, feature], and on from there."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(16, 24)

    def forward(self, x):
        y = self.out((x * 2).transpose(0, 1))
        return torch.tanh(y).transpose(0, 1).flatten(1)


def test_a_product_with_the_batch_second_is_one_with_the_batch_first():
    torch.manual_seed(0)
    module = Second().eval()
    graph, _ = straight(module, torch.zeros(6, 16))
    (product,) = (node for node in graph.graph.nodes if node.target is aten.linear.default)
    assert product.args[0].meta["mmpipe"].shape == ("B", 6, 16)
    assert product.meta["mmpipe"].shape == ("B", 6, 24)
    for rows in BATCHES:
        x = torch.randn(rows, 6, 16)
        assert (run(graph, x) - module(x)).abs().max() <= 1e-5


def test_marks_tell_the_shapes_that_values_have():
    """Who cuts the graph, and who lowers it, goes by them."""
    for module, shape in ((Second(), (6, 16)), (Windows(), (64, 16))):
        graph, _ = straight(module, torch.zeros(shape))
        for rows in (2, 3):

            class Seen(torch.fx.Interpreter):
                def run_node(self, node, rows=rows):
                    result = super().run_node(node)
                    if isinstance(result, torch.Tensor) and node.op == "call_function":
                        told = [
                            size if isinstance(size, int) else rows * int(size.removesuffix("B").rstrip("*") or 1)
                            for size in node.meta["mmpipe"].shape
                        ]
                        assert list(result.shape) == told, node
                    return result

            with torch.no_grad():
                Seen(graph).run(torch.randn(rows, *shape))
