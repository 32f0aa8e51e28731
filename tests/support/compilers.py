"""Stand-ins for `mmpipe.graphs.backends.lower` that do what a compiler should not. Another process imports them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from mmpipe.graphs import backends
from mmpipe.graphs.backends import Lowered, Target, Unlowerable
from mmpipe.graphs.plan import Segment


def lower(
    backend: str, segment: Segment, module: fx.GraphModule, target: Target, examples: Sequence[Tensor] = ()
) -> Lowered:
    """There is no inductor; and texts in bfloat16 come out the wrong way round."""
    if backend == "inductor":
        raise Unlowerable("no compiler here")
    run = backends.lower(backend, segment, module, target, examples)
    if segment.branch == "text" and target.dtype != torch.float32:
        return lambda *tensors: tuple(-result for result in run(*tensors))
    return run


def crashing(
    backend: str, segment: Segment, module: fx.GraphModule, target: Target, examples: Sequence[Tensor] = ()
) -> Lowered:
    """openvino crashes; onnx ends the process; inductor never ends; tensorrt prints a lot, and raises an error of its
    own."""
    if backend == "openvino":
        os.kill(os.getpid(), signal.SIGSEGV)
    if backend == "onnx":
        os._exit(3)
    if backend == "inductor":
        time.sleep(3600)
    if backend == "tensorrt":
        print("tensorrt: nothing works")  # noqa: T201
        sys.stdout.flush()
        raise RuntimeError("out of luck\nand out of words")
    return backends.lower(backend, segment, module, target, examples)


def crashing_when_run(
    backend: str, segment: Segment, module: fx.GraphModule, target: Target, examples: Sequence[Tensor] = ()
) -> Lowered:
    """openvino compiles, and crashes when it is called."""
    run = backends.lower("eager", segment, module, target, examples)
    if backend != "openvino":
        return run

    def crash(*tensors: Tensor) -> tuple[Tensor, ...]:
        os.kill(os.getpid(), signal.SIGSEGV)
        return run(*tensors)

    return crash
