"""Attention and layer norms of our own, against PyTorch's in float32; and that they are left out where they can't be
had."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from support import hub, lowering
from support.lowering import native_here as here
from support.lowering import tiles_here
from torch import nn

from mmpipe.graphs.backends import Target, Unlowerable, examples_of, kernels, lower, native, operations
from mmpipe.graphs.capture import capture
from mmpipe.graphs.cut import cut
from mmpipe.graphs.fuse import fuse
from mmpipe.graphs.passes import optimise
from mmpipe.runtime.executor import threads_of

plainly = nn.functional.scaled_dot_product_attention
LOWEST = torch.finfo(torch.bfloat16).min


def heads(batch, count, tokens, width, seed=0, spread=1.0):
    """As an encoder's product leaves them: tokens first, all heads of a token side by side."""
    made = torch.randn(batch, tokens, count * width, generator=torch.Generator().manual_seed(seed)) * spread
    return made.to(torch.bfloat16).view(batch, tokens, count, width).transpose(1, 2)


def wanted(query, key, value, mask, scale):
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.float()
        mask = mask.repeat(len(query) // len(mask), 1, 1, 1)
    return plainly(query.float(), key.float(), value.float(), mask, scale=scale)


def close(found, want):
    """Within what rounding the softmax and the result to bfloat16 does."""
    assert found.shape == want.shape
    return bool((found.float() - want).abs().max() <= 2**-7 * want.abs().max())


@tiles_here
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("width", [1, 8, 15, 16, 24, 32, 33, 64, 80, 256])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (7, 7), (50, 50), (64, 64), (65, 65), (3, 130), (77, 32), (130, 33)]
)
def test_every_shape_is_pytorchs_attention(width, queries, keys):
    query, key, value = heads(3, 2, queries, width, 1), heads(3, 2, keys, width, 2), heads(3, 2, keys, width, 3)
    found = operations.attention(query, key, value, None, width**-0.5)
    assert close(found, wanted(query, key, value, None, width**-0.5))
    assert found.transpose(1, 2).is_contiguous()  # as what follows wants it


@tiles_here
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("keys", [16, 40, 64, 100, 128, 300, operations.MOST_KEYS])
@pytest.mark.parametrize("shape", [(1, 2, 1), (1, 1, 0), (6, 2, 0), (3, 1, 0), (6, 1, 1)])
@pytest.mark.parametrize("kind", ["constant", "short", "bool"])
def test_every_mask_is_pytorchs(keys, shape, kind):
    period, count, queries = shape[0], shape[1], shape[2] or keys
    query, key, value = (heads(6, 2, keys, 24, seed, spread=3.0) for seed in (1, 2, 3))
    mask = torch.randn(period, count, queries, keys, generator=torch.Generator().manual_seed(4)) * 2
    hidden = torch.rand(mask.shape, generator=torch.Generator().manual_seed(5)) < 0.4
    hidden[..., 0] = False
    if kind == "bool":
        mask = given = ~hidden
    elif kind == "short":
        mask = given = mask.masked_fill(hidden, LOWEST).to(torch.bfloat16)
    else:
        mask = mask.masked_fill(hidden, float("-inf"))
        given = operations.base2(mask)
    found = operations.attention(query, key, value, given, 0.2, kind == "constant")
    assert close(found, wanted(query, key, value, mask, 0.2))


@tiles_here
@pytest.mark.usefixtures("loaded")
def test_a_mask_that_is_a_view_is_read_as_it_lies():
    query, key, value = (heads(4, 2, 40, 32, seed) for seed in (1, 2, 3))
    tall = torch.randn(4, 1, 40, 80).to(torch.bfloat16)
    for mask in (tall[..., ::2], tall[..., :40], tall[:, :, :1, 40:], tall[:1, :, :, 40:].expand(4, 2, 40, 40)):
        assert close(operations.attention(query, key, value, mask, 0.1), wanted(query, key, value, mask, 0.1))


@tiles_here
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("keys", [20, 200])
def test_queries_that_are_left_no_key_get_what_pytorch_gives(keys):
    query, key, value = (heads(2, 1, keys, 16, seed) for seed in (1, 2, 3))
    hidden = torch.zeros(2, 1, keys, keys, dtype=torch.bool)
    hidden[1, :, 3] = True
    lowest = torch.zeros(hidden.shape).masked_fill(hidden, LOWEST).to(torch.bfloat16)
    endless = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
    zeros = {"bool": ~hidden, "short": endless.to(torch.bfloat16), "constant": endless}
    for name, mask in zeros.items():
        found = operations.attention(query, key, value, operations.base2(mask) if name == "constant" else mask, 1.0,
                                  name == "constant")  # fmt: skip
        assert close(found, wanted(query, key, value, mask, 1.0)), name
        assert not found[1, 0, 3].any(), name
    found = operations.attention(query, key, value, lowest, 1.0)  # the lowest number says nothing: all alike
    assert close(found[1, 0, 3], value[1, 0].float().mean(0))


@tiles_here
@pytest.mark.usefixtures("loaded")
def test_what_is_not_of_the_type_that_the_graph_says_is_cast():
    query, key, value = (heads(2, 2, 24, 16, seed) for seed in (1, 2, 3))
    mask = torch.randn(2, 1, 24, 24)
    want = wanted(query, key, value, mask, 0.3)
    for given in (mask, mask.double(), mask.to(torch.float16)):
        assert close(operations.attention(query, key.float(), value.float(), given, 0.3), want)


@tiles_here
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("large", [float("nan"), float("inf"), 3e38])
def test_what_is_no_number_stays_with_its_sample(large):
    query, key, value = (heads(3, 2, 33, 24, seed) for seed in (1, 2, 3))
    plain = operations.attention(query, key, value, None, 1.0)
    query[1, 0, 5] = large
    found = operations.attention(query, key, value, None, 1.0)
    others = torch.ones(found.shape[:3], dtype=torch.bool)
    others[1, 0, 5] = False
    assert torch.equal(found[others], plain[others])
    if large != large:
        assert found[1, 0, 5].isnan().all()


@tiles_here
@pytest.mark.usefixtures("loaded")
def test_a_samples_bytes_are_its_own_whatever_the_batch_and_the_threads():
    query, key, value = (heads(7, 3, 50, 24, seed) for seed in (1, 2, 3))
    mask = operations.base2(torch.randn(1, 3, 50, 50))
    found = operations.attention(query, key, value, mask, 0.3)
    for threads in (1, 2, 3):
        with threads_of(threads):
            assert torch.equal(operations.attention(query, key, value, mask, 0.3), found)
    order = torch.randperm(7)
    assert torch.equal(operations.attention(query[order], key[order], value[order], mask, 0.3), found[order])
    for n in range(7):
        one = slice(n, n + 1)
        assert torch.equal(operations.attention(query[one], key[one], value[one], mask, 0.3), found[one])


@tiles_here
@pytest.mark.usefixtures("loaded")
def test_no_rows_and_other_layouts():
    query, key, value = (heads(2, 2, 12, 24, seed) for seed in (1, 2, 3))
    assert operations.attention(query[:0], key[:0], value[:0], None, 1.0).shape == (0, 2, 12, 24)
    turned = [part.transpose(2, 3).contiguous().transpose(2, 3) for part in (query, key, value)]
    assert turned[0].stride(-1) != 1
    assert torch.equal(operations.attention(*turned, None, 1.0), operations.attention(query, key, value, None, 1.0))


# --- layer norms -----------------------------------------------------------------------------------------------------


def rows_of(*shape, seed=0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 5
    return made.to(torch.bfloat16)


@here
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("width", [1, 7, 16, 17, 96, 100, 192, 384, 385, 768, 1024, operations.MOST_NORMED])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7,), (2, 3, 4), (0, 5)])
def test_every_norm_is_pytorchs(width, shape):
    x, weight, bias = rows_of(*shape, width), torch.randn(width), torch.randn(width)
    found = operations.layer_norm(x, weight, bias, 1e-5)
    want = torch.layer_norm(x.float(), [width], weight, bias, 1e-5)
    assert (found.dtype, found.shape) == (torch.bfloat16, x.shape)
    assert bool(((found.float() - want).abs() <= 2**-8 * want.abs() + 1e-5).all())  # one rounding


@here
@pytest.mark.usefixtures("loaded")
def test_norms_of_rows_far_from_zero_and_of_rows_that_are_all_alike():
    weight, bias = torch.ones(96), torch.zeros(96)
    far = rows_of(4, 96) + 1000
    want = torch.layer_norm(far.float(), [96], weight, bias, 1e-5)
    assert (operations.layer_norm(far, weight, bias, 1e-5).float() - want).abs().max() < 0.02
    alike = torch.full((2, 96), 3.25, dtype=torch.bfloat16)
    assert torch.equal(operations.layer_norm(alike, weight, bias, 1e-5), torch.zeros_like(alike))


@here
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("width", [96, 100, 384, 768])
def test_normed_rows_are_their_own_in_any_order_batch_and_number_of_threads(width):
    x, weight, bias = rows_of(5, 12, width), torch.randn(width), torch.randn(width)
    found = operations.layer_norm(x, weight, bias, 1e-6)
    order = torch.tensor([11, 0, 0, 5, 3, 7, 2])
    for threads in (1, 2, 3):
        with threads_of(threads):
            assert torch.equal(operations.layer_norm(x, weight, bias, 1e-6, order), found[:, order])
    for n in range(5):
        assert torch.equal(operations.layer_norm(x[n : n + 1], weight, bias, 1e-6), found[n : n + 1])
    assert torch.equal(operations.layer_norm(x.transpose(0, 1), weight, bias, 1e-6), found.transpose(0, 1))
    x[2, 3, 4] = float("nan")
    spoiled = operations.layer_norm(x, weight, bias, 1e-6)
    assert spoiled[2, 3].isnan().all()
    spoiled[2, 3] = found[2, 3]
    assert torch.equal(spoiled, found)


# --- segments --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return hub.Models(tmp_path_factory.mktemp("models"))


def calls(case, folder, function):
    run = native.with_kernels(case.module, Target(lowering.ROWS, torch.bfloat16, folder=folder))
    return [node for node in run.graph.nodes if node.target is function]


def count(case, folder, function):
    return len(calls(case, folder, function))


@here
@pytest.mark.parametrize("name", hub.FAMILIES)
def test_every_family_keeps_its_embeddings_and_each_row_its_bytes(models, name, folder):
    case = lowering.family(models, name)
    target = Target(lowering.ROWS, torch.bfloat16, folder=folder)
    inside = [
        node for node in case.module.graph.nodes if node.target is torch.ops.aten.scaled_dot_product_attention.default
    ]
    if not native.saved_seconds(case.module):
        assert not inside
        with pytest.raises(Unlowerable, match="nothing to compute"):
            lower("native", case.segment, case.module, target, case.inputs)
        return
    run = lower("native", case.segment, case.module, target, case.inputs)
    if "attention.cpp" in kernels.sources():
        # a pass pads fewer than 32 queries, for PyTorch's own: such are views no more
        padded = name in ("open_clip", "clip", "vit", "dinov2")
        assert count(case, folder, operations.attention) == (len(inside) if padded else 0)
        assert count(case, folder, operations.attention_within) == (0 if padded else len(inside))
        acts = {torch.ops.aten.gelu.default, torch.ops.aten.sigmoid.default}
        blocks = sum(node.target in acts for node in case.module.graph.nodes)
        # but for CLAP's first layers, which are 24 wide here, and Whisper's convolutions
        assert count(case, folder, operations.mlp) == blocks - {"clap": 2, "whisper": 2}.get(name, 0)
    norms = sum(node.target is torch.ops.aten.layer_norm.default for node in case.module.graph.nodes)
    on_the_way = sum(norm is not None for node in calls(case, folder, operations.mlp) for norm in node.args[7:9])
    assert count(case, folder, operations.layer_norm) == norms - on_the_way > 0
    with torch.inference_mode():
        for found, want in zip(run(*case.inputs), case.eager(), strict=True):
            assert nn.functional.cosine_similarity(found.flatten(1), want.flatten(1)).min() > 0.999
        assert lowering.permuted_alike(run, case)


class Windows(nn.Module):
    """Attention written out, with a mask for each of three windows of a sample: most pairs at -100."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(32, 96)
        self.register_buffer("bias", torch.randn(2, 16, 16))
        self.register_buffer("mask", torch.where(torch.rand(3, 16, 16) < 0.6, -100.0, 0.0))

    def forward(self, x):
        batch = x.shape[0]
        q, k, v = self.qkv(x).view(batch * 3, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / 4 + self.bias
        scores = scores.view(batch, 3, 2, 16, 16) + self.mask[:, None]
        mixed = scores.view(batch * 3, 2, 16, 16).softmax(-1) @ v
        return mixed.transpose(1, 2).reshape(batch, -1)


@tiles_here
def test_a_mask_for_each_window_is_held_once_in_float32(folder):
    module = Windows().eval()
    graph = fuse([capture(module, {"x": torch.zeros(48, 32)}, name="image")], None, [])
    optimise(graph)
    made = cut(graph)
    (segment,) = made.plan.segments
    target = Target(4, torch.bfloat16, folder=folder)
    replaced = native.with_kernels(made.modules["image@0"], target)
    (node,) = (one for one in replaced.graph.nodes if one.target is operations.attention)
    mask = replaced.get_buffer(str(node.args[3].target))
    assert (tuple(mask.shape), mask.dtype) == ((3, 2, 16, 16), torch.float32)
    assert not any(one.target is torch.ops.aten.expand.default for one in replaced.graph.nodes)
    run = lower("native", segment, made.modules["image@0"], target, examples_of(made.plan, segment, 4))
    x = torch.randn(4, 48, 32)
    with torch.no_grad():
        assert close(run(x)[0], module(x))


class Repeated(nn.Module):
    """Constants that are repeated otherwise than windows are: for each head, for each query, over keys."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.how = nn.Linear(32, 96), how
        self.register_buffer(
            "mask", torch.randn({"heads": (2, 1, 16, 16), "batch": (1, 2, 16, 16), "keys": (1, 2, 16, 1)}[how])
        )

    def forward(self, x):
        batch = x.shape[0]
        q, k, v = self.qkv(x).view(batch, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
        if self.how == "heads":
            mask = self.mask.expand(batch, 2, 1, 16, 16).reshape(batch, 2, 16, 16)
        elif self.how == "batch":
            q, k, v = (part.reshape(batch * 2, 1, 16, 16) for part in (q, k, v))
            mask = self.mask.expand(batch, 2, 16, 16).reshape(batch * 2, 1, 16, 16)
        else:
            mask = self.mask.expand(batch, 2, 16, 16).reshape(batch, 2, 16, 16)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return mixed.reshape(batch, 2, 16, 16).transpose(1, 2).reshape(batch, -1)


@here
@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("how", ["heads", "batch", "keys"])
def test_masks_that_are_repeated_otherwise_are_what_they_are(folder, how, passes):
    module = Repeated(how).eval()
    graph = fuse([capture(module, {"x": torch.zeros(16, 32)}, name="image")], None, [])
    if passes:
        optimise(graph)
    made = cut(graph)
    (segment,), target = made.plan.segments, Target(4, torch.bfloat16, folder=folder)
    run = lower("native", segment, made.modules["image@0"], target, examples_of(made.plan, segment, 4))
    x = torch.randn(4, 16, 32)
    with torch.no_grad():
        assert nn.functional.cosine_similarity(run(x)[0], module(x)).min() > 0.9998


class Shifted(nn.Module):
    """A norm whose rows are put in another order, one whose rows are not alone in reading it, one without factors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(24, 48)
        self.one, self.two, self.plain = nn.LayerNorm(48), nn.LayerNorm(48), nn.LayerNorm(48, elementwise_affine=False)
        self.register_buffer("order", torch.randperm(20))

    def forward(self, x):
        y = self.inner(x)
        z = self.two(y)
        return (self.one(y).index_select(1, self.order) + z.index_select(1, self.order) + z + self.plain(y)).mean(1)


@here
def test_a_norm_takes_the_choice_of_rows_that_alone_reads_it(folder):
    module = Shifted().eval()
    made = cut(fuse([capture(module, {"x": torch.zeros(20, 24)}, name="image")], None, []))
    (segment,), inner = made.plan.segments, made.modules["image@0"]
    target = Target(4, torch.bfloat16, folder=folder)
    graph = native.with_kernels(inner, target).graph
    norms = [node for node in graph.nodes if node.target is operations.layer_norm]
    assert sorted(len(node.args) for node in norms) == [4, 5]
    assert sum(node.target is torch.ops.aten.index_select.default for node in graph.nodes) == 1
    assert sum(node.target is torch.ops.aten.layer_norm.default for node in graph.nodes) == 1
    x = torch.randn(4, 20, 24)
    with torch.no_grad():
        found = lower("native", segment, inner, target, examples_of(made.plan, segment, 4))(x)[0]
        assert close(found, module(x))


# --- where it can't be had -------------------------------------------------------------------------------------------


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr(kernels, "library", None)
    monkeypatch.setattr(kernels, "why_not", lambda: "")


def test_float32_and_other_processors_are_refused(models, monkeypatch):
    case = lowering.family(models, "clip")
    with pytest.raises(Unlowerable, match="bfloat16"):
        lower("native", case.segment, case.module, Target(lowering.ROWS), case.inputs)
    monkeypatch.setattr(kernels, "library", None)
    monkeypatch.setattr(kernels, "why_not", lambda: "no bfloat16 here")
    with pytest.raises(Unlowerable, match="no bfloat16 here"):
        lower("native", case.segment, case.module, Target(lowering.ROWS, torch.bfloat16), case.inputs)


def test_hidden_instructions_are_not_used(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert kernels.sources.__wrapped__() in ((), ("layer_norm.cpp",))


@pytest.mark.usefixtures("unloaded")
def test_without_a_compiler_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        Unlowerable, match="needs GCC once, and there is no no-such-compiler here: install one, or set CXX"
    ):
        kernels.load(tmp_path / "compiled")
    assert not list((tmp_path / "compiled").iterdir())


@pytest.mark.usefixtures("unloaded")
def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    fails = tmp_path / "fails"
    fails.write_text("#!/bin/sh\necho 'attention.cpp:1: error: no such luck' >&2\nexit 1\n")
    fails.chmod(0o700)
    monkeypatch.setenv("CXX", str(fails))
    compiled, tried = kernels._compiled, []
    monkeypatch.setattr(kernels, "_compiled", lambda: tried.append(1) or compiled())
    for _ in range(3):
        with pytest.raises(Unlowerable, match=r"could not compile native code: attention\.cpp:1: error: no such luck"):
            kernels.load(None)
    assert len(tried) == 1  # seconds each time


@here
def test_it_is_kept_for_its_owner_alone_and_made_anew_when_touched(monkeypatch, folder, tmp_path):
    kernels.load(folder)
    content, made = next(folder.iterdir()).read_bytes()[32:], []
    monkeypatch.setattr(kernels, "_compiled", lambda: made.append(1) or content)
    place = tmp_path / "compiled"

    def load_again():
        monkeypatch.setattr(kernels, "library", None)
        kernels.load(place)
        return len(made)

    assert not kernels.ready(place)
    assert not kernels.ready(None)
    assert [load_again(), load_again()] == [1, 1]
    assert kernels.ready(place)
    (kept,) = place.iterdir()
    assert stat.S_IMODE(os.stat(kept).st_mode) == 0o600
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    assert load_again() == 2
    assert kept.read_bytes()[32:] == content
