"""Each pass: what it removes, and that nothing else changed."""

from __future__ import annotations

import pytest
import torch
from support.parts import ORDER, PARTS, ROWS, batch, fused
from torch import nn

from mmpipe.graphs import passes
from mmpipe.graphs.capture import capture
from mmpipe.graphs.convolutions import fold_normalisation
from mmpipe.graphs.fuse import ExitSpec, fuse

aten = torch.ops.aten


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def only(module, example, name="image"):
    """A graph of one encoder."""
    return fuse([capture(module.eval(), example, name=name)], None, [])


def run(graph, *rows):
    graph.recompile()
    with torch.no_grad():
        return graph(*rows)["embeddings"]["image"]


def test_all_passes_leave_every_output_as_it_was():
    graph = fused(PARTS, [ExitSpec("image", ("image",)), ExitSpec("image+text", ("image", "text"))])
    rows = batch(6)
    with torch.no_grad():
        before = graph(*rows.values())
        removed = passes.optimise(graph)
        after = graph(*rows.values())
    for group in before:
        for name, want in before[group].items():
            assert (after[group][name] - want).abs().max() <= 1e-5 * want.abs().max()
    # they call torch's own attention, and have neither windows nor convolutions but of patches
    nothing_to_do = {"join_attention", "merge_products", "reorder", "fold_batch_norm", "channels_last"}
    assert {name for name, count in removed.items() if not count} == nothing_to_do


def test_drop_noops_removes_dropout_casts_and_reshapes_that_do_nothing():
    class Module(nn.Module):
        def forward(self, x):
            x = nn.functional.dropout(x, 0.5, self.training).to(torch.float32).reshape(-1, 4)
            return x.detach() * 2

    graph, x = only(Module(), {"x": torch.zeros(4)}), torch.randn(3, 4)
    want = run(graph, x)
    passes.drop_noops(graph)
    assert targets(graph) == [aten.mul.Tensor]
    assert torch.equal(run(graph, x), want)


def test_drop_noops_keeps_contiguous_before_a_view():
    class Module(nn.Module):
        def forward(self, x):
            return x.transpose(1, 2).contiguous().view(-1, 6)

    graph, x = only(Module(), {"x": torch.zeros(2, 3)}), torch.randn(3, 2, 3)
    want = run(graph, x)
    passes.drop_noops(graph)
    assert torch.equal(run(graph, x), want)


def test_share_weights_stores_equal_tensors_once():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.load_state_dict(self.one.state_dict())

        def forward(self, x):
            return self.one(x) + self.two(x) + self.other(x)

    graph, x = only(Module(), {"x": torch.zeros(4)}), torch.randn(3, 4)
    want = run(graph, x)
    assert passes.share_weights(graph) == (16 + 4) * 4
    assert len(dict(graph.named_buffers())) == 4
    assert torch.equal(run(graph, x), want)


def test_merge_common_computes_the_same_once_and_keeps_1_and_true_apart():
    class Module(nn.Module):
        def forward(self, x):
            return (
                torch.sin(x)
                + torch.sin(x)
                + x.sum(1, keepdim=True)
                + x.sum(1, keepdim=False).unsqueeze(1)
                + (x + 1) * (x + 1.5)
            )

    graph, x = only(Module(), {"x": torch.zeros(4)}), torch.randn(3, 4)
    want = run(graph, x)
    assert passes.merge_common(graph) == 1
    assert targets(graph).count(aten.sin.default) == 1
    assert torch.equal(run(graph, x), want)


def test_merge_common_keeps_copies_of_the_head_apart():
    graph = fused(PARTS, [ExitSpec("image", ("image",))])
    heads = {node.meta["mmpipe"].copy for node in graph.graph.nodes if node.meta["mmpipe"].branch == "head"}
    passes.merge_common(graph)
    for copy in heads - {None}:
        tanh = [n for n in graph.graph.nodes if n.target is aten.tanh.default and n.meta["mmpipe"].copy == copy]
        assert len(tanh) == 2


def test_fold_constants_computes_what_depends_on_weights_alone():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ (self.weight.T.softmax(-1) * 2) + torch.arange(4).float()

    graph, x = only(Module(), {"x": torch.zeros(4)}), torch.randn(3, 4)
    want = run(graph, x)
    passes.fold_constants(graph)
    assert targets(graph) == [aten.matmul.default, aten.add.Tensor]
    assert torch.equal(run(graph, x), want)


def test_fold_constants_leaves_what_would_blow_up():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("one", torch.ones(1, 1))

        def forward(self, x):
            return x + self.one.expand(1024, 1024).sum() * 0 + self.one.expand(2048, 2048).clone()[0, :4]

    graph = only(Module(), {"x": torch.zeros(4)})
    passes.fold_constants(graph)
    stored = sum(buffer.nbytes for buffer in graph.buffers())
    assert stored < 1 << 21


class Normalised(nn.Module):
    def __init__(self, padding):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6])[:, None, None])
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25])[:, None, None])
        self.conv = nn.Conv2d(3, 8, 4, stride=4, padding=padding, bias=False)

    def forward(self, pixels):
        x = (pixels.to(torch.float32) / 255 - self.mean) / self.std
        return self.conv(x).flatten(1).mean(1, keepdim=True)


def test_fold_normalisation_into_an_unpadded_convolution():
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    graph = only(Normalised(0), ROWS["image"])
    want = run(graph, pixels)
    assert fold_normalisation(graph) == 3 + 3  # div, sub, div; and weight, mean, std as they were
    assert targets(graph)[:2] == [aten.to.dtype, aten.conv2d.default]
    assert (run(graph, pixels) - want).abs().max() <= 2e-6 * want.abs().max().clamp_min(1)


def test_a_padded_convolution_keeps_its_normalisation():
    graph = only(Normalised(1), ROWS["image"])
    before = targets(graph)
    assert fold_normalisation(graph) == 0
    assert targets(graph) == before


def test_a_value_that_something_else_reads_is_not_folded_away():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 4)

        def forward(self, pixels):
            x = pixels.to(torch.float32) * 0.5
            return self.conv(x).mean((2, 3)) + x.mean((1, 2, 3))[:, None]

    graph = only(Module(), ROWS["image"])
    assert fold_normalisation(graph) == 0


def test_order_of_branches_is_the_order_of_presence():
    graph = fused(PARTS, [])
    assert list(graph(*batch(1).values())["embeddings"]) == list(ORDER)


def test_align_products_pads_the_inner_dimension_and_changes_nothing_else():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(10, 7), nn.Linear(16, 3)
            self.register_buffer("matrix", torch.randn(7, 16))

        def forward(self, x):
            return self.two(self.one(x) @ self.matrix)

    graph, x = only(Module(), {"x": torch.zeros(10)}), torch.randn(3, 10)
    want = run(graph, x)
    assert passes.align_products(graph) == 2
    assert targets(graph).count(aten.constant_pad_nd.default) == 2
    assert (run(graph, x) - want).abs().max() <= 1e-6 * want.abs().max()


class Product(nn.Module):
    """x @ a constant matrix [in, out], as a head compares with its prototypes."""

    def __init__(self, inner, outer):
        super().__init__()
        self.register_buffer("matrix_IO", torch.randn(inner, outer))

    def forward(self, input):
        return input @ self.matrix_IO


@pytest.mark.parametrize("outer", [1, 3, 5, 6, 7, 9, 10, 16])
@pytest.mark.parametrize(("kind", "inner"), [(nn.Linear, 65), (Product, 65), (Product, 64)])
def test_after_it_a_row_s_bits_do_not_depend_on_its_place(kind, inner, outer):
    torch.manual_seed(0)
    graph = only(kind(inner, outer), {"input": torch.zeros(inner)})
    x = torch.randn(32, inner)
    before = run(graph, x)
    assert passes.align_products(graph) == 1
    want = run(graph, x)
    assert (want - before).abs().max() <= 1e-5 * before.abs().max()
    for shift in range(1, 32):
        assert torch.equal(run(graph, x.roll(shift, 0)), want.roll(shift, 0))


class Attention(nn.Module):
    """Self-attention over tokens [batch, token, 32]: 4 heads of 8."""

    def __init__(self, mask=None, causal=False):
        super().__init__()
        self.causal = causal
        self.register_buffer("mask", mask)

    def forward(self, x):
        q, k, v = (x.unflatten(-1, (4, 8)).transpose(1, 2) * scale for scale in (1.0, 0.7, 1.3))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.causal)
        return mixed.transpose(1, 2).reshape(x.shape[0], -1)


KINDS_OF_ATTENTION = {
    "plain": Attention(),
    "causal": Attention(causal=True),
    "bool mask": Attention(torch.ones(17, 17, dtype=torch.bool).tril()),
    "float mask": Attention(torch.linspace(-2, 0, 17 * 17).reshape(17, 17)),
    "mask of keys": Attention((torch.arange(17) < 11).reshape(1, 17)),
}


@pytest.mark.parametrize("kind", KINDS_OF_ATTENTION)
def test_align_attention_pads_queries_and_a_row_s_bits_do_not_depend_on_its_thread(kind):
    torch.manual_seed(0)
    graph, x = only(KINDS_OF_ATTENTION[kind], {"x": torch.zeros(17, 32)}), torch.randn(8, 17, 32)
    want = run(graph, x)
    assert passes.align_attention(graph) == 1
    passes.verify(graph)
    assert targets(graph).count(aten.constant_pad_nd.default) == (2 if kind in ("bool mask", "float mask") else 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        got = run(graph, x)
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()
        for shift in range(1, 8):
            assert torch.equal(run(graph, x.roll(shift, 0)), got.roll(shift, 0))
    finally:
        torch.set_num_threads(threads)


def test_align_attention_leaves_what_is_aligned():
    for tokens in (16, 32, 50):
        graph = only(Attention(), {"x": torch.zeros(tokens, 32)})
        assert passes.align_attention(graph) == 0
