"""A segment in a shorter number type: its matrix products, and what stands between them.

    inputs (float32) ─► float32 until the first learned product ─► bfloat16 … ─► outputs, in the types of the plan

What stays float32, whatever is asked for:
- all that a logarithm is taken of (log-mel: six decades of power), and all before the first product;
- statistics that a graph writes out (means, norms, powers, exponentials). Softmax and the normalisations that are one
  operation keep their statistics in float32 by themselves, on any device, and hand on the shorter type.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from mmpipe.graphs.fuse import drop_unread_tensors, get_tensor, mark_of, reach, set_tensor
from mmpipe.graphs.late import LateModule

aten = torch.ops.aten

_PRODUCTS = {
    *(aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default),
    *(aten.baddbmm.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.scaled_dot_product_attention.default, aten.einsum.default),
}
_LOGARITHMS = {aten.log.default, aten.log2.default, aten.log10.default, aten.log1p.default, aten.log_softmax.int}
_STATISTICS = {
    *(
        aten.mean.dim,
        aten.mean.default,
        aten.sum.dim_IntList,
        aten.sum.default,
        aten.var.correction,
        aten.std.correction,
    ),
    *(aten.var_mean.correction, aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.sqrt.default, aten.exp.default),
    *(aten.linalg_vector_norm.default, aten.cumsum.default, aten.logsumexp.default, aten.norm.ScalarOpt_dim),
    aten.to.dtype,  # the model asks for it
}
_MOVES = {aten.expand.default, aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.permute.default}
_EXACT = (torch.uint8, torch.bool)  # whose numbers the shorter types hold as they are
# With float32 weights beside a shorter input: a CPU mixes them, and keeps the weights' digits. A GPU mixes one kind.
_NORMALISATIONS = {aten.layer_norm.default, aten.group_norm.default, aten.batch_norm.default}
_MIXED_ON_A_GPU = {aten.batch_norm.default}


def lowered(module: fx.GraphModule, dtype: torch.dtype, *, mixed: bool = True, matrices: bool = True) -> fx.GraphModule:
    """A copy of a segment's module that computes in `dtype`; the module itself for float32.

    What goes in and what comes out keep their types. Weights that only products read are held in `dtype` alone.
    `mixed` False: every operation gets one type; normalisations, whose weights stay float32, compute in that.
    `matrices` False: those of linear layers are left as they are, for a caller who shortens them.
    """
    if dtype == torch.float32:
        return module
    # weights are shared with the original, not copied: most are replaced
    made = LateModule(module, copy.deepcopy(module.graph))
    _Lowering(made, dtype, mixed, matrices).run()
    made.graph.eliminate_dead_code()
    drop_unread_tensors(made)
    made.graph.lint()
    made.recompile()
    return made


_MADE: ContextVar[dict[Any, tuple[Tensor, Tensor]] | None] = ContextVar("made", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """What is lowered inside shares what is made of the same weights: segments for several lengths of a text."""
    before = _MADE.set({})
    try:
        yield
    finally:
        _MADE.reset(before)


def once(source: Tensor, kind: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What `make` makes of a weight, or what it made before for another segment that shares it."""
    known = _MADE.get()
    if known is None:
        return make()
    key = (source.data_ptr(), source.shape, source.stride(), source.dtype, kind)  # whatever object it is seen through
    if key not in known:
        known[key] = source, make()  # with the source: its place is its own as long as it is there
    return known[key][1]


def shortened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In a shorter type; what is too large for it becomes its largest number, what was infinite stays."""
    value = tensor.to(dtype)
    if value.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(value)):
        over = torch.isinf(value) & ~torch.isinf(tensor)
        value = torch.where(over, tensor.sign().to(dtype) * torch.finfo(dtype).max, value)
    return value


class _Lowering:
    """One walk over the graph in its order. `short`: the nodes whose values have the shorter type by now."""

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype, mixed: bool, matrices: bool) -> None:
        self.module, self.graph, self.dtype = module, module.graph, dtype
        self.mixed, self.matrices = mixed, matrices
        self.short: set[fx.Node] = set()
        self.exact: set[fx.Node] = set()  # float32 on purpose: statistics, and what is made of them
        self.constants: dict[str, str] = {}  # attribute → the same in the shorter type
        self.casts: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        islands = _before_logarithms(self.graph)
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node not in islands:
                self._one(node)
            elif node.op == "output":
                self._outputs(node)
        for node in self.short:
            mark = mark_of(node)
            if mark.dtype == torch.float32:
                node.meta["mmpipe"] = replace(mark, dtype=self.dtype)

    def _outputs(self, node: fx.Node) -> None:
        node.args = (fx.map_arg(node.args[0], lambda value: self._long(value, node)),)

    def _one(self, node: fx.Node) -> None:
        arguments = node.all_input_nodes
        if node.target in _PRODUCTS and mark_of(node).dtype in (torch.float32, None):
            left = None if self.matrices else _matrix(node)
            self._give(node, lambda n: n if n is left else self._shortened(n, node))
            self.short.add(node)
        elif not any(n in self.short for n in arguments):
            if any(n in self.exact for n in arguments):
                self.exact.add(node)
            elif node.target is aten.embedding.default and _is_float(arguments[0]) and not _only_summed(node):
                node.replace_input_with(arguments[0], self._shortened(arguments[0], node))  # only rows are picked
                self.short.add(node)
        elif node.target in _STATISTICS:
            self._give(node, lambda n: self._long(n, node))
            self.exact.add(node)
        elif any(n in self.exact for n in arguments) and node.target not in _NORMALISATIONS:
            self.exact.add(node)  # promoted to float32 by itself
            if node.target is aten.cat.default:
                self._give(node, lambda n: self._long(n, node))
        elif node.target in _NORMALISATIONS and not self.mixed:
            self._give(node, lambda n: self._long(n, node))
            with self.graph.inserting_after(node):
                cast = self.graph.call_function(aten.to.dtype, (node, self.dtype))
            cast.meta["mmpipe"] = node.meta.get("mmpipe")
            node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
            self.short.add(cast)
        else:
            keep = node.target in _NORMALISATIONS and self._mixes(node)
            self._give(node, lambda n: n if keep and n.op == "get_attr" else self._shortened(n, node))
            if mark_of(node).dtype in (torch.float32, None):  # None: several results, or one that a user put in
                self.short.add(node)

    def _mixes(self, node: fx.Node) -> bool:
        """Whether a normalisation takes weights of another type than its input, where its weights are."""
        weights = [get_tensor(self.module, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
        return node.target in _MIXED_ON_A_GPU or all(weight.device.type == "cpu" for weight in weights)

    def _give(self, node: fx.Node, change: Any) -> None:
        node.args = fx.map_arg(node.args, change)
        node.kwargs = fx.map_arg(node.kwargs, change)

    def _shortened(self, node: fx.Node, user: fx.Node) -> fx.Node:
        """The node's value in the shorter type, where it is a floating one."""
        if node in self.short or not _is_float(node):
            return node
        if node.op == "get_attr":
            return self._constant(node)
        if node.target in _MOVES and _is_float(node.all_input_nodes[0]):
            return self._moved(node)
        if node not in self.casts and _from_exact(node):
            with self.graph.inserting_before(user):
                self.casts[node] = self.graph.call_function(aten.to.dtype, (node.args[0], self.dtype))
            self.casts[node].meta["mmpipe"] = node.meta.get("mmpipe")
            self.short.add(self.casts[node])
        if node not in self.casts:
            limits = torch.finfo(self.dtype)
            with self.graph.inserting_before(user):
                # masks are often the lowest float32: in bfloat16 minus infinity, and a row of that not a number
                within = self.graph.call_function(aten.clamp.default, (node, limits.min, limits.max))
                cast = self.graph.call_function(aten.to.dtype, (within, self.dtype))
            within.meta["mmpipe"] = cast.meta["mmpipe"] = node.meta.get("mmpipe")
            self.casts[node] = cast
            self.short.add(cast)
        return self.casts[node]

    def _moved(self, node: fx.Node) -> fx.Node:
        """A constant, repeated: what it is made of is shortened, once, not what it becomes at every call."""
        if node not in self.casts:
            source = node.all_input_nodes[0]  # the others are sizes
            given = self._shortened(source, node)
            with self.graph.inserting_before(node):
                self.casts[node] = self.graph.node_copy(node, lambda n: given if n is source else n)
            self.short.add(self.casts[node])
        return self.casts[node]

    def _constant(self, node: fx.Node) -> fx.Node:
        name = str(node.target)
        if name not in self.constants:
            tensor = get_tensor(self.module, name)
            self.constants[name] = f"{name}_short"
            short = once(tensor, self.dtype, lambda: shortened(tensor, self.dtype))
            set_tensor(self.module, self.constants[name], short)
        with self.graph.inserting_before(node):
            constant = self.graph.get_attr(self.constants[name])
        constant.meta["mmpipe"] = node.meta.get("mmpipe")
        self.short.add(constant)
        return constant

    def _long(self, node: fx.Node, user: fx.Node) -> fx.Node:
        """The node's value as float32 again."""
        if node not in self.short:
            return node
        with self.graph.inserting_before(user):
            long = self.graph.call_function(aten.to.dtype, (node, torch.float32))
        long.meta["mmpipe"] = node.meta.get("mmpipe")
        return long


def _matrix(node: fx.Node) -> fx.Node | None:
    """Of a linear layer's product, where it is a constant."""
    weight = node.args[1] if node.target is aten.linear.default and mark_of(node).dtype == torch.float32 else None
    return weight if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def _only_summed(node: fx.Node) -> bool:
    """Whether all who read it would have it back in float32: shortened, it would be cast twice for nothing."""
    return all(user.target in _STATISTICS for user in node.users)


def _from_exact(node: fx.Node) -> bool:
    """A cast of numbers that any type holds as they are: pixels, flags."""
    source = node.args[0] if node.args else None
    return node.target is aten.to.dtype and isinstance(source, fx.Node) and mark_of(source).dtype in _EXACT


def _before_logarithms(graph: fx.Graph) -> set[fx.Node]:
    return reach((node for node in graph.nodes if node.target in _LOGARITHMS), lambda node: node.all_input_nodes)


def _is_float(node: fx.Node) -> bool:
    return mark_of(node).dtype == torch.float32
