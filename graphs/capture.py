"""nn.Module → torch.fx.GraphModule, batch free, in one dialect (ATen), shapes on every node.

Capture is `torch.export` without guards: what depends on the values of a tensor can't be captured, and says so.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import logging
import operator
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from mmpipe.graphs.plan import GraphError, Mark

aten = torch.ops.aten

MAX_BATCH = 512  # rows of the largest bucket; torch.export wants a range
_EXAMPLE_BATCH = 2  # 0 and 1 would be specialised on

# What export leaves behind for its own safety; it computes nothing.
_ASSERTS = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "_functional_assert")


@dataclass(frozen=True)
class Captured:
    """One module as a graph: placeholders named `inputs`, one output, a tuple of tensors [batch, …]."""

    name: str
    graph: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: int
    layers: int  # how many layers were found under the path given to `capture`

    def results(self) -> list[Mark]:
        """Of each output, what is known: its shape, "B" for the batch, and its number type. Raises GraphError."""
        found: Any = self.graph.graph.output_node().args[0]
        if not isinstance(found, (tuple, list)) or not all(isinstance(node, fx.Node) for node in found):
            raise GraphError(f"{self.name}: forward must return a tensor, or a tuple of tensors")
        return [node.meta["mmpipe"] for node in found]


class _Positional(nn.Module):
    """Call a module by keyword from positional tensors: export then names no structure of its own."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.module(**dict(zip(self.names, tensors, strict=True)))
        if isinstance(result, Tensor):
            return (result,)
        return tuple(result)


def capture(module: nn.Module, example: Mapping[str, Tensor], *, name: str, layers: str | None = None) -> Captured:
    """Capture `module(**inputs)`, every input and output with the batch as dimension 0.

    `example`: one row of each input, without the batch dimension. `layers`: path of the ModuleList inside `module`
    whose items are its layers; nodes are marked with the number of theirs. Raises GraphError that names the module,
    the operation and what to do.
    """
    names = tuple(example)
    rows = tuple(torch.stack([row] * _EXAMPLE_BATCH) for row in example.values())
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    try:
        with _capturable():
            program = torch.export.export(
                _Positional(module, names).eval(),
                rows,
                dynamic_shapes=(tuple({0: batch} for _ in rows),),
                strict=False,
            )
            if any(_mutates(node) for node in program.graph.nodes):
                program = program.run_decompositions({})  # functionalises; decomposes batch norms alone
            # typed as nn.Module; it is a GraphModule
            graph: Any = program.module(check_guards=False)
    except Exception as error:
        raise GraphError(_why(name, module, error)) from error
    _tidy(graph, names, name)
    count = _mark(graph, name, layers)
    outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    return Captured(name, graph, names, len(outputs), count)


@contextlib.contextmanager
def _capturable() -> Iterator[None]:
    """The settings under which a module's forward is traced: no fused kernels that only eager knows, no gradients."""
    fast = torch.backends.mha.get_fastpath_enabled()
    log = logging.getLogger("torch")
    level = log.level
    torch.backends.mha.set_fastpath_enabled(False)
    log.setLevel(logging.CRITICAL)
    try:
        with (
            torch.no_grad(),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            warnings.catch_warnings(),
            # a failing export prints the half-made graph; the error says what matters of it
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        log.setLevel(level)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _why(name: str, module: nn.Module, error: Exception) -> str:
    """The module, the last line of model code that ran, the first line of the reason, the way out."""
    torch_folder = str(Path(torch.__file__).parent)
    where, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith((torch_folder, __file__)) and "_Positional" not in code.co_qualname:
            line = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            where = f"{Path(code.co_filename).name}:{trace.tb_lineno}: {line}"
        trace = trace.tb_next
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "Constraints violated" in reason:
        reason = "forward fixes the batch size: it loops over the rows, or reshapes or multiplies with their number"
    kind = type(module).__name__
    return (
        f"{name}: {kind} can't be captured as a graph"
        + (f", at {where}" if where else "")
        + f"\n  {type(error).__name__}: {reason}\n"
        "  What runs must not depend on the values of a tensor (no `if x.sum() > 0`, no .item(), no NumPy inside "
        "forward), and the batch must stay dimension 0. Rewrite that line with torch.where, or move it into prepare()."
    )


def _tidy(graph: fx.GraphModule, names: tuple[str, ...], name: str) -> None:
    """Name the placeholders, drop asserts, refuse what is no plain operation."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == len(names)
    for node, wanted in zip(placeholders, names, strict=True):
        node.target = wanted
    for node in reversed(graph.graph.nodes):
        if node.op == "call_function" and any(word in str(node.target) for word in _ASSERTS):
            graph.graph.erase_node(node)
        elif node.op in ("call_module", "call_method") or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise GraphError(
                f"{name}: {node.target} is no plain operation (control flow, or autograd switched inside forward); "
                "rewrite that part with tensor operations"
            )
        elif _mutates(node):
            raise GraphError(f"{name}: {node.target} writes into its argument; use the form without the underscore")
    _whole_norms(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _whole_norms(graph: fx.Graph) -> None:
    """Batch norms that functionalising took apart, as one operation with one result again: as passes know them."""
    for node in list(graph.nodes):
        if node.target is not aten._native_batch_norm_legit_no_training.default or node.kwargs:
            continue
        if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
            continue
        x, weight, bias, mean, variance, momentum, epsilon = node.args
        with graph.inserting_before(node):
            norm = graph.call_function(
                aten.batch_norm.default, (x, weight, bias, mean, variance, False, momentum, epsilon, False)
            )
        for result in list(node.users):
            norm.meta = dict(result.meta)
            result.replace_all_uses_with(norm)
            graph.erase_node(result)


def _mark(graph: fx.GraphModule, branch: str, layers: str | None) -> int:
    """Give every node its Mark; returns how many layers were seen."""
    symbols: set[Any] = set()
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            symbols |= value.shape[0].node.expr.free_symbols if isinstance(value.shape[0], torch.SymInt) else set()
    assert len(symbols) <= 1, "one batch symbol"
    symbol = next(iter(symbols), None)
    deepest = 0
    for node in graph.graph.nodes:
        layer = _layer_of(node, layers)
        deepest = max(deepest, layer or 0)
        value = node.meta.get("val")
        shape, dtype, multiple = None, None, None
        if isinstance(value, Tensor):
            shape, dtype = tuple(_size(dim, symbol) for dim in value.shape), value.dtype
        elif isinstance(value, torch.SymInt) and symbol is not None:
            quotient = value.node.expr / symbol
            multiple = int(quotient) if quotient.is_Integer else None
        node.meta["mmpipe"] = Mark(branch, layer, shape=shape, dtype=dtype, batch_multiple=multiple)
    return deepest


def _size(dim: int | torch.SymInt, symbol: Any) -> int | str:
    if isinstance(dim, int):
        return dim
    expression = dim.node.expr
    return int(expression) if expression.is_Integer else str(expression).replace(str(symbol), "B")


def _layer_of(node: fx.Node, layers: str | None) -> int | None:
    if layers is None:
        return None
    prefix = f"module.{layers}."
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if path.startswith(prefix):
            return int(path.removeprefix(prefix).split(".")[0]) + 1
    return None
