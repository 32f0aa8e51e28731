"""OpenVINO on the CPU, in float32 or bfloat16: the type is always said, as its own default depends on the machine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from mmpipe.graphs.backends import Lowered, Target, Unlowerable
from mmpipe.graphs.backends.export import needed, onnx_of, places_of
from mmpipe.graphs.backends.spectrum import split
from mmpipe.graphs.plan import Segment

_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def lower(segment: Segment, module: fx.GraphModule, target: Target, examples: Sequence[Tensor]) -> Lowered:
    """Compiled once, for one call at a time: calls from several threads are safe, and take turns.

    Inputs are read where they are; outputs are the calling thread's, valid until its next call. In bfloat16 a log
    spectrum is still computed in float32.
    """
    openvino = needed("openvino", "openvino")
    hint = _HINTS.get(target.dtype)
    if hint is None:
        raise Unlowerable(f"{segment.name}: OpenVINO computes in float32 or bfloat16, not in {target.dtype}")
    core = openvino.Core()
    if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unlowerable(f"{segment.name}: this CPU has no bfloat16 units that OpenVINO could use")

    def compiled(part: fx.GraphModule, given: Sequence[Tensor], precision: str) -> Lowered:
        config = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": target.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # pinned, it would wait for whatever else runs on its core
        }
        content = onnx_of(segment, part, target, given)
        try:
            return _function(openvino, core.compile_model(core.read_model(content), "CPU", config))
        except RuntimeError as error:
            raise Unlowerable(f"{segment.name}: OpenVINO can't take it: {error}") from error

    parts = split(module) if hint == "bf16" else None
    if parts is None:
        return compiled(module, examples, hint)
    front = compiled(parts[0], examples, "f32")
    rest = compiled(parts[1], (*examples, *front(*examples)), hint)
    return lambda *tensors: rest(*tensors, *front(*tensors))


def _function(openvino: ModuleType, compiled: Any) -> Lowered:
    requests = _Requests(openvino, compiled)
    places = tuple(places_of(given.any_name for given in compiled.inputs).values())

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        for index, place in enumerate(places):
            requests.one.set_input_tensor(index, openvino.Tensor(tensors[place].numpy(), shared_memory=True))
        requests.one.infer(share_outputs=True)
        return requests.outputs

    return run


class _Requests(threading.local):
    """A thread's request, and the memory that it writes into."""

    def __init__(self, openvino: ModuleType, compiled: Any) -> None:
        self.one = compiled.create_infer_request()
        arrays = [np.empty(tuple(made.shape), made.element_type.to_dtype()) for made in compiled.outputs]
        for place, array in enumerate(arrays):
            self.one.set_output_tensor(place, openvino.Tensor(array, shared_memory=True))
        self.outputs = tuple(map(torch.from_numpy, arrays))
