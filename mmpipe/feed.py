"""From files to rows: what the executor asks for is opened, decoded and prepared on threads, ahead of the model."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmpipe.build import Preparation
from mmpipe.errors import MediaError, MmpipeError
from mmpipe.graphs.plan import Plan
from mmpipe.media import Ahead, Here, Limits, estimate_bytes
from mmpipe.media import load as load_medium
from mmpipe.runtime.ledger import Decoding
from mmpipe.runtime.pool import MediaRows
from mmpipe.types import Sample


class Feed:
    """Opens and prepares media on threads, ahead of the model, within the bound on memory."""

    def __init__(
        self,
        samples: Sequence[Sample],
        preparations: Mapping[str, Preparation],
        plan: Plan,
        limits: Limits,
        ahead: Ahead | Here,
    ) -> None:
        self.samples, self.preparations, self.limits, self.ahead = samples, preparations, limits, ahead
        self.values = {value.name: value for value in plan.values}
        self.core_seconds = 0.0  # spent decoding and preparing, on all workers
        self.spans: list[Decoding] = []
        self._lock = threading.Lock()

    def __call__(self, branch: str, rows: Sequence[int], media: MediaRows) -> Iterator[int | MediaError]:
        """For each row, in order: the media slot that it was decoded into, or why not."""
        preparation = self.preparations[branch]

        def load(item: tuple[int, int]) -> MediaError | None:
            row, slot = item
            clock, began = time.thread_time(), time.perf_counter()
            try:
                source = self.samples[row].media[branch]
                medium = load_medium(branch, source, limits=self.limits, max_seconds=preparation.max_seconds)
                media.fill(slot, self._checked(branch, self._prepared(branch, medium)))
                return None
            except MediaError as error:
                return error
            finally:
                span = Decoding(branch, threading.current_thread().name, began, time.perf_counter())
                with self._lock:
                    self.core_seconds += time.thread_time() - clock
                    self.spans.append(span)

        def cost(item: tuple[int, int]) -> int:
            source = self.samples[item[0]].media[branch]
            return estimate_bytes(branch, source, self.limits, preparation.max_seconds)

        taken: deque[int] = deque()

        def items() -> Iterator[tuple[int, int]]:
            """Asked for in order, on the consumer's thread: a slot is taken when its row may begin."""
            for row in rows:
                taken.append(media.take())
                yield row, taken[-1]

        with contextlib.closing(self.ahead.map(load, items(), cost)) as loaded:
            for error in loaded:
                slot = taken.popleft()
                if error is None:
                    yield slot
                else:
                    media.release(slot)
                    yield error

    def _prepared(self, branch: str, medium: Any) -> Mapping[str, Tensor]:
        try:
            with torch.inference_mode():
                return self.preparations[branch].prepare(medium)
        except MmpipeError:
            raise
        except Exception as error:  # a user's own code may raise anything; one sample must not end a job
            raise MediaError(branch, "unusable", f"{type(error).__name__}: {error}") from error

    def _checked(self, branch: str, prepared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Every sample's tensors have the shapes that the graph was captured with; else they'd spread to others."""
        for name, tensor in prepared.items():
            value = self.values[f"{branch}.{name}"]
            if tuple(tensor.shape) != value.shape or tensor.dtype != value.dtype:
                raise MediaError(
                    branch,
                    "wrong_shape",
                    f"prepare() made {name} {tuple(tensor.shape)} {tensor.dtype}; "
                    f"the graph has {value.shape} {value.dtype}",
                )
        return prepared
