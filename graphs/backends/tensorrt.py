"""TensorRT, or TensorRT for RTX, through ONNX: building takes no torch, running takes an NVIDIA GPU.

typed_onnx      a segment → ONNX in the types that its engine computes in
build_engine    ONNX → an engine's bytes, kept in the target's folder
lower           a segment → a function of CUDA tensors
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, fx

from mmpipe.graphs.artefacts import kept
from mmpipe.graphs.backends import Lowered, Target, Unlowerable
from mmpipe.graphs.backends.export import needed, onnx_of, places_of
from mmpipe.graphs.fuse import mark_of
from mmpipe.graphs.plan import Segment
from mmpipe.graphs.precision import lowered

aten = torch.ops.aten

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SETTINGS = "no auxiliary streams, no TF32"  # `_build`'s: an engine that was built with others is not found


def lower(segment: Segment, module: fx.GraphModule, target: Target, examples: Sequence[Tensor]) -> Lowered:
    """One engine, with a context for each stream that it is called on. Outputs are the stream's, until its next call.

    Raises Unlowerable where torch sees no CUDA device.
    """
    package = _package()
    if not torch.cuda.is_available():
        raise Unlowerable(f"{segment.name}: TensorRT runs on an NVIDIA GPU, and torch sees none")
    if target.dtype not in _DTYPES:
        raise Unlowerable(f"{segment.name}: TensorRT computes in float32, float16 or bfloat16, not in {target.dtype}")
    content = typed_onnx(segment, module, target, examples)
    log = _log(package)
    engine = package.Runtime(log).deserialize_cuda_engine(build_engine(content, target))
    if engine is None:
        raise Unlowerable(f"{segment.name}: TensorRT can't load its engine here: {_said(log)}")
    if target.memory is not None and engine.device_memory_size_v2 > target.memory:
        needs = f"TensorRT's engine needs {engine.device_memory_size_v2:,} bytes inside"
        raise Unlowerable(f"{segment.name}: {needs}, and the memory limit leaves {target.memory:,}")
    contexts: dict[int, _Context] = {}  # by stream

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        stream = torch.cuda.current_stream().cuda_stream
        if stream not in contexts:
            contexts[stream] = _Context(package, engine, tensors[0].device)
        return contexts[stream](stream, tensors)

    return run


def typed_onnx(segment: Segment, module: fx.GraphModule, target: Target, examples: Sequence[Tensor]) -> bytes:
    """The segment's ONNX, cast to target.dtype beforehand: a strongly typed network computes in what it gets."""
    return onnx_of(segment, lowered(_sliced(module), target.dtype, mixed=False), target, examples)


def _sliced(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with parts of a product's last dimension taken by slice, all of them, where a split dimension's one place
    was selected: TensorRT gives up where queries are taken one way and keys the other."""
    made = fx.GraphModule(module, copy.deepcopy(module.graph))
    for node in made.graph.find_nodes(op="call_function", target=aten.select.int):
        split, dim, place = cast("tuple[Any, Any, Any]", node.args)
        if split.target not in (aten.reshape.default, aten.view.default):
            continue
        source, sizes = split.args[0], [*split.args[1]]
        dim, place = dim % len(sizes), place if place >= 0 else place + sizes[dim]
        shape, width = mark_of(source).shape, math.prod(sizes[dim + 1 :])
        if shape is None or width * sizes[dim] != shape[-1]:  # more than the last dimension was split
            continue
        with made.graph.inserting_before(node):
            part = made.graph.call_function(aten.slice.Tensor, (source, -1, place * width, (place + 1) * width))
            whole = made.graph.call_function(split.target, (part, [*sizes[:dim], *sizes[dim + 1 :]]))
        part.meta["mmpipe"] = replace(mark_of(source), shape=(*shape[:-1], width))
        whole.meta["mmpipe"] = mark_of(node)
        node.replace_all_uses_with(whole)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def build_engine(onnx_bytes: bytes, target: Target) -> bytes:
    """An engine for what `onnx_of` made, whose types are the engine's. No GPU is needed for TensorRT for RTX.

    Raises Unlowerable with what the parser or the builder says.
    """
    package = _package()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    # a power of two, so that the engine of yesterday is found when there is a little more or less memory today
    workspace = 0 if target.memory is None else 1 << max(target.memory, 1).bit_length() - 1
    about = f"{package.__name__} {package.__version__} {gpu} {_SETTINGS} {workspace}"
    name = hashlib.sha256(f"{hashlib.sha256(onnx_bytes).hexdigest()} {about}".encode()).hexdigest()[:40]
    return kept(target.folder, f"{name}.engine", lambda: _build(package, onnx_bytes, workspace))


def _build(package: ModuleType, onnx_bytes: bytes, workspace: int) -> bytes:
    """`workspace`: bytes that an operation may take for itself; 0: as many as it likes."""
    log = _log(package)
    builder = package.Builder(log)
    # Newer versions know no other networks, and may have no flag for these.
    flag = getattr(package.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = package.OnnxParser(network, log)
    if not parser.parse(onnx_bytes):
        errors = (str(parser.get_error(number)) for number in range(parser.num_errors))
        raise Unlowerable(f"TensorRT can't take the graph: {'; '.join(errors) or _said(log)}")
    config = builder.create_builder_config()
    config.max_aux_streams = 0  # what runs side by side is the plan's to say
    config.clear_flag(package.BuilderFlag.TF32)  # ten bits of float32's digits would be left
    if workspace:
        config.set_memory_pool_limit(package.MemoryPoolType.WORKSPACE, workspace)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Unlowerable(f"TensorRT can't build an engine: {_said(log)}")
    return bytes(engine)


def _package() -> ModuleType:
    return needed('tensorrt]" or "mmpipe[tensorrt_rtx', "tensorrt", "tensorrt_rtx")


def _log(package: Any) -> Any:
    """A logger that keeps what goes wrong, for the error that is raised, and prints nothing."""

    class Log(package.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (package.ILogger.ERROR, package.ILogger.INTERNAL_ERROR):
                self.errors.append(text)

    return Log()


def _said(log: Any) -> str:
    return "; ".join(log.errors) or "it says nothing"


class _Context:
    """An engine's execution on one stream: its working memory and its outputs, ours, allocated once."""

    def __init__(self, package: ModuleType, engine: Any, device: torch.device) -> None:
        self.context = engine.create_execution_context(package.ExecutionContextAllocationStrategy.USER_MANAGED)
        size = max(engine.device_memory_size_v2, 1)
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.context.set_device_memory(self.memory.data_ptr(), size)
        names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
        made = [name for name in names if engine.get_tensor_mode(name) == package.TensorIOMode.OUTPUT]
        self.places = places_of(name for name in names if name not in made)
        kinds = {getattr(package.DataType, theirs): ours for theirs, ours in _KINDS.items()}
        self.outputs = tuple(
            torch.empty(tuple(engine.get_tensor_shape(name)), dtype=kinds[engine.get_tensor_dtype(name)], device=device)
            for name in made
        )
        for name, tensor in zip(made, self.outputs, strict=True):
            self.context.set_tensor_address(name, tensor.data_ptr())

    def __call__(self, stream: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for name, place in self.places.items():
            self.context.set_tensor_address(name, tensors[place].data_ptr())
        if not self.context.execute_async_v3(stream):
            raise RuntimeError("TensorRT could not enqueue the engine")
        return self.outputs


_KINDS = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "BOOL": torch.bool,
}
