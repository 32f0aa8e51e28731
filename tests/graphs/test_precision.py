"""A segment in bfloat16: what is cast, and what stays float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmpipe.graphs.capture import capture
from mmpipe.graphs.cut import cut
from mmpipe.graphs.fuse import fuse, get_tensor
from mmpipe.graphs.precision import lowered

aten = torch.ops.aten
LOWEST = torch.finfo(torch.float32).min


def segment_of(module, example):
    """A module as the one segment of a graph."""
    made = cut(fuse([capture(module.eval(), example, name="image")], None, []))
    return made.modules["image@0"]


def types_at(module, *inputs):
    """Operation → the types that its tensor results have when it runs."""
    found = {}

    class Seen(torch.fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            if node.op == "call_function" and isinstance(result, torch.Tensor):
                found.setdefault(node.target, []).append(result.dtype)
            return result

    with torch.no_grad():
        results = Seen(module).run(*inputs)
    return found, results


class Block(nn.Module):
    """A norm, attention with a mask, a residual, an MLP."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(20, 16), nn.Parameter(torch.randn(6, 16))
        self.norm, self.qkv, self.mlp = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, ids, mask):
        x = self.embed(ids) + self.place
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        bias = (1.0 - mask.to(torch.float32))[:, None, :] * LOWEST
        scores = (q @ k.transpose(1, 2)) * 0.25 + bias
        x = x + scores.softmax(-1) @ v
        return nn.functional.normalize((x + self.mlp(x)).mean(1), dim=-1)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return segment_of(Block(), {"ids": torch.zeros(6, dtype=torch.int64), "mask": torch.ones(6, dtype=torch.int64)})


@pytest.fixture
def rows():
    ids = torch.arange(24).reshape(4, 6) % 20
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[1, 3:], mask[2, 1:], mask[3] = 0, 0, 0  # the last has nothing to see
    return ids, mask


def test_products_and_what_is_between_them_are_short_and_results_are_not(block, rows):
    types, (short,) = types_at(lowered(block, torch.bfloat16), *rows)
    for target in (aten.linear.default, aten.matmul.default, aten.softmax.int, aten.layer_norm.default):
        assert set(types[target]) == {torch.bfloat16}, target
    assert types[aten.add.Tensor] == [torch.bfloat16] * len(types[aten.add.Tensor])
    assert set(types[aten.mean.dim]) | set(types[aten.linalg_vector_norm.default]) == {torch.float32}
    with torch.no_grad():
        (plain,) = block(*rows)
    assert short.dtype == torch.float32
    assert torch.isfinite(short).all()  # a row without anything to see is no row of NaN
    assert torch.nn.functional.cosine_similarity(plain, short).min() > 0.999
    assert not torch.equal(plain, short)


class Pieces(nn.Module):
    """Words as sums of pieces, then a learned product."""

    def __init__(self):
        super().__init__()
        self.pieces, self.out = nn.Embedding(20, 16), nn.Linear(16, 4)

    def forward(self, ids):
        return self.out(self.pieces(ids).sum(dim=1))


def test_rows_that_are_picked_to_be_summed_are_not_shortened_in_between():
    torch.manual_seed(0)
    ids = torch.arange(18).reshape(3, 6)
    types, _ = types_at(lowered(segment_of(Pieces(), {"ids": ids[0]}), torch.bfloat16), ids)
    assert types[aten.embedding.default] == [torch.float32]
    assert types[aten.linear.default] == [torch.bfloat16]


def test_the_module_itself_stays_as_it_was(block, rows):
    with torch.no_grad():
        before = block(*rows)[0]
        lowered(block, torch.bfloat16)
        assert torch.equal(block(*rows)[0], before)
    assert lowered(block, torch.float32) is block


def test_weights_that_only_products_read_are_held_once(block):
    made = lowered(block, torch.bfloat16)
    types = {tuple(tensor.shape): tensor.dtype for tensor in made.buffers()}
    assert types[48, 16] == types[20, 16] == torch.bfloat16
    norm = next(node for node in made.graph.nodes if node.target is aten.layer_norm.default)
    # a CPU reads them beside a shorter input
    assert {get_tensor(made, node.target).dtype for node in norm.args[2:4]} == {torch.float32}
    assert sum(tensor.numel() for tensor in made.buffers()) == sum(tensor.numel() for tensor in block.buffers())


class Sound(nn.Module):
    """Log-mel, then a learned product."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mel", torch.rand(32, 8))
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        power = (x @ self.mel) ** 2
        return self.out(torch.log10(power.clamp_min(1e-10)) * 10).mean(1)


def test_all_that_a_logarithm_is_taken_of_stays_float32():
    torch.manual_seed(0)
    plain = segment_of(Sound(), {"x": torch.zeros(5, 32)})
    x = torch.randn(3, 5, 32) * 1e-3
    types, (short,) = types_at(lowered(plain, torch.bfloat16), x)
    assert types[aten.matmul.default] == [torch.float32]
    assert types[aten.linear.default] == [torch.bfloat16]
    with torch.no_grad():
        assert torch.allclose(short, plain(x)[0], rtol=0.03, atol=0.3)


def test_huge_constants_stay_finite():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 4)
            self.register_buffer("bias", torch.tensor([0.0, LOWEST, LOWEST, -torch.inf]))

        def forward(self, x):
            return (self.out(x) + self.bias).softmax(-1)

    made = lowered(segment_of(Masked(), {"x": torch.zeros(4)}), torch.bfloat16)
    held = next(tensor for tensor in made.buffers() if tensor.shape == (4,) and tensor.min() < -1e30)
    assert torch.isfinite(held).tolist() == [True, True, True, False]


def test_a_repeated_constant_is_shortened_before_it_is_repeated():
    """A mask of windows, once for each sample: at every call the cast would pass over all its copies."""

    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 4)
            self.register_buffer("mask", torch.tensor([0.0, LOWEST, 1 / 3, -torch.inf]))

        def forward(self, x):
            mask = self.mask.unsqueeze(0).expand(x.shape[0], -1).reshape(-1, 4)
            return (self.out(x) + mask).softmax(-1)

    torch.manual_seed(0)
    module = segment_of(Repeated(), {"x": torch.zeros(4)})
    made = lowered(module, torch.bfloat16)
    (expand,) = (node for node in made.graph.nodes if node.target is aten.expand.default)
    types, (short,) = types_at(made, torch.randn(3, 4))
    assert types[aten.expand.default] == [torch.bfloat16]
    assert types[aten.to.dtype] == [torch.bfloat16, torch.float32]  # what goes in, what comes out
    assert torch.isfinite(short).all()
    assert expand.meta["mmpipe"].dtype == torch.bfloat16  # a mark tells the type that a value has


def test_what_only_moves_statistics_is_cast_after_it():
    """It is no constant: an input, turned, is read as it is by what stays float32, and cast for a product."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(5, 4)

        def forward(self, x):
            turned = (x + 1).permute(0, 2, 1)
            return self.out(turned).mean(1) + turned.sum((1, 2))[:, None]

    torch.manual_seed(0)
    module, x = segment_of(Turned(), {"x": torch.zeros(5, 6)}), torch.randn(3, 5, 6)
    types, (short,) = types_at(lowered(module, torch.bfloat16), x)
    assert types[aten.sum.dim_IntList] == [torch.float32]
    with torch.no_grad():
        (plain,) = module(x)
    assert (short - plain).abs().max() <= 2**-7 * plain.abs().max()
