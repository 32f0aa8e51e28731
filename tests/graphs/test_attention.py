"""Attention as models write it out → one operation, and what must be left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmpipe.graphs import passes
from mmpipe.graphs.attention import join_attention, merge_products
from mmpipe.graphs.backends import Target, lower
from mmpipe.graphs.capture import capture
from mmpipe.graphs.cut import cut
from mmpipe.graphs.fuse import fuse

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
TOKENS, HEADS, WIDTH = 6, 2, 16
BATCHES = (1, 2, 3, 5, 8)


def graph_of(module, **examples):
    """Its graph as join_attention finds it: constants are tensors."""
    graph = fuse([capture(module.eval(), examples, name="image")], None, [])
    passes.drop_noops(graph)
    passes.fold_constants(graph)
    return graph


def count(graph, target):
    return sum(node.target is target for node in graph.graph.nodes)


def inputs(rows, module):
    torch.manual_seed(rows)
    x = torch.randn(rows, *module.shape)
    if not getattr(module, "masked", False):
        return (x,)
    mask = (torch.arange(TOKENS)[None] < torch.randint(1, TOKENS + 1, (rows, 1))).long()
    return x, mask


def examples(module):
    given = {"x": torch.zeros(module.shape)}
    return given | ({"mask": torch.ones(TOKENS, dtype=torch.long)} if getattr(module, "masked", False) else {})


def parity(graph, module):
    """The graph against the module, in float32, for every number of rows."""
    graph.recompile()
    for rows in BATCHES:
        given = inputs(rows, module)
        with torch.no_grad():
            want, got = module(*given), graph(*given)["embeddings"]["image"]
        assert (got - want).abs().max() <= 1e-5 * want.abs().max().clamp_min(1), rows


class Written(nn.Module):
    """Multi-head attention with its scores written out. Subclasses say what is done to them."""

    shape = (TOKENS, WIDTH)
    masked = False

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))
        self.register_buffer("bias", torch.randn(1, HEADS, TOKENS, TOKENS))

    def heads(self, x):
        return x.view(x.shape[0], TOKENS, HEADS, WIDTH // HEADS).transpose(1, 2)

    def weights(self, q, k, mask):
        return (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)

    def forward(self, x, mask=None):
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        mixed = self.weights(q, k, mask) @ v
        return mixed.transpose(1, 2).reshape(x.shape[0], -1)


class ScaleBefore(Written):
    def weights(self, q, k, mask):
        return ((q * 8**-0.5) @ k.transpose(-1, -2)).softmax(-1)


class ScaleTwice(Written):
    def weights(self, q, k, mask):
        return (q @ k.transpose(-1, -2) * 0.5 / 1.4).softmax(dim=3)


class Unscaled(Written):
    def weights(self, q, k, mask):
        return (q @ k.transpose(-1, -2)).softmax(-1)


class ConstantBias(Written):
    def weights(self, q, k, mask):
        return (q @ k.transpose(-1, -2) * 0.35 + self.bias).softmax(-1)


class BiasFirst(Written):
    def weights(self, q, k, mask):
        return (self.bias + q @ k.transpose(-1, -2) * 0.35).softmax(-1)


class InputMask(Written):
    masked = True

    def weights(self, q, k, mask):
        hidden = (1.0 - mask.to(torch.float32))[:, None, None, :] * torch.finfo(torch.float32).min
        return (q @ k.transpose(-1, -2) * 0.35 + hidden).softmax(-1)


class BiasAndMask(Written):
    masked = True

    def weights(self, q, k, mask):
        hidden = (1.0 - mask.to(torch.float32))[:, None, None, :] * -1e4
        return (q @ k.transpose(-1, -2) * 0.35 + self.bias + hidden).softmax(-1)


class ByProduct(Written):
    """A bias that is a product itself, of what the input says (as DeBERTa and Conformer have)."""

    def weights(self, q, k, mask):
        return (q @ k.transpose(-1, -2) * 0.35 + q @ self.bias.view(TOKENS, -1)[:, :TOKENS].repeat(2, 1)[:8]).softmax(
            -1
        )


class Swin(Written):
    """Windows of 6 tokens, three to a sample, each with its own mask; dimension 0 is 3 × batch."""

    shape = (3 * TOKENS, WIDTH)

    def __init__(self, alike=False):
        super().__init__()
        hidden = torch.where(torch.rand(3, TOKENS, TOKENS) < 0.3, -100.0, 0.0)
        self.register_buffer("hidden", hidden[:1].expand(3, -1, -1).contiguous() if alike else hidden)

    def forward(self, x, mask=None):
        y = x.reshape(-1, TOKENS, WIDTH)
        q, k, v = self.heads(self.q(y)), self.heads(self.k(y)), self.heads(self.v(y))
        scores = q @ k.transpose(-1, -2) * 0.35 + self.bias
        scores = scores.view(-1, 3, HEADS, TOKENS, TOKENS) + self.hidden[None, :, None]
        weights = scores.view(-1, HEADS, TOKENS, TOKENS).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(x.shape[0], -1)


JOINED = {
    "scale after": Written(),
    "no bias": Written(bias=False),
    "scale before": ScaleBefore(),
    "scaled twice": ScaleTwice(),
    "no scale": Unscaled(),
    "constant bias": ConstantBias(),
    "bias first": BiasFirst(),
    "mask from an input": InputMask(),
    "bias and mask": BiasAndMask(),
    "bias by a product": ByProduct(),
    "mask of windows": Swin(),
    "one mask for all windows": Swin(alike=True),
}


@pytest.mark.parametrize("kind", JOINED)
def test_written_out_attention_becomes_one_operation(kind):
    module = JOINED[kind]
    graph = graph_of(module, **examples(module))
    assert join_attention(graph) == 1
    passes.verify(graph)
    assert (count(graph, SDPA), count(graph, aten.softmax.int)) == (1, 0)
    parity(graph, module)


@pytest.mark.parametrize("kind", JOINED)
def test_all_passes_and_the_cut_keep_it(kind):
    module = JOINED[kind]
    graph = graph_of(module, **examples(module))
    passes.optimise(graph)
    assert (count(graph, SDPA), count(graph, aten.softmax.int)) == (1, 0)
    parity(graph, module)
    made = cut(graph)
    (segment,) = made.plan.segments
    for rows in BATCHES:
        given = inputs(rows, module)
        with torch.inference_mode():
            (got,) = lower("eager", segment, made.modules[segment.name], Target(rows))(*given)
            want = module(*given)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max().clamp_min(1)


@pytest.mark.parametrize("kind", JOINED)
def test_a_row_s_bits_depend_on_its_sample_alone(kind):
    module = JOINED[kind]
    graph = graph_of(module, **examples(module))
    passes.optimise(graph)
    given = inputs(8, module)
    with torch.no_grad():
        want = graph(*given)["embeddings"]["image"]
        for shift in range(1, 8):
            got = graph(*(one.roll(shift, 0) for one in given))["embeddings"]["image"]
            assert torch.equal(got, want.roll(shift, 0))


def test_one_mask_for_all_windows_is_held_once_and_others_once_a_window():
    for module, lines in ((Swin(alike=True), 1), (Swin(), 3)):
        graph = graph_of(module, **examples(module))
        join_attention(graph)
        (held,) = (tensor for name, tensor in graph.named_buffers() if "mask_of" in name)
        assert held.shape == (lines, HEADS, TOKENS, TOKENS)


# --- what is left alone -----------------------------------------------------------------------------------------------


class OverQueries(Written):
    def weights(self, q, k, mask):
        return (q @ k.transpose(-1, -2) * 0.35).softmax(-2)


class ReadTwice(Written):
    def forward(self, x, mask=None):
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        weights = (q @ k.transpose(-1, -2) * 0.35).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(x.shape[0], -1) + weights.mean((1, 2, 3))[:, None]


class ScoresReadTwice(Written):
    def forward(self, x, mask=None):
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        scores = q @ k.transpose(-1, -2)
        mixed = (scores * 0.35).softmax(-1) @ v
        return mixed.transpose(1, 2).reshape(x.shape[0], -1) + scores.mean((1, 2, 3))[:, None]


class ScaledWithItsBias(Written):
    """(q k + bias) · scale: the bias is scaled too."""

    def weights(self, q, k, mask):
        return ((q @ k.transpose(-1, -2) + self.bias) * 0.35).softmax(-1)


class NumberAndMask(Written):
    masked = True

    def weights(self, q, k, mask):
        hidden = (1.0 - mask.to(torch.float32))[:, None, None, :] * -1e4
        return (q @ k.transpose(-1, -2) * 0.35 + 1.0 + hidden).softmax(-1)


class MaskOfWindowsFirst(Swin):
    """As Swin, but the windows come before the samples in dimension 0: no mask once a sample says it."""

    def forward(self, x, mask=None):
        y = x.view(-1, 3, TOKENS, WIDTH).transpose(0, 1).reshape(-1, TOKENS, WIDTH)
        q, k, v = self.heads(self.q(y)), self.heads(self.k(y)), self.heads(self.v(y))
        scores = (q @ k.transpose(-1, -2)).view(3, -1, HEADS, TOKENS, TOKENS) + self.hidden[:, None, None]
        mixed = scores.view(-1, HEADS, TOKENS, TOKENS).softmax(-1) @ v
        return mixed.reshape(3, x.shape[0], -1).transpose(0, 1).reshape(x.shape[0], -1)


ALONE = {
    "softmax over the queries": OverQueries(),
    "softmax read twice": ReadTwice(),
    "scores read twice": ScoresReadTwice(),
    "bias scaled too": ScaledWithItsBias(),
    "a number and a mask": NumberAndMask(),
    "windows before samples": MaskOfWindowsFirst(),
}


@pytest.mark.parametrize("kind", ALONE)
def test_what_is_no_such_attention_is_left_alone(kind):
    module = ALONE[kind]
    graph = graph_of(module, **examples(module))
    assert join_attention(graph) == 0
    passes.optimise(graph)
    assert count(graph, aten.softmax.int) == 1
    parity(graph, module)


# --- products of the same value ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False, "some"])
def test_queries_keys_and_values_are_one_product(bias):
    module = Written(bias=bool(bias))
    if bias == "some":  # as BEiT and Whisper: keys have none
        module.k = nn.Linear(WIDTH, WIDTH, bias=False)
    graph = graph_of(module, **examples(module))
    join_attention(graph)
    assert merge_products(graph) == 2
    passes.verify(graph)
    (product,) = (node for node in graph.graph.nodes if node.target is aten.linear.default)
    assert product.meta["mmpipe"].shape == ("B", TOKENS, 3 * WIDTH)
    assert len(product.args) == (3 if bias else 2)
    parity(graph, module)


def test_products_that_something_else_reads_stay_apart():
    class Read(Written):
        def forward(self, x, mask=None):
            return super().forward(x) + self.q(x).tanh().flatten(1)

    module = Read()
    graph = graph_of(module, **examples(module))
    passes.merge_common(graph)
    join_attention(graph)
    assert merge_products(graph) == 0
    parity(graph, module)


def test_products_of_other_values_stay_apart():
    class Cross(Written):
        def forward(self, x, mask=None):
            other = x.tanh()
            q, k, v = self.heads(self.q(x)), self.heads(self.k(other)), self.heads(self.v(other))
            return (self.weights(q, k, mask) @ v).transpose(1, 2).reshape(x.shape[0], -1)

    module = Cross()
    graph = graph_of(module, **examples(module))
    join_attention(graph)
    assert merge_products(graph) == 1  # keys and values
    parity(graph, module)


class BatchSecond(nn.Module):
    """nn.MultiheadAttention on [token, batch, feature], as CLIP has it; `layer`: with all else that is in a layer."""

    shape = (TOKENS, 32)

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer
        self.attention = nn.MultiheadAttention(32, 2)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        y = x.permute(1, 0, 2)
        z = self.norm(y) if self.layer else y
        z = self.attention(z, z, z, need_weights=False)[0]
        if self.layer:
            z = y + z
            z = z + self.down(nn.functional.gelu(self.up(self.norm(z))))
        return z.permute(1, 0, 2).flatten(1)


def test_the_products_of_batch_second_attention_have_the_batch_first():
    module = BatchSecond(layer=False)
    graph = graph_of(module, **examples(module))
    passes.optimise(graph)
    products = [node for node in graph.graph.nodes if node.target is aten.linear.default]
    assert [node.args[0].meta["mmpipe"].shape for node in products] == [("B", TOKENS, 32)] * 2  # in, out
    parity(graph, module)


@pytest.mark.parametrize("layer", [False, True])
def test_no_product_is_taken_apart_into_one_a_sample(layer):
    """As torch takes one apart whose operand has the batch second and lies as it was: each with its own weights."""
    module = BatchSecond(layer)
    graph = graph_of(module, **examples(module))
    passes.optimise(graph)
    with torch.no_grad(), torch.profiler.profile() as seen:
        graph(torch.randn(5, *module.shape))
    assert "aten::bmm" not in {event.name for event in seen.events()}
    parity(graph, module)
