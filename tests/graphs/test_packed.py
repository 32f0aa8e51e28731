"""bfloat16 products on packed weights, against the same graph without."""

from __future__ import annotations

import pytest
import torch
from support.lowering import Case, permuted_alike
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmpipe.graphs.backends import Target, lower
from mmpipe.graphs.backends.packed import available, packed
from mmpipe.graphs.capture import capture
from mmpipe.graphs.cut import cut
from mmpipe.graphs.fuse import fuse
from mmpipe.graphs.precision import lowered

aten = torch.ops.aten
here = pytest.mark.skipif(not available(), reason="this processor has no bfloat16 products, or torch no oneDNN")
POINTWISE = torch.ops.mkldnn._linear_pointwise
ROWS, TOKENS, WIDTH = 8, 10, 32


def segment_of(module):
    torch.manual_seed(0)
    made = cut(fuse([capture(module.eval(), {"x": torch.zeros(TOKENS, WIDTH)}, name="image")], None, []))
    return made.plan.segments[0], made.modules["image@0"]


def short_of(module):
    return lowered(segment_of(module)[1], torch.bfloat16)


def targets(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def rows(count=ROWS):
    return torch.randn(count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


class Layers(nn.Module):
    """`after` says what is done with a product."""

    def __init__(self, after, width=WIDTH, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(WIDTH, width, bias=bias), nn.Linear(width, WIDTH, bias=bias)
        self.after = after

    def forward(self, x):
        return self.after(self, x).mean(1)


def mlp(activation):
    return lambda self, x: self.two(activation(self.one(x)))


CASES = {
    "alone": lambda self, x: self.two(self.one(x)),
    "relu": mlp(nn.functional.relu),
    "silu": mlp(nn.functional.silu),
    "gelu": mlp(nn.functional.gelu),
    "gelu by tanh": mlp(lambda y: nn.functional.gelu(y, approximate="tanh")),
    "another activation": mlp(torch.tanh),
    "residual": lambda self, x: (y := self.one(x)) + self.two(y),
    "residual first": lambda self, x: self.two(y := self.one(x)) + y,
    "two products": lambda self, x: self.one(x) + self.two(x),
    "doubled": lambda self, x: (y := self.two(self.one(x))) + y,
    "twice the residual": lambda self, x: torch.add(y := self.one(x), self.two(y), alpha=2),
    "a number": lambda self, x: self.two(self.one(x)) + 1.5,
    "a line for all": lambda self, x: self.two(y := self.one(x)) + y[:, :1],
    "read twice": lambda self, x: nn.functional.gelu(y := self.two(self.one(x))) * y,
    "turned": lambda self, x: self.two(self.one(x).unflatten(-1, (2, 16)).transpose(2, 3).flatten(2)),
    "turned residual": lambda self, x: (
        self.one(x).reshape(-1, WIDTH, TOKENS).transpose(1, 2) + self.two(self.one(x).relu())
    ),
    "statistics": lambda self, x: self.two(y := self.one(x)) + y.cumsum(1),  # float32 on purpose
}


@here
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CASES)
def test_it_computes_what_the_graph_does(kind, bias):
    """Within a rounding of bfloat16: an activation or a sum is rounded once here, twice there."""
    short = short_of(Layers(CASES[kind], bias=bias))
    made = packed(short)
    with torch.inference_mode():
        for count in (1, 2, 5, 8):
            (want,), (got,) = short(rows(count)), made(rows(count))
            assert got.dtype == want.dtype
            assert (got - want).abs().max() <= 2**-7 * want.abs().max()
    assert aten.linear.default in targets(short)  # the module itself stays as it was
    assert aten.linear.default not in targets(made)


@here
@pytest.mark.parametrize("kind", CASES)
def test_a_row_s_bits_depend_on_its_sample_alone(kind):
    segment, module = segment_of(Layers(CASES[kind]))
    run = lower("eager", segment, module, Target(ROWS, torch.bfloat16))
    assert permuted_alike(run, Case(segment, module, (rows(),)))


@here
@pytest.mark.parametrize(
    ("kind", "with_it", "left"),
    [
        ("relu", POINTWISE.default, aten.relu.default),
        ("silu", POINTWISE.default, aten.silu.default),
        ("gelu", POINTWISE.default, aten.gelu.default),
        ("residual", POINTWISE.binary, aten.add.Tensor),
        ("residual first", POINTWISE.binary, aten.add.Tensor),
    ],
)
def test_what_follows_is_taken_along(kind, with_it, left):
    found = targets(packed(short_of(Layers(CASES[kind]))))
    assert with_it in found
    assert left not in found


@here
@pytest.mark.parametrize("kind", ["doubled", "twice the residual", "a number", "a line for all", "statistics"])
def test_what_is_no_plain_sum_of_two_such_values_stays(kind):
    found = targets(packed(short_of(Layers(CASES[kind]))))
    assert aten.add.Tensor in found
    assert POINTWISE.binary not in found


@here
def test_what_is_read_before_its_activation_too_is_kept():
    found = targets(packed(short_of(Layers(CASES["read twice"]))))
    assert aten.gelu.default in found


@here
def test_weights_are_held_once_and_those_of_the_module_stay():
    short = short_of(Layers(CASES["gelu"]))
    before = {name: tensor.clone() for name, tensor in short.named_buffers()}
    made = packed(short)
    assert {name for name, tensor in made.named_buffers() if tensor.is_mkldnn} == {
        f"image.{name}.weight_short_packed" for name in ("one", "two")
    }
    assert not {name for name in before if name.endswith("weight_short")} & {name for name, _ in made.named_buffers()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in short.named_buffers())


@here
@pytest.mark.parametrize("width", [WIDTH, 8])
@pytest.mark.parametrize("kind", CASES)
def test_matrices_may_come_long_and_are_shortened_one_by_one(kind, width):
    """Narrow ones are not packed, but shortened all the same."""
    if width != WIDTH and kind not in ("alone", "gelu"):
        pytest.skip("its shapes need the full width")
    module = segment_of(Layers(CASES[kind], width))[1]
    long = lowered(module, torch.bfloat16, matrices=False)
    shapes = [tuple(tensor.shape) for tensor in long.buffers() if tensor.ndim == 2]
    assert all(tensor.dtype == torch.float32 for tensor in long.buffers() if tensor.ndim == 2)
    assert len(shapes) == 2
    made = packed(long)
    assert torch.float32 not in {tensor.dtype for tensor in made.buffers() if tensor.ndim == 2}
    with torch.inference_mode():
        assert torch.equal(made(rows())[0], packed(lowered(module, torch.bfloat16))(rows())[0])


@here
def test_a_weight_of_two_products_is_packed_once():
    made = packed(short_of(Layers(lambda self, x: self.one(self.one(x).relu()))))
    assert targets(made).count(POINTWISE.default) == 2
    assert sum(tensor.is_mkldnn for tensor in made.buffers()) == 1


def test_float32_and_small_products_are_left_alone():
    plain = segment_of(Layers(CASES["gelu"]))[1]
    assert packed(plain) is plain
    narrow = short_of(Layers(CASES["gelu"], width=8))
    assert packed(narrow) is narrow


def test_a_computed_weight_is_left_alone():
    short = short_of(Layers(lambda self, x: nn.functional.linear(self.one(x), x[0, :, :] * 1.0)))
    found = targets(packed(short))
    assert aten.linear.default in found


def test_weights_on_another_device_are_left_alone():
    short = short_of(Layers(CASES["gelu"]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, tensor in list(short.named_buffers()):
            path, _, last = name.rpartition(".")
            short.get_submodule(path).register_buffer(last, torch.empty_like(tensor, device="cuda"))
        assert packed(short) is short
        (found,) = short(torch.empty(ROWS, TOKENS, WIDTH, device="cuda"))
    assert (found.device.type, tuple(found.shape)) == ("cuda", (ROWS, WIDTH))


def test_without_onednn_nothing_is_packed(monkeypatch):
    monkeypatch.setattr("mmpipe.graphs.backends.packed.available", lambda: False)
    short = short_of(Layers(CASES["gelu"]))
    assert packed(short) is short
