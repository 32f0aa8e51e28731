"""A segment's graph → ONNX, weights within, for one number of rows: what the ONNX Runtime, OpenVINO and TensorRT take.

fingerprint     what an artefact is made of, as a name for it
onnx_of         the bytes of an ONNX file, kept in the target's folder
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from mmpipe.graphs.artefacts import kept
from mmpipe.graphs.backends import Target, Unlowerable
from mmpipe.graphs.backends.spectrum import as_products
from mmpipe.graphs.digest import digest
from mmpipe.graphs.plan import GraphError, Segment

OPSET = 18  # the newest that all three read in full
_LIMIT_BYTES = 2**31 - 2**24  # protobuf's, less what the graph may take beside its weights
_INPUT = "in_"
_NOISY = ("torch", "onnxscript", "onnx_ir")  # loggers


def needed(extra: str, *names: str) -> ModuleType:
    """The first of these packages that is there. Unlowerable, which names the extra, where none is."""
    for name in names:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise Unlowerable(f'{" or ".join(names)} is not installed: pip install "mmpipe[{extra}]"')


def places_of(names: Iterable[str]) -> dict[str, int]:
    """Inputs of what was made of an export → their places in the segment's. One read for its size alone is gone."""
    return {name: int(name.removeprefix(_INPUT)) for name in names}


def onnx_of(segment: Segment, module: fx.GraphModule, target: Target, examples: Sequence[Tensor]) -> bytes:
    """The segment for target.rows rows: inputs in_0, in_1, … [rows, …], outputs out_0, …, in the segment's order.

    Types are the module's own: target.dtype changes nothing. Raises Unlowerable where an operation has no form in ONNX,
    or the weights are too many for one file.
    """
    needed("onnx", "onnx")
    needed("onnx", "onnxscript")
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    if [len(example) for example in examples] != [target.rows] * len(inputs):
        raise GraphError(f"{segment.name}: needs an example of {target.rows} rows for each of its {len(inputs)} inputs")
    name = f"{_name(module, target, examples)}.onnx"
    return kept(target.folder, name, lambda: _export(segment, module, examples))


def _name(module: fx.GraphModule, target: Target, examples: Sequence[Tensor]) -> str:
    """Equal where operations, weights, rows, the inputs' types and shapes, and the exporter's version are."""
    inputs = [f"{example.dtype} {tuple(example.shape)}" for example in examples]
    versions = [version(package) for package in ("torch", "onnx", "onnxscript")]
    made_of = repr((digest(module), target.rows, inputs, OPSET, versions))
    return hashlib.sha256(made_of.encode()).hexdigest()[:40]


def _export(segment: Segment, module: fx.GraphModule, examples: Sequence[Tensor]) -> bytes:
    host = _on_host(as_products(module))
    size = sum(tensor.nbytes for tensor in host.state_dict().values())
    if size > _LIMIT_BYTES:
        raise Unlowerable(f"{segment.name}: {size / 1e9:.1f} GB of weights; an ONNX file holds 2 GB")
    outputs = next(node for node in module.graph.nodes if node.op == "output").args[0]
    try:
        with _quiet(), torch.inference_mode(False), torch.no_grad():
            program = torch.onnx.export(
                host,
                tuple(example.cpu().clone() for example in examples),
                dynamo=True,
                opset_version=OPSET,
                input_names=[f"{_INPUT}{place}" for place in range(len(examples))],
                output_names=[f"out_{place}" for place in range(len(outputs))],
                verbose=False,
            )
            assert program is not None
            content: bytes = program.model_proto.SerializeToString()
    except Exception as error:
        raise Unlowerable(f"{segment.name} has no form in ONNX: {_reason(error)}") from error
    return content


def _on_host(module: fx.GraphModule) -> fx.GraphModule:
    """Export is the host's work, and its result is the same wherever the weights are."""
    graph, host = copy.deepcopy(module.graph), torch.device("cpu")
    for node in graph.nodes:
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda value: host if isinstance(value, torch.device) else value
        )
    tensors = {str(node.target): attrgetter(node.target)(module).cpu() for node in graph.nodes if node.op == "get_attr"}
    modules = {str(node.target): module.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    return fx.GraphModule({**tensors, **modules}, graph).eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports progress, and prints the half-made graph when it fails: the error says what matters."""
    loggers = [(logger, logger.level) for logger in map(logging.getLogger, _NOISY)]
    for logger, _ in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """What the exporter stumbled on first, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    line: Any = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {line[:200]}"
