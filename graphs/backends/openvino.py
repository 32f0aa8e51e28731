"""OpenVINO on the CPU, in float32 or bfloat16: the type is always said, as its own default depends on the machine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from mmpipe.graphs.backends import Lowered, Target, Unlowerable
from mmpipe.graphs.backends.export import needed, onnx_of
from mmpipe.graphs.plan import Segment

_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def lower(segment: Segment, module: fx.GraphModule, target: Target, examples: Sequence[Tensor]) -> Lowered:
    """Compiled once, for one call at a time: calls from several threads are safe, and take turns.

    Inputs are read where they are; outputs are the calling thread's, valid until its next call.
    """
    openvino = needed("openvino", "openvino")
    hint = _HINTS.get(target.dtype)
    core = openvino.Core()
    if hint is None:
        raise Unlowerable(f"{segment.name}: OpenVINO computes in float32 or bfloat16, not in {target.dtype}")
    if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unlowerable(f"{segment.name}: this CPU has no bfloat16 units that OpenVINO could use")
    config = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": target.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # pinned, it would wait for whatever else runs on its core
    }
    content = onnx_of(segment, module, target, examples)
    try:
        compiled = core.compile_model(core.read_model(content), "CPU", config)
    except RuntimeError as error:
        raise Unlowerable(f"{segment.name}: OpenVINO can't take it: {error}") from error
    requests = _Requests(openvino, compiled)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        for place, tensor in enumerate(tensors):
            requests.one.set_input_tensor(place, openvino.Tensor(tensor.numpy(), shared_memory=True))
        requests.one.infer(share_outputs=True)
        return requests.outputs

    return run


class _Requests(threading.local):
    """A thread's request, and the memory that it writes into."""

    def __init__(self, openvino: Any, compiled: Any) -> None:
        self.one = compiled.create_infer_request()
        arrays = [np.empty(tuple(made.shape), made.element_type.to_dtype()) for made in compiled.outputs]
        for place, array in enumerate(arrays):
            self.one.set_output_tensor(place, openvino.Tensor(array, shared_memory=True))
        self.outputs = tuple(map(torch.from_numpy, arrays))
