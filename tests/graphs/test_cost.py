"""What a segment costs: counted from its graph, compared with what torch really does."""

from __future__ import annotations

import weakref

import pytest
import torch
from support.parts import PARTS, batch, fused
from torch.utils._python_dispatch import TorchDispatchMode

from mmpipe.graphs import cost
from mmpipe.graphs.cut import cut
from mmpipe.graphs.fuse import ExitSpec
from mmpipe.graphs.passes import optimise

ROWS = 16


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it take at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in known or storage._cdata in self.seen:
                continue
            self.seen.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key, size):
        self.seen.discard(key)
        self.live -= size


@pytest.fixture(scope="module")
def made():
    graph = fused(PARTS, [ExitSpec("image", ("image",))])
    optimise(graph)
    return cut(graph)


def arguments(made, segment):
    rows = batch(ROWS)
    return [
        rows[name] if name in rows else torch.randn(ROWS, *made.plan.value(name).shape)
        for name in (*segment.inputs, *segment.reads)
    ]


def test_a_workspace_is_what_the_segment_really_takes_and_not_much_more(made):
    for segment in made.plan.segments:
        given = arguments(made, segment)
        with torch.inference_mode(), Peak() as seen:
            made.modules[segment.name](*given)
        estimate = cost.workspace_bytes(made.modules[segment.name], ROWS)
        assert 0.95 * seen.peak <= estimate <= 2.0 * seen.peak, (segment.name, seen.peak, estimate)


@pytest.mark.parametrize(
    ("dimension", "size"),
    [(7, 7), ("B", 16), ("49*B", 784), ("0.5*B", 8), ("B + 1", 17), ("(B//4)", 4), ("2*B - 3", 29)],
)
def test_a_dimension_of_any_form_has_a_size(dimension, size):
    assert cost.size_of(dimension, ROWS) == size


def test_a_workspace_grows_with_the_rows(made):
    module = made.modules["image@0"]
    assert cost.workspace_bytes(module, 32) == pytest.approx(2 * cost.workspace_bytes(module, 16), rel=0.01)


def test_operations_are_counted_as_torch_does(made):
    """The head by hand, 2 · rows · in · out each: three inlets (zeros go through two), two layers, one answer."""
    segment = made.plan.segment("head@0")
    flops = cost.count_flops(made.plan, segment, made.modules["head@0"], ROWS)
    assert flops == 2 * ROWS * (3 * 16 * 10 + 2 * 16 * 10 + 16 * 5)  # inner sizes are padded to 16
    products = cost.products(made.plan, segment, made.modules["head@0"], ROWS)
    assert sum(p.count * 2 * ROWS * p.shapes[-1][0] * p.shapes[-1][1] for p in products) == flops


def test_attention_counts_as_its_two_products(made):
    found = cost.products(made.plan, made.plan.segment("text@1"), made.modules["text@1"], ROWS)
    batched = [p for p in found if p.target is torch.ops.aten.bmm.default]
    assert batched
    assert all(len(p.shapes) == 2 for p in batched)


def test_weights_that_segments_share_count_once(made):
    one = cost.weight_bytes([made.modules["image@0"]])
    assert cost.weight_bytes([made.modules["image@0"], made.modules["image@0"]]) == one
    assert one >= sum(b.nbytes for b in {b.data_ptr(): b for b in made.modules["image@0"].buffers()}.values())
