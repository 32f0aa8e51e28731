"""A transformer's MLP as one operation of our own, against PyTorch's in float32; and where it is left alone."""

from __future__ import annotations

import pytest
import torch
from support.lowering import tiles_here
from torch import nn

from mmpipe.graphs.backends import Target, examples_of, lower, native, operations
from mmpipe.graphs.capture import capture
from mmpipe.graphs.cut import cut
from mmpipe.graphs.fuse import fuse
from mmpipe.graphs.passes import optimise
from mmpipe.runtime.executor import threads_of

PLAINLY = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Weights:
    def __init__(self, width, between, columns, seed=0):
        make = torch.Generator().manual_seed(seed)
        self.width, self.columns, self.make = width, columns, make
        self.first = (torch.randn(between, width, generator=make) / width**0.5).to(torch.bfloat16)
        self.second = (torch.randn(columns, between, generator=make) / between**0.5).to(torch.bfloat16)
        self.biases = torch.randn(between, generator=make), torch.randn(columns, generator=make)

    def rows(self, *shape):
        """→ x, what is added."""
        return tuple(torch.randn(*shape, n, generator=self.make).to(torch.bfloat16) for n in (self.width, self.columns))

    def norm(self, eps=1e-5):
        return torch.randn(self.width, generator=self.make), torch.randn(self.width, generator=self.make), eps

    def ours(self, x, activation="gelu", other=None, norm=None, **more):
        first, second = operations.tiled(self.first), operations.tiled(self.second)
        number = operations.ACTIVATIONS[activation]
        return operations.mlp(x, first, self.biases[0], second, self.biases[1], number, other, norm, **more)

    def wanted(self, x, activation="gelu", other=None, norm=None):
        x = x.float()
        if norm is not None:
            x = torch.layer_norm(x, [self.width], norm[0], norm[1], norm[2]).to(torch.bfloat16).float()
        between = PLAINLY[activation](nn.functional.linear(x, self.first.float(), self.biases[0]))
        found = nn.functional.linear(between.to(torch.bfloat16).float(), self.second.float(), self.biases[1])
        return found if other is None else found + other.float()


def close(found, want):
    """Within what rounding the result, and what is between the products, to bfloat16 does."""
    assert found.shape == want.shape
    return bool((found.float() - want).abs().max() <= 2**-7 * want.abs().max())


@tiles_here
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("sizes", [(32, 32, 32), (96, 384, 96), (64, 128, 32), (32, 64, 96), (384, 1536, 384)])
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100, 600])
def test_every_shape_is_pytorchs(sizes, rows):
    weights = Weights(*sizes)
    x, other = weights.rows(rows)
    for activation in operations.ACTIVATIONS:
        assert close(weights.ours(x, activation), weights.wanted(x, activation))
    assert close(weights.ours(x, other=other), weights.wanted(x, other=other))
    norm = weights.norm()
    assert close(weights.ours(x, other=other, norm=norm), weights.wanted(x, other=other, norm=norm))


@tiles_here
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("activation", list(operations.ACTIVATIONS))
def test_activations_are_exact_to_a_rounding(activation):
    weights = Weights(32, 32, 32)
    weights.first = weights.second = torch.eye(32).to(torch.bfloat16)
    weights.biases = torch.zeros(32), torch.zeros(32)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # all there are
    x = every[every.isfinite() & ((every.abs() > 1e-30) | (every == 0)) & (every.abs() < 1e30)]
    x = torch.cat([x, torch.zeros(-len(x) % 32, dtype=x.dtype)]).view(-1, 32)
    want = PLAINLY[activation](x.float())
    assert bool(((weights.ours(x, activation).float() - want).abs() <= 2**-8 * want.abs() + 2.5e-5).all())


@tiles_here
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("normed", [False, True])
def test_rows_are_their_own_in_any_order_batch_and_number_of_threads(normed):
    weights = Weights(96, 384, 96)
    x, other = weights.rows(9, 90)  # few enough for threads to share a row's columns, or not, by their number
    norm = weights.norm() if normed else None
    found = weights.ours(x, other=other, norm=norm)
    for threads in (1, 2, 3, 8):
        with threads_of(threads):
            assert torch.equal(weights.ours(x, other=other, norm=norm), found)
    order = torch.randperm(9)
    assert torch.equal(weights.ours(x[order], other=other[order], norm=norm), found[order])
    for n in range(9):
        assert torch.equal(weights.ours(x[n : n + 1], other=other[n : n + 1], norm=norm), found[n : n + 1])
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(weights.ours(turned, other=other, norm=norm), found)


@tiles_here
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("width", [96, 160, 384])
@pytest.mark.parametrize("rows", [0, 1, 33, 100, 600])
def test_norms_on_the_way_are_what_norms_apart_are_to_the_bit(width, rows):
    weights = Weights(width, 128, width)
    x, other = weights.rows(rows)
    norm, then = weights.norm(), weights.norm(1e-12)
    normed = operations.layer_norm(x, *norm)
    for threads in (1, 2, 3, 8):  # which share a row's columns, or not, by the number of rows
        with threads_of(threads):
            after = operations.layer_norm(weights.ours(x, other=other), *then)
            assert torch.equal(weights.ours(x, other=other, then=then), after)
            added = weights.ours(normed, other=normed)
            assert torch.equal(weights.ours(x, norm=norm, residual=True), added)
            assert torch.equal(
                weights.ours(x, norm=norm, residual=True, then=then), operations.layer_norm(added, *then)
            )


@tiles_here
@pytest.mark.usefixtures("loaded")
def test_a_result_too_large_for_a_cache_is_normed_too():
    weights = Weights(32, 64, 64)
    x, other = weights.rows(20_000)  # 2.5 MB
    then = torch.randn(64), torch.randn(64), 1e-5
    assert torch.equal(
        weights.ours(x, other=other, then=then), operations.layer_norm(weights.ours(x, other=other), *then)
    )


@tiles_here
@pytest.mark.usefixtures("loaded")
def test_a_row_that_is_no_number_spoils_no_other():
    weights = Weights(64, 128, 64)
    x, _ = weights.rows(70)
    for activation in operations.ACTIVATIONS:
        found = weights.ours(x, activation)
        spoiled = x.clone()
        spoiled[65, 3] = float("nan")
        seen = weights.ours(spoiled, activation)
        assert seen[65].isnan().all()
        seen[65] = found[65]
        assert torch.equal(seen, found)


@tiles_here
@pytest.mark.usefixtures("loaded")
def test_results_too_large_for_a_cache_are_the_same():
    weights = Weights(32, 64, 64)
    x, other = weights.rows(20_000)  # 2.5 MB
    for threads in (1, 2):
        with threads_of(threads):
            found = weights.ours(x, other=other)
            some = slice(7_001, 7_101)
            assert torch.equal(found[some], weights.ours(x[some], other=other[some]))
            assert close(found, weights.wanted(x, other=other))
            assert weights.ours(x[:0]).shape == (0, 64)


class Quick(nn.Module):
    """As OpenAI's CLIP has it; `rate` 1.702, or it is another activation."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        return x * torch.sigmoid(self.rate * x)


class Block(nn.Module):
    """One of a transformer's, without attention, in forms that models have and in some that ours is not made for."""

    TAKEN = ("normed first", "normed after", "normed around", "normed and read", "bare", "tanh", "relu", "quick")
    LEFT = ("silu", "narrow", "read twice", "quicker")

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        between = 80 if form == "narrow" else 128
        self.into, self.norm = nn.Linear(32, 64), nn.LayerNorm(64)
        self.before = nn.LayerNorm(64)
        self.first, self.second = nn.Linear(64, between, bias=form != "bare"), nn.Linear(between, 64)
        kinds = {"silu": nn.SiLU(), "relu": nn.ReLU(), "tanh": nn.GELU(approximate="tanh")}
        kinds |= {"quick": Quick(1.702), "quicker": Quick(2.0)}
        self.activation = kinds.get(form, nn.GELU())

    def forward(self, x):
        x = self.into(x)
        if self.form in ("normed around", "normed and read"):  # as BERT has it
            x = self.before(x)
        between = self.activation(self.first(self.norm(x) if self.form == "normed first" else x))
        found = self.second(between)
        if self.form == "normed first":
            found = x + found
        if self.form in ("normed after", "normed around", "normed and read"):
            found = self.norm(found + x)
        if self.form == "normed and read":
            found = found + x
        if self.form == "read twice":
            found = found + between[..., :64]
        return found.mean(1)


class Alike(nn.Module):
    """Two MLPs of equal matrices, each with biases of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(32, 64)
        self.firsts = nn.ModuleList(nn.Linear(64, 128) for _ in range(2))
        self.seconds = nn.ModuleList(nn.Linear(128, 64) for _ in range(2))
        for both in (self.firsts, self.seconds):
            both[1].weight = both[0].weight
            nn.init.normal_(both[1].bias)

    def forward(self, x):
        x = self.into(x)
        for first, second in zip(self.firsts, self.seconds, strict=True):
            x = second(nn.functional.gelu(first(x)))
        return x.mean(1)


def lowered_block(form, folder):
    return lowered_module(Block(form).eval(), folder)


def lowered_module(module, folder):
    graph = fuse([capture(module, {"x": torch.zeros(10, 32)}, name="image")], None, [])
    optimise(graph)
    made = cut(graph)
    (segment,) = made.plan.segments
    inner, target = made.modules[segment.name], Target(4, torch.bfloat16, folder=folder)
    nodes = [node for node in native.with_kernels(inner, target).graph.nodes if node.target is operations.mlp]
    saves = native.saved_seconds(inner) > 0
    run = lower("native" if saves else "eager", segment, inner, target, examples_of(made.plan, segment, 4))
    return module, nodes, run


@tiles_here
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("form", Block.TAKEN)
def test_an_mlp_takes_the_norms_around_it_and_what_is_added(form, folder):
    module, nodes, run = lowered_block(form, folder)
    (node,) = nodes
    other, norm, then, residual = node.args[6:]
    assert (other is not None) == (form in ("normed first", "normed after", "normed and read"))
    assert (norm is not None) == (form in ("normed first", "normed around"))
    assert (then is not None) == (form in ("normed after", "normed around", "normed and read"))
    assert residual == (form == "normed around")
    x = torch.randn(4, 10, 32)
    with torch.no_grad():
        assert close(run(x)[0], module(x))


@tiles_here
@pytest.mark.usefixtures("loaded")
def test_equal_matrices_may_have_biases_of_their_own(folder):
    module, nodes, run = lowered_module(Alike().eval(), folder)
    assert len(nodes) == 2
    x = torch.randn(4, 10, 32)
    with torch.no_grad():
        assert close(run(x)[0], module(x))


@tiles_here
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("form", Block.LEFT)
def test_what_it_is_not_made_for_is_left_to_onednn(form, folder):
    module, nodes, run = lowered_block(form, folder)
    assert not nodes
    x = torch.randn(4, 10, 32)
    with torch.no_grad():
        assert close(run(x)[0], module(x))
