"""Convolutions with their norms folded in and channels last: the same results, and the same bits wherever a row is."""

from __future__ import annotations

import pytest
import torch
from support.lowering import Case, permuted_alike
from torch import nn

from mmpipe.graphs import passes
from mmpipe.graphs.backends import Target, lower
from mmpipe.graphs.capture import capture
from mmpipe.graphs.convolutions import channels_last, fold_batch_norm
from mmpipe.graphs.cut import cut
from mmpipe.graphs.fuse import fuse, get_tensor

aten = torch.ops.aten


def graph_of(module, shape):
    return fuse([capture(module.eval(), {"x": torch.zeros(shape)}, name="image")], None, [])


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def parity(graph, module, shape, bound=1e-5):
    passes.verify(graph)
    graph.recompile()
    for rows in (1, 2, 5):
        torch.manual_seed(rows)
        x = torch.randn(rows, *shape)
        with torch.no_grad():
            want, got = module(x), graph(x)["embeddings"]["image"]
        assert (got - want).abs().max() <= bound * want.abs().max(), rows


def trained(norm):
    """As after training: no two channels alike, one of them without variance, one switched off."""
    torch.manual_seed(1)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 4.0)
    norm.running_var[0] = 0.0
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.zeros_(norm.weight[1])
        nn.init.normal_(norm.bias)
    return norm


class Normed(nn.Module):
    def __init__(self, conv, norm):
        super().__init__()
        self.conv, self.norm = conv, trained(norm)

    def forward(self, x):
        return self.norm(self.conv(x)).relu().flatten(1)


@pytest.mark.parametrize(
    ("conv", "norm", "shape"),
    [
        (nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), (6, 7, 5)),
        (nn.Conv2d(6, 4, 3, stride=2), nn.BatchNorm2d(4, eps=1e-3), (6, 7, 5)),
        (nn.Conv2d(6, 4, 3, padding="same", groups=2), nn.BatchNorm2d(4, affine=False), (6, 7, 5)),
        (nn.Conv1d(6, 4, 3, dilation=2), nn.BatchNorm1d(4), (6, 9)),
        (nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), (2, 4, 5, 3)),
    ],
)
def test_a_norm_after_a_convolution_goes_into_its_weights(conv, norm, shape):
    module = Normed(conv, norm)
    graph = graph_of(module, shape)
    assert fold_batch_norm(graph) == 1
    assert aten.batch_norm.default not in targets(graph)
    assert len(dict(graph.named_buffers())) == 2  # the old weights are gone
    parity(graph, module, shape)


class Twice(nn.Module):
    """One convolution before two norms, its sum before a third, and a norm of what nobody multiplied."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList(trained(nn.BatchNorm2d(count)) for count in (4, 4, 4, 3))

    def forward(self, x):
        y = self.conv(self.norms[3](x))
        one, other = self.norms[0](y), self.norms[1](y)
        return self.norms[2](one + other).flatten(1)


def test_a_norm_whose_convolution_is_read_elsewhere_too_stays():
    module, shape = Twice(), (3, 6, 6)
    graph = graph_of(module, shape)
    assert fold_batch_norm(graph) == 0
    parity(graph, module, shape)


class Block(nn.Module):
    def __init__(self, width, stride):
        super().__init__()
        self.one = nn.Conv2d(width, 2 * width, 3, stride, 1, bias=False)
        self.norm = trained(nn.BatchNorm2d(2 * width))
        self.deep = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.skip = nn.Conv2d(width, 2 * width, 1, stride)

    def forward(self, x):
        return (self.deep(self.norm(self.one(x)).relu()) + self.skip(x)).relu()


class Net(nn.Module):
    """A stem, blocks of convolutions of every kind, and attention over the places that they leave."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 5, 2, 2)
        self.blocks = nn.Sequential(Block(16, 2), Block(32, 1))
        self.attend = nn.TransformerEncoderLayer(64, 2, 64, batch_first=True)
        self.out = nn.Linear(64 * 8 * 8, 12)

    def forward(self, x):
        y = self.blocks(nn.functional.max_pool2d(self.stem(x), 2))
        one, other = y.chunk(2, 1)
        y = torch.cat([other, one], 1)
        places = y.view(y.shape[0], 64, -1).transpose(1, 2)
        return self.out(self.attend(places).transpose(1, 2).reshape(y.shape[0], -1) + y.view(y.shape[0], -1))


SHAPE = (3, 64, 64)


def test_weights_lie_channels_last_and_views_still_read_what_they_did():
    module = Net()
    graph = graph_of(module, SHAPE)
    assert fold_batch_norm(graph) == 2
    assert channels_last(graph) == 7
    convs = [node for node in graph.graph.nodes if node.target is aten.conv2d.default]
    assert len(convs) == 7
    assert all(
        get_tensor(graph, node.args[1].target).is_contiguous(memory_format=torch.channels_last) for node in convs
    )
    parity(graph, module, SHAPE)
    parity(whole(module)[0], module, SHAPE)


class Grey(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.two(self.one(x).relu()).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_one_channel_too(dtype):
    """A weight of one channel lies both ways: its strides must say which, or the result is turned around twice."""
    module, shape = Grey(), (1, 12, 10)
    graph = graph_of(module, shape)
    assert channels_last(graph) == 2
    parity(graph, module, shape)
    first = next(node for node in graph.graph.nodes if node.target is aten.conv2d.default)
    weight_OIHW, bias_O = (get_tensor(graph, str(node.target)).to(dtype) for node in first.args[1:3])
    with torch.inference_mode():
        found = aten.conv2d(torch.rand(4, *shape).to(dtype), weight_OIHW, bias_O)
    assert found.is_contiguous(memory_format=torch.channels_last)


class Uneven(nn.Module):
    def __init__(self, kernel, stride, padding):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, kernel, stride=stride, padding=padding)

    def forward(self, x):
        return self.conv(x).flatten(1)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "shape"),
    [
        ((1, 4), (1, 4), 0, (1, 5, 5)),
        (3, (1, 4), 1, (1, 7, 3)),
        ((1, 32), (2, 1), 0, (1, 100, 128)),
        ((4, 1), 1, 0, (1, 6, 1)),
    ],
)
def test_of_one_channel_only_where_onednn_computes_it(kernel, stride, padding, shape):
    """With uneven steps it answers 1e38, or writes past its buffers."""
    module = Uneven(kernel, stride, padding)
    graph = graph_of(module, shape)
    assert channels_last(graph) == 1
    weight_OIHW = next(
        get_tensor(graph, str(n.target)) for n in graph.graph.nodes if n.op == "get_attr" and "weight" in n.name
    )
    assert weight_OIHW.stride(1) != 1 or 1 in weight_OIHW.shape[2:3]
    parity(graph, module, shape)


def whole(module):
    graph = graph_of(module, SHAPE)
    return graph, passes.optimise(graph)


class Strided(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen, self.free = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

    def forward(self, x):
        size = (x.shape[0], 8, 2, 2)
        return (self.seen(x).relu().as_strided(size, (288, 36, 6, 1)) + self.free(x)[:, :, :2, :2]).flatten(1)


def test_where_something_reads_memory_as_it_lies_weights_stay():
    module, shape = Strided(), (3, 8, 8)
    graph = graph_of(module, shape)
    assert channels_last(graph) == 1
    parity(graph, module, shape)


class Tied(nn.Module):
    """One weight that multiplies rows as well."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return (self.conv(x).flatten(1).sum(1, keepdim=True) + x.mean((2, 3))) @ self.conv.weight.view(8, 8)


def test_a_weight_that_others_read_stays():
    module, shape = Tied(), (8, 4, 4)
    graph = graph_of(module, shape)
    assert channels_last(graph) == 0
    parity(graph, module, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_wherever_it_is(dtype):
    graph, removed = whole(Net())
    assert removed["channels_last"] == 7
    made = cut(graph)
    (segment,) = (one for one in made.plan.segments if one.branch == "image")
    torch.manual_seed(2)
    case = Case(segment, made.modules[segment.name], (torch.randn(8, *SHAPE),))
    assert permuted_alike(lower("eager", segment, case.module, Target(8, dtype)), case)
