"""Rows put into another order: fewer choices of rows, the same results, patches as a product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmpipe.graphs import passes
from mmpipe.graphs.capture import capture
from mmpipe.graphs.fuse import fuse
from mmpipe.graphs.layout import straighten
from mmpipe.graphs.patches import multiply_patches
from mmpipe.graphs.rows import reorder

aten = torch.ops.aten
SIDE, WINDOW, WIDTH = 8, 4, 16
BATCHES = (1, 2, 3, 5)


def graph_of(module, shape):
    graph = fuse([capture(module.eval(), {"x": torch.zeros(shape)}, name="image")], None, [])
    passes.drop_noops(graph)
    passes.fold_constants(graph)
    passes.merge_common(graph)
    return graph


def count(graph, target):
    return sum(node.target is target for node in graph.graph.nodes)


def parity(graph, module, shape):
    passes.verify(graph)
    graph.recompile()
    for rows in BATCHES:
        torch.manual_seed(rows)
        x = torch.randn(rows, *shape)
        with torch.no_grad():
            want, got = module(x), graph(x)["embeddings"]["image"]
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), rows


class Block(nn.Module):
    """A block of a transformer over windows; for attention, each row times its window's mean: it needs the windows."""

    def __init__(self, width, side, shift):
        super().__init__()
        self.norm, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.side, self.shift = side, shift

    def forward(self, x):
        batch, rows, width = x.shape
        count = self.side // WINDOW
        y = self.norm(x).view(batch, self.side, self.side, width)
        if self.shift:
            y = y.roll((-self.shift, -self.shift), (1, 2))
        y = y.view(batch, count, WINDOW, count, WINDOW, width).transpose(2, 3).reshape(-1, WINDOW * WINDOW, width)
        y = self.mix(y)
        y = self.out(y * y.mean(1, keepdim=True))
        y = (
            y.view(batch, count, count, WINDOW, WINDOW, width)
            .transpose(2, 3)
            .reshape(batch, self.side, self.side, width)
        )
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        x = x + y.reshape(batch, rows, width)
        return x + self.mlp(self.after(x))


class Windows(nn.Module):
    """Two blocks, neighbours joined as Swin does, two more; `kept`: the last rows are wanted as they were."""

    def __init__(self, *, kept=False):
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Linear(WIDTH, WIDTH)
        self.first = nn.Sequential(Block(WIDTH, SIDE, 0), Block(WIDTH, SIDE, 2))
        self.join = nn.Linear(4 * WIDTH, 2 * WIDTH)
        self.second = nn.Sequential(Block(2 * WIDTH, SIDE // 2, 0), Block(2 * WIDTH, SIDE // 2, 1))
        self.kept = kept

    def forward(self, x):
        x = self.first(self.start(x)).view(-1, SIDE, SIDE, WIDTH)
        parts = [x[:, a::2, b::2] for b in (0, 1) for a in (0, 1)]
        x = self.second(self.join(torch.cat(parts, -1).reshape(-1, (SIDE // 2) ** 2, 4 * WIDTH)))
        return x.flatten(1) if self.kept else x.mean(1)


@pytest.mark.parametrize("kept", [False, True])
def test_rows_stay_in_windows_where_that_leaves_out_choices_of_rows(kept):
    module, shape = Windows(kept=kept).eval(), (SIDE * SIDE, WIDTH)
    graph = graph_of(module, shape)
    straighten(graph)
    before = count(graph, aten.index_select.default)
    parity(graph, module, shape)
    left_out = reorder(graph)
    passes.merge_common(graph)
    parity(graph, module, shape)
    assert left_out > 0
    assert count(graph, aten.index_select.default) <= before - left_out


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Flatten())

    def forward(self, x):
        return self.layers(x)


def test_rows_that_nobody_moves_stay_where_they_are():
    module, shape = Plain().eval(), (4, WIDTH)
    graph = graph_of(module, shape)
    straighten(graph)
    assert reorder(graph) == 0
    parity(graph, module, shape)


class Patches(nn.Module):
    def __init__(self, kernel, bias=True, **options):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, kernel, bias=bias, **options)

    def forward(self, x):
        return self.conv(x).flatten(2).transpose(1, 2).mean(1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [(4, 4), (2, 8)])
def test_a_convolution_over_patches_becomes_a_product(kernel, bias):
    module, shape = Patches(kernel, bias=bias, stride=kernel).eval(), (3, 8, 16)
    graph = graph_of(module, shape)
    assert multiply_patches(graph) == 1
    assert count(graph, aten.conv2d.default) == 0
    parity(graph, module, shape)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (4, {"stride": 2}),
        (4, {"stride": 4, "padding": 1}),
        (2, {"stride": 2, "dilation": 2}),
        (3, {"stride": 3}),  # leaves a rim
        (1, {}),
    ],
)
def test_other_convolutions_stay(kernel, options):
    module, shape = Patches(kernel, **options).eval(), (3, 8, 16)
    graph = graph_of(module, shape)
    assert multiply_patches(graph) == 0
    parity(graph, module, shape)
