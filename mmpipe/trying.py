"""A way to compute a segment, compiled and timed in a process of its own: a compiler may crash, or never end.

Trial       a segment in one bucket, as another process can read it
Workbench   that process: started when first asked, and anew after it died
Measured    what it found, or why there is nothing
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.fx import GraphModule

from mmpipe.graphs import parcel
from mmpipe.graphs.backends import Lowered, Target, Unlowerable
from mmpipe.graphs.plan import Segment
from mmpipe.loading import freed_memory_is_kept, keep_freed_memory
from mmpipe.resolved import PLAIN, Choice
from mmpipe.runtime.executor import threads_of

LIMIT_S = 600.0  # for one way, compiled twice and timed
_LEAST_RUNS, _MOST_RUNS = 3, 50  # after a run that warms it up
_END_S = 5.0  # for a process to be gone after it closed its pipe

Lower = Callable[..., Lowered]


@dataclass(frozen=True)
class Trial:
    """`content`: the module and its inputs, as bytes. `real`: how many rows are. `seconds`: to time a way for."""

    segment: Segment
    content: tuple[bytes, bytes]
    rows: int
    real: int
    threads: int
    folder: Path | None
    seconds: float

    @classmethod
    def of(
        cls,
        segment: Segment,
        module: GraphModule,
        inputs: Sequence[Tensor],
        real: int,
        threads: int,
        folder: Path | None,
        seconds: float,
    ) -> Self:
        # Bytes, not tensors: those would be moved into shared memory, which containers have little of.
        given = io.BytesIO()
        torch.save([*inputs], given)
        content = parcel.wrap(module), given.getvalue()
        return cls(segment, content, len(inputs[0]), real, threads, folder, seconds)


@dataclass(frozen=True)
class Measured:
    """`cosine`: the least to eager float32, over the real rows. `why`: why there are no figures; "" where there are."""

    row_seconds: float = 0.0
    cosine: float = 1.0
    compile_seconds: float = 0.0
    ready_seconds: float = 0.0  # the second time, with what is kept of the first
    why: str = ""


class Workbench:
    """Tries ways in one child process after the other. Close it, or use it as a context.

    `lower`: what makes a segment's function, `mmpipe.graphs.backends.lower` or one like it; the child imports it.
    `limit_s`: after so long a way is given up, and its process killed.
    """

    def __init__(self, lower: Lower, limit_s: float = LIMIT_S) -> None:
        self.lower, self.limit_s = lower, limit_s
        self._process: Any = None
        self._pipe: Connection | None = None
        self._at: Trial | None = None  # what the child has

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the child: when its pipe is closed it ends by itself, unless it hangs."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.join(_END_S)
            self._process.kill()
            self._process.join()
            self._process.close()
        self._process = self._pipe = self._at = None

    def measure(self, trial: Trial, choice: Choice) -> Measured:
        """Whatever happens to the child is an answer."""
        pipe = self._started()
        try:
            if self._at is not trial:
                pipe.send(trial)
                self._at = trial
            pipe.send(choice)
            if pipe.poll(self.limit_s):
                answer: Measured = pipe.recv()
                return answer
            why = f"it did not end within {self.limit_s:g} s"
            self._process.kill()
        except (EOFError, OSError):
            why = self._ended()
        self.close()
        return Measured(why=why)

    def _started(self) -> Connection:
        if self._pipe is None:
            # not forked: the threads of this process' libraries would be missing in the child
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(theirs, self.lower, freed_memory_is_kept()), name="mmpipe autotune"
            )
            self._process.start()
            theirs.close()  # so that its end is seen
        return self._pipe

    def _ended(self) -> str:
        self._process.join(_END_S)
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"it crashed (signal {-code})"
        return "its process closed its pipe" if code is None else f"its process ended with code {code}"


def _serve(pipe: Connection, lower: Lower, keeps_memory: bool) -> None:
    """The child: trials and choices in, an answer for each choice out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    os.dup2(2, 1)  # what a compiler prints is no result
    if keeps_memory:
        keep_freed_memory()
    bench: _Bench | None = None
    while True:
        try:
            given = pipe.recv()
        except EOFError:
            return
        if isinstance(given, Trial):
            bench = _Bench(given, lower)
            continue
        assert bench is not None
        pipe.send(bench.measured(given))


class _Bench:
    """One segment in one bucket, on the child's side."""

    def __init__(self, trial: Trial, lower: Lower) -> None:
        self.trial, self.lower = trial, lower
        module, inputs = trial.content
        self.module = parcel.unwrap(module)
        self.inputs: list[Tensor] = torch.load(io.BytesIO(inputs))
        self.wanted: list[Tensor] = []

    def measured(self, choice: Choice) -> Measured:
        try:
            if not self.wanted:
                with threads_of(self.trial.threads), torch.inference_mode():
                    self.wanted = [result.clone() for result in self._lowered(PLAIN)(*self.inputs)]
            began = time.perf_counter()
            self._lowered(choice)
            compiled = time.perf_counter() - began
            began = time.perf_counter()
            run = self._lowered(choice)
            ready = time.perf_counter() - began
            with threads_of(self.trial.threads), torch.inference_mode():
                cosine = self._cosine(run)
                seconds = self._seconds(run) / self.trial.rows
        except Unlowerable as error:
            return Measured(why=str(error))
        except Exception as error:  # noqa: BLE001 - of a library that is on trial: whatever it raises is the answer
            line = next(iter(str(error).splitlines()), "")
            return Measured(why=f"{type(error).__name__}: {line}")
        return Measured(seconds, cosine, compiled, ready)

    def _lowered(self, choice: Choice) -> Lowered:
        trial = self.trial
        target = Target(trial.rows, getattr(torch, choice.dtype), trial.threads, trial.folder)
        return self.lower(choice.backend, trial.segment, self.module, target, self.inputs)

    def _cosine(self, run: Lowered) -> float:
        """The least over the rows that are real (all, where none is) and the segment's results."""
        least = 1.0
        for wanted, got in zip(self.wanted, run(*self.inputs), strict=True):
            one, other = (value[: self.trial.real].float().flatten(1) for value in (wanted, got))
            found = torch.nn.functional.cosine_similarity(one, other, dim=1).min()
            least = min(least, float(found)) if found == found else -1.0
        return least

    def _seconds(self, run: Lowered) -> float:
        """The fastest of some runs: what else the machine does only ever adds."""
        run(*self.inputs)
        times: list[float] = []
        while len(times) < _LEAST_RUNS or (sum(times) < self.trial.seconds and len(times) < _MOST_RUNS):
            began = time.perf_counter()
            run(*self.inputs)
            times.append(time.perf_counter() - began)
        return min(times)
