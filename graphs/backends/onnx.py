"""The ONNX Runtime on the CPU, in float32: on machines without bfloat16 units it is ahead of eager."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from mmpipe.graphs.backends import Lowered, Target, Unlowerable
from mmpipe.graphs.backends.export import needed, onnx_of, places_of
from mmpipe.graphs.plan import Segment


def lower(segment: Segment, module: fx.GraphModule, target: Target, examples: Sequence[Tensor]) -> Lowered:
    """A session of its own with target.threads threads. Inputs are read where they are; outputs are new each time."""
    runtime = needed("onnx", "onnxruntime")
    if target.dtype != torch.float32:
        raise Unlowerable(f"{segment.name}: the ONNX Runtime computes in float32 on a CPU, not in {target.dtype}")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.log_severity_level = 4  # what it complains of comes as an exception too
    # Its threads wait for more work at full speed; when a run ends, the cores are the next segment's and the decoders'.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    content = onnx_of(segment, module, target, examples)
    try:
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise Unlowerable(f"{segment.name}: the ONNX Runtime can't take it: {error}") from error
    places = places_of(given.name for given in session.get_inputs())

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = session.run(None, {name: tensors[place].numpy() for name, place in places.items()})
        return tuple(map(torch.from_numpy, found))

    return run
