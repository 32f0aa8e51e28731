"""Attention that reads its heads inside wider rows, against attention over views of them."""

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


@tiles_here
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_are_read_where_they_lie_and_written_where_they_are_read(batch, masked):
    held = torch.randn(batch, 40, 3 * 2 * 24).to(torch.bfloat16)
    others = torch.randn(batch, 30, 2, 2, 24).to(torch.bfloat16)  # keys and values of other tokens, side by side
    query = held[..., 48:96].reshape(batch, 40, 2, 24).transpose(1, 2)
    key, value = (others[:, :, n].transpose(1, 2) for n in (0, 1))
    mask = torch.rand(batch, 1, 1, 30) < 0.7 if masked else None
    want = operations.attention(query, key, value, mask, 0.2).transpose(1, 2).reshape(batch, 40, 48)
    strides = (40 * 144, 24, 144), (30 * 96, 24, 96), (30 * 96, 24, 96)
    at = ((48, 0, 48), strides, (2, 40, 30, 24), (40, 48))
    assert torch.equal(operations.attention_within(held, others, others, *at, mask, 0.2), want)
    turned = held.transpose(0, 1).contiguous().transpose(0, 1)  # not as the graph says that it is
    assert torch.equal(operations.attention_within(turned, others.float(), others, *at, mask, 0.2), want)
    if batch:
        with pytest.raises(RuntimeError, match="not of the size"):
            operations.attention_within(held, others[:, 1:], others, *at, mask, 0.2)


class Placed(nn.Module):
    """Attention whose heads lie, and are read, in ways of their own."""

    PLAIN = ("side by side", "apart", "heads last", "other tokens", "windows")
    OTHER = ("turned", "read twice", "heads kept")

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.qkv, self.more, self.out = how, nn.Linear(32, 96), nn.Linear(32, 64), nn.Linear(32, 8)
        self.turn = nn.Linear(72, 72)

    def forward(self, x):
        batch, heads = x.shape[0], (2, 16)
        if self.how == "windows":
            q, k, v = self.qkv(x.reshape(batch * 2, 36, 32)).view(batch * 2, 36, 3, *heads).permute(2, 0, 3, 1, 4)
        elif self.how == "side by side":
            q, k, v = self.qkv(x).view(batch, 72, 3, *heads).permute(2, 0, 3, 1, 4)
        elif self.how == "heads last":
            q, k, v = (self.qkv(x).view(batch, 72, 2, 48)[..., n : n + 16].transpose(1, 2) for n in (0, 16, 32))
        else:
            q, k, v = (part.reshape(batch, 72, *heads).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if self.how == "other tokens":
            k, v = (part.reshape(batch, 20, *heads).transpose(1, 2) for part in self.more(x[:, :20]).chunk(2, dim=-1))
        if self.how == "turned":  # tokens of a value side by side, its numbers apart
            v = self.turn(x.transpose(1, 2)).reshape(batch, 2, 16, 72).transpose(2, 3)
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        if self.how == "heads kept":
            return found.mean(2).reshape(batch, -1)
        mixed = self.out(found.transpose(1, 2).reshape(batch, 72, 32))
        return (mixed + found.sum(dim=(1, 3)).unsqueeze(2) if self.how == "read twice" else mixed).mean(1)


def placed(how, folder):
    module = Placed(how).eval()
    graph = fuse([capture(module, {"x": torch.zeros(72, 32)}, name="image")], None, [])
    optimise(graph)
    made = cut(graph)
    return module, made, Target(4, torch.bfloat16, folder=folder)


def agrees(module, made, target):
    (segment,) = made.plan.segments
    run = lower("native", segment, made.modules[segment.name], target, examples_of(made.plan, segment, 4))
    x = torch.randn(4, 72, 32)
    with torch.no_grad():
        found, want = run(x)[0], module(x)
    return bool(nn.functional.cosine_similarity(found.float(), want).min() > 0.9995)


@tiles_here
@pytest.mark.parametrize("how", [*Placed.PLAIN, *Placed.OTHER])
def test_views_of_heads_need_no_operations_where_strides_say_where_they_are(how, folder):
    module, made, target = placed(how, folder)
    graph = native.with_kernels(made.modules["image@0"], target).graph
    found = [node.target for node in graph.nodes]
    within = how in Placed.PLAIN
    assert (found.count(operations.attention), found.count(operations.attention_within)) == (not within, within)
    if within:
        (node,) = (node for node in graph.nodes if node.target is operations.attention_within)
        assert not [one for one in node.all_input_nodes if one.target is torch.ops.aten.transpose.int]
    assert agrees(module, made, target)


@tiles_here
def test_a_view_that_was_edited_is_what_it_became(folder):
    module, made, target = placed("side by side", folder)
    inner = made.modules["image@0"]
    (node,) = (n for n in inner.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default)
    views = [n for n in inner.graph.nodes if n.target is torch.ops.aten.reshape.default and 3 in n.args[1][1:]]
    assert views
    for view in views:  # four heads of eight, as the same numbers may be read
        view.args = (view.args[0], [*view.args[1][:-2], 4, 8])
    node.kwargs = {**node.kwargs, "scale": 0.25}
    inner.recompile()
    x = 6 * torch.randn(4, 72, 32)  # far from looking at all alike
    (segment,) = made.plan.segments
    run = lower("native", segment, inner, target, examples_of(made.plan, segment, 4))
    with torch.no_grad():
        found, want, before = run(x)[0].float(), inner(x)[0], module(x)
    off = (found - want).abs().max()
    assert off < 0.1 * (want - before).abs().max()
    assert off < 0.03 * want.abs().max()
