"""What a segment costs, from its graph alone: floating-point operations, matrix products, memory inside it.

workspace_bytes  the most that its intermediate values take at once
products         its matrix products, by shape: what no rewriting around them can save
count_flops      operations of those products
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmpipe.graphs.fuse import mark_of
from mmpipe.graphs.plan import Plan, Segment, Value

aten = torch.ops.aten

# Their schema calls them views, and often they copy; counted as copies, so that the estimate errs upwards.
_MAY_COPY = {aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints, aten.to.dtype}
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default}
_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten.scaled_dot_product_attention.default,
}


@dataclass(frozen=True)
class Product:
    """One matrix product (or convolution) as torch sees it, and how often a segment does it."""

    target: Any
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    rest: tuple[Any, ...]  # what a convolution takes beside its tensors
    count: int


def workspace_bytes(module: fx.GraphModule, rows: int) -> int:
    """Bytes that the values inside a segment take at once, at `rows` rows, run one operation after the other.

    Its inputs are the pool's and are not counted; its results are, until they are copied out. What operations allocate
    for themselves is not known here.
    """
    base: dict[fx.Node, fx.Node] = {}
    size: dict[fx.Node, int] = {}
    order = list(module.graph.nodes)
    for node in order:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
        if node.op != "call_function":
            base[node], size[node] = node, 0
        elif source is not None and is_view and node.target not in _MAY_COPY:
            base[node], size[node] = base[source], 0
        else:
            base[node], size[node] = node, _bytes(node, rows)
    last = {base[argument]: index for index, node in enumerate(order) for argument in (*node.all_input_nodes, node)}
    live = peak = 0
    ends: dict[int, list[fx.Node]] = {}
    for node, index in last.items():
        ends.setdefault(index, []).append(node)
    for index, node in enumerate(order):
        live += size[node]
        peak = max(peak, live)
        live -= sum(size[ended] for ended in ends.get(index, []))
    return peak


def _bytes(node: fx.Node, rows: int) -> int:
    mark = mark_of(node)
    if mark.shape is None or mark.dtype is None:
        return 0
    return math.prod(size_of(dimension, rows) for dimension in mark.shape) * mark.dtype.itemsize


def size_of(dimension: int | str, rows: int) -> int:
    """A dimension of a Mark: a number, "B", or what torch.export made of it, such as "49*B" or "B + 1"."""
    if isinstance(dimension, int):
        return dimension
    try:
        return math.ceil(math.prod(rows if part == "B" else float(part) for part in dimension.split("*")))
    except ValueError:  # seldom; sympy, which wrote it, is slow
        import sympy

        size: int = math.ceil(sympy.sympify(dimension).subs("B", rows))
        return size


def weight_bytes(modules: Sequence[fx.GraphModule]) -> int:
    """Bytes of all weights, those that segments share counted once."""
    seen = {}
    for module in modules:
        for tensor in module.buffers():
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def count_flops(plan: Plan, segment: Segment, module: fx.GraphModule, rows: int) -> int:
    """Floating-point operations of a segment at `rows` rows, by torch's own formulas: two for each multiplication."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton: not where nobody counts

    with FlopCounterMode(display=False) as counter:
        _run_fake(plan, segment, module, rows)
    return int(counter.get_total_flops())


def products(plan: Plan, segment: Segment, module: fx.GraphModule, rows: int) -> list[Product]:
    """The matrix products of a segment at `rows` rows; attention counts as the two that it is made of."""
    found: Counter[tuple[Any, ...]] = Counter()

    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in _PRODUCTS:
                tensors = [value for value in args if isinstance(value, Tensor)]
                rest = args[3:] if func is aten.convolution.default else ()
                shapes = tuple(tuple(value.shape) for value in tensors)
                found[func, shapes, tensors[0].dtype, tuple(tuple(r) if isinstance(r, list) else r for r in rest)] += 1
            elif func in _ATTENTION:
                q, k = args[0].shape, args[1].shape
                heads = math.prod(q[:-2])
                dtype = args[0].dtype
                found[aten.bmm.default, ((heads, *q[-2:]), (heads, k[-1], k[-2])), dtype, ()] += 1
                found[aten.bmm.default, ((heads, q[-2], k[-2]), (heads, k[-2], args[2].shape[-1])), dtype, ()] += 1
            return func(*args, **(kwargs or {}))

    with Recorder():  # type: ignore[no-untyped-call]
        _run_fake(plan, segment, module, rows)
    return [Product(target, shapes, dtype, rest, n) for (target, shapes, dtype, rest), n in found.items()]


def _run_fake(plan: Plan, segment: Segment, module: fx.GraphModule, rows: int) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        module(*(_zeros(plan.value(name), rows) for name in (*segment.inputs, *segment.reads)))


def _zeros(value: Value, rows: int) -> Tensor:
    return torch.zeros(rows, *value.shape, dtype=value.dtype)
