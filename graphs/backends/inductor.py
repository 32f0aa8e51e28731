"""PyTorch's own compiler: C++ for what stands between the matrix products, weights packed once; on a GPU, Triton. Needs
a C++ compiler.

Compiling takes seconds for a small encoder, a minute for a large one; what it wrote is kept where `target.folder` says,
and found again in a fraction of that.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from mmpipe.graphs.backends import Lowered, Target, Unlowerable
from mmpipe.graphs.backends.sealed import Sealed
from mmpipe.graphs.digest import digest
from mmpipe.graphs.plan import Segment
from mmpipe.graphs.precision import lowered

# Weights become constants of the code, packed for the products; products that read the same input become one.
_OPTIONS = {"freezing": True, "cpp.weight_prepack": True, "cpp.enable_concat_linear": True}


def lower(segment: Segment, module: fx.GraphModule, target: Target, examples: Sequence[Tensor]) -> Lowered:
    """Compile a segment for one bucket. Raises Unlowerable where the compiler is missing or gives up."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None and shutil.which("clang++") is None:
        raise Unlowerable(f"inductor needs a C++ compiler, and there is no {compiler} here: install one, or set CXX")
    short = lowered(module, target.dtype)
    with contextlib.ExitStack() as stack:
        if target.folder is not None:
            place = _place(stack, target.folder, _key(short, target, examples))
            stack.enter_context(_compiled_in(place))
        threads = torch.get_num_threads()
        torch.set_num_threads(target.threads)  # the code has their number in it
        try:
            # of a copy: the compiler rewrites the graph
            with _quiet(), torch.inference_mode(False), torch.no_grad():
                plain: list[Any] = [example.clone() for example in examples]
                whole = fx.GraphModule(short, copy.deepcopy(short.graph))
                compiled: Callable[..., Any] = torch._inductor.compile(whole, plain, options=_OPTIONS)
                compiled(*plain)
        except Exception as error:
            raise Unlowerable(f"inductor could not compile {segment.name}: {_first_line(error)}") from error
        finally:
            torch.set_num_threads(threads)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(compiled(*tensors))

    return run


def _place(stack: contextlib.ExitStack, folder: Path, key: str) -> Path:
    """Where the compiler may write: to be kept, or else for this time."""
    try:
        return stack.enter_context(Sealed(folder, key)).place
    except OSError as error:
        warnings.warn(f"what inductor compiles is not kept: {error}", RuntimeWarning, stacklevel=1)
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmpipe-", ignore_cleanup_errors=True)))


def _key(module: fx.GraphModule, target: Target, examples: Sequence[Tensor]) -> str:
    """What the code depends on besides the processor, which the compiler itself looks at."""
    about = [
        torch.__version__,
        target.device,
        target.rows,
        target.threads,
        [(tuple(e.shape), str(e.dtype)) for e in examples],
    ]
    return f"inductor-{hashlib.sha256(digest(module) + repr([about, _OPTIONS]).encode()).hexdigest()[:32]}"


@contextlib.contextmanager
def _compiled_in(folder: Path) -> Iterator[None]:
    places = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    before = {name: os.environ.get(name) for name in places}
    os.environ.update(places)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the compiler's warnings about GPUs that are not there, and what it leaves to others."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch._inductor", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    if full := next((line.strip() for line in lines if "No space left" in line), ""):
        return full
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
