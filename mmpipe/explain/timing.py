"""Matrix products alone, timed as a segment does them: in its type, on its device, on weights that are packed where it
packs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mmpipe.graphs.backends import packed
from mmpipe.graphs.cost import Product
from mmpipe.runtime.device import Device

aten = torch.ops.aten


def products_seconds(products: Iterable[Product], timed: dict[Product, float], threads: int, device: Device) -> float:
    """Seconds that these products take with nothing between them. `timed`: what is known already, and is added to."""
    total = 0.0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for product in products:
            if product not in timed:
                timed[product] = device.seconds(call_of(product, device.held))
            total += product.count * timed[product]
    finally:
        torch.set_num_threads(before)
    return total


def call_of(product: Product, held: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """The product of made-up numbers, as a segment would do it. `held`: a tensor where it computes."""
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
