"""Matrix products alone, timed as a segment does them: in its type, on its device, on weights that are packed where it
packs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mmpipe.graphs.backends import packed
from mmpipe.graphs.cost import Product

_SECONDS = 0.25  # spent on timing one shape
_MOST = 50  # times
_CALLS = 10  # of a product in one graph of a GPU
aten = torch.ops.aten


Held = Callable[[Tensor], Tensor]  # a tensor where the segment computes


def products_seconds(
    products: Iterable[Product], timed: dict[Product, float], threads: int, held: Held = lambda tensor: tensor
) -> float:
    """Seconds that these products take with nothing between them. `timed`: what is known already, and is added to."""
    total = 0.0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for product in products:
            if product not in timed:
                timed[product] = _time(product, held)
            total += product.count * timed[product]
    finally:
        torch.set_num_threads(before)
    return total


def _time(product: Product, held: Held) -> float:
    """The least of several times."""
    with torch.inference_mode():
        multiply = _call(product, held)
        if multiply().is_cuda:
            return _on_a_gpu(multiply)
        seconds: list[float] = []
        while len(seconds) < 3 or (sum(seconds) < _SECONDS and len(seconds) < _MOST):
            began = time.perf_counter()
            multiply()
            seconds.append(time.perf_counter() - began)
    return min(seconds)


def _on_a_gpu(multiply: Callable[[], Tensor]) -> float:
    """As one graph, in which no product waits for its launch: as a plan's graphs run them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            multiply()
    graph.replay()
    seconds: list[float] = []
    for _ in range(_MOST // _CALLS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        seconds.append(began.elapsed_time(ended) / 1e3 / _CALLS)
    return min(seconds)


def _call(product: Product, held: Held) -> Callable[[], Tensor]:
    tensors = [held(torch.randn(shape).to(product.dtype)) for shape in product.shapes]
    if (
        not tensors[0].is_cuda
        and product.dtype == torch.bfloat16
        and product.target in (aten.mm.default, aten.addmm.default)
        and packed.available()
    ):
        *bias, left, right = tensors
        weight = torch.ops.mkldnn._reorder_linear_weight(right.t().contiguous())
        arguments: list[Any] = [left, weight, bias[0] if bias else None, "none", [], ""]
        return lambda: torch.ops.mkldnn._linear_pointwise(*arguments)
    arguments = [*tensors, *product.rest]
    if product.target is aten.convolution.default and len(tensors) == 2:
        arguments = [*tensors, None, *product.rest]
    return lambda: product.target(*arguments)
