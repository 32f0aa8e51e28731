"""Convolutions that compute what follows them, against the same graph without."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from support.lowering import Case, permuted_alike
from torch import nn

from mmpipe.graphs import passes
from mmpipe.graphs.backends import Target, lower
from mmpipe.graphs.backends.convolved import convolved
from mmpipe.graphs.backends.packed import available
from mmpipe.graphs.capture import capture
from mmpipe.graphs.cut import cut
from mmpipe.graphs.fuse import fuse
from mmpipe.graphs.precision import lowered

aten = torch.ops.aten
JOINED = torch.ops.mkldnn._convolution_pointwise
here = pytest.mark.skipif(not available(), reason="this processor has no bfloat16 products")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=here)]
ROWS, CHANNELS, SIDE = 8, 16, 9
SHAPE = (CHANNELS, SIDE, SIDE)


def segment_of(module, shape=SHAPE):
    graph = fuse([capture(module.eval(), {"x": torch.zeros(shape)}, name="image")], None, [])
    passes.optimise(graph)
    made = cut(graph)
    return made.plan.segments[0], made.modules["image@0"]


def joined(module):
    return sum(node.target in (JOINED.default, JOINED.binary) for node in module.graph.nodes)


def pictures(count=ROWS, shape=SHAPE):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


class Layers(nn.Module):
    """Two convolutions; `after` says what is done with them."""

    def __init__(self, after, bias=True, **options):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=bias)
        self.two = nn.Conv2d(CHANNELS, CHANNELS, **{"kernel_size": 3, "padding": 1, "bias": bias, **options})
        self.after = after

    def forward(self, x):
        return self.after(self, x).flatten(1)


F = nn.functional
CASES = {
    "alone": (0, lambda self, x: self.two(self.one(x))),
    "relu": (2, lambda self, x: self.two(self.one(x).relu()).relu()),
    "in place": (2, lambda self, x: self.two(self.one(x).relu_()).relu_()),
    "silu": (1, lambda self, x: self.two(F.silu(self.one(x)))),
    "gelu": (1, lambda self, x: self.two(F.gelu(self.one(x)))),
    "gelu by tanh": (1, lambda self, x: self.two(F.gelu(self.one(x), approximate="tanh"))),
    "hardswish": (1, lambda self, x: self.two(F.hardswish(self.one(x)))),
    "another activation": (0, lambda self, x: self.two(self.one(x).tanh())),
    "residual": (2, lambda self, x: (self.two(self.one(x).relu()) + x).relu()),
    "residual first": (1, lambda self, x: x + self.two(self.one(x))),
    "residual read twice": (1, lambda self, x: (y := self.two(self.one(x)) + x) * y.relu()),
    "two convolutions": (1, lambda self, x: (self.one(x) + self.two(x)).relu()),
    "its own input": (1, lambda self, x: (y := self.one(x)) + self.two(y)),
    "doubled": (0, lambda self, x: (y := self.one(x)) + y),
    "twice the residual": (0, lambda self, x: torch.add(self.one(x), self.two(x), alpha=2)),
    "a number": (0, lambda self, x: self.one(x) + 1.5),
    "a line for all": (0, lambda self, x: self.one(x) + x[:, :, :1]),
    "turned": (1, lambda self, x: self.one(x) + x.transpose(2, 3)),
    "read twice": (0, lambda self, x: (y := self.one(x)).relu() * y),
    "its own sum": (1, lambda self, x: (y := x.relu(), self.two(y) + y)[1].relu()),
    "another silu after the sum": (1, lambda self, x: F.silu(self.one(x) + x)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CASES)
def test_it_computes_what_the_graph_does(kind, bias, dtype):
    """In bfloat16 within a rounding: an activation or a sum is rounded once here, twice there."""
    count, after = CASES[kind]
    short = lowered(segment_of(Layers(after, bias))[1], dtype)
    made = convolved(short, ROWS)
    assert joined(made) == count
    assert joined(short) == 0  # it is a copy
    with torch.inference_mode():
        for rows in (1, 2, 5, 8):
            (found,), (wanted,) = made(pictures(rows)), short(pictures(rows))
            assert found.dtype == wanted.dtype
            bound = 2e-6 if dtype == torch.float32 else 1e-2
            assert (found - wanted).abs().max() <= bound * wanted.abs().max(), rows


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"stride": (2, 1), "padding": (0, 1)},
        {"dilation": 2, "padding": 2},
        {"groups": CHANNELS},
        {"groups": 4},
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": 5, "padding": 2, "groups": CHANNELS},
    ],
)
def test_strides_padding_dilation_and_groups(options):
    module = segment_of(Layers(lambda self, x: self.two(self.one(x).relu()).relu(), **options))[1]
    made = convolved(module, ROWS)
    assert joined(made) == 2
    with torch.inference_mode():
        (found,), (wanted,) = made(pictures()), module(pictures())
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("first", [False, True])
def test_sums_with_an_activation_however_the_picture_lies(first, kernel, groups, dtype):
    """`first`: the picture comes as it was given, its channels not last."""

    def after(self, x):
        y = x if first else self.one(x).relu()
        return (self.two(y) + y).relu()

    options = {"kernel_size": kernel, "padding": kernel // 2, "groups": groups}
    short = lowered(segment_of(Layers(after, **options))[1], dtype)
    made = convolved(short, ROWS)
    assert joined(made) == (groups == 1) + (not first)
    with torch.inference_mode():
        (found,), (wanted,) = made(pictures()), short(pictures())
    assert (found - wanted).abs().max() <= (2e-6 if dtype == torch.float32 else 1e-2) * wanted.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("between", ["nothing", "pool", "sum"])
@pytest.mark.parametrize("before", [{"kernel_size": 1}, {"kernel_size": 3, "padding": 1, "groups": CHANNELS}])
def test_a_weight_that_could_lie_either_way_says_nothing_of_its_result(before, between, dtype):
    """A weight of one place or one channel is in both orders: what it makes of a picture lies as the picture does."""

    def after(self, x):
        y = self.before(x)
        y = {"nothing": lambda: y, "pool": lambda: F.max_pool2d(y, 1), "sum": lambda: y + x}[between]()
        return (self.two(y) + x).relu()

    module = Layers(after, kernel_size=1, padding=0)
    module.before = nn.Conv2d(CHANNELS, CHANNELS, **before)
    short = lowered(segment_of(module)[1], dtype)
    made = convolved(short, ROWS)
    assert joined(made) >= 1
    with torch.inference_mode():
        (found,), (wanted,) = made(pictures()), short(pictures())
    assert (found - wanted).abs().max() <= (2e-6 if dtype == torch.float32 else 1e-2) * wanted.abs().max()


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_what_a_model_computes_in_other_types_stays(kind):
    module = Layers(lambda self, x: self.two(x.to(kind)).relu().float())
    module.two.to(kind)
    short = segment_of(module)[1]
    assert convolved(short, ROWS) is short


@pytest.mark.parametrize(
    ("shape", "rows", "dtype", "count"),
    [
        ((CHANNELS, 1, 1), 8, torch.float32, 0),  # one place
        (SHAPE, 1, torch.float32, 0),
        pytest.param(SHAPE, 1, torch.bfloat16, 1, marks=here),
        (SHAPE, 2, torch.float32, 1),
    ],
)
def test_what_starts_sooner_as_it_is_stays(shape, rows, dtype, count):
    module = segment_of(Layers(lambda self, x: self.two(x).relu(), kernel_size=1, padding=0), shape)[1]
    made = convolved(lowered(module, dtype), rows)
    assert joined(made) == count


def test_weights_are_the_graphs_own():
    segment, module = segment_of(Layers(CASES["relu"][1]))
    run = lower("eager", segment, module, Target(ROWS))
    with torch.inference_mode():
        before = run(pictures())[0].clone()
        for tensor in module.buffers():
            tensor.mul_(2)
        assert not torch.equal(run(pictures())[0], before)
        assert torch.allclose(run(pictures())[0], module(pictures())[0], rtol=1e-5)


def trained(module):
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
    return module.eval()


NETS = {
    "resnet18": lambda: torchvision.models.resnet18(),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=0),
    "efficientnet": lambda: timm.create_model("efficientnet_b0", num_classes=0),
    "regnet": lambda: timm.create_model("regnety_002", num_classes=0),
}


@pytest.mark.parametrize("name", NETS)
def test_real_networks_have_no_norm_left_and_agree(name):
    """Their activations work in place: what is captured of them is functionalised, and its norms are whole again."""
    module, shape = trained(NETS[name]()), (3, 64, 64)
    segment, made = segment_of(module, shape)
    assert not [node for node in made.graph.nodes if "norm" in str(node.target) and node.op == "call_function"]
    assert joined(convolved(made, ROWS)) >= 10
    x = pictures(shape=shape)
    with torch.inference_mode():
        wanted = module(x)
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
            (found,) = lower("eager", segment, made, Target(ROWS, dtype))(x)
            assert (found - wanted).abs().max() <= bound * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3"])
def test_a_row_has_the_same_bits_wherever_it_is(name, dtype):
    segment, module = segment_of(trained(NETS[name]()), (3, 64, 64))
    case = Case(segment, module, (pictures(shape=(3, 64, 64)),))
    assert permuted_alike(lower("eager", segment, module, Target(ROWS, dtype)), case)


def test_without_bfloat16_products_it_stays_as_it_is(monkeypatch):
    short = lowered(segment_of(Layers(CASES["relu"][1]))[1], torch.bfloat16)
    monkeypatch.setattr("mmpipe.graphs.backends.convolved.multiplies_bfloat16", lambda: False)
    assert convolved(short, ROWS) is short
