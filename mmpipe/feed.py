"""From files to rows: what the executor asks for is opened, decoded and prepared on threads, ahead of the model."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmpipe.build import Preparation
from mmpipe.cache import Recall
from mmpipe.errors import MediaError, MmpipeError
from mmpipe.graphs.plan import Plan
from mmpipe.media import Ahead, Content, Here, Limits, content_of, estimate_bytes, is_unchanged
from mmpipe.media import load as load_medium
from mmpipe.runtime.ledger import Decoding
from mmpipe.runtime.pool import MediaRows
from mmpipe.runtime.running import Found, Known, Same
from mmpipe.types import Sample


class _Claim:
    """A row that decodes a content which others of its run have too: they wait to hear whether it could be read."""

    def __init__(self, row: int) -> None:
        self.row, self.read = row, False
        self.done = threading.Event()


class Feed:
    """Opens and prepares media on threads, ahead of the model, within the bound on memory.

    With `recall` a medium is looked up before it is decoded, on the same threads: what is known is not decoded.
    `shares`: nor is what another row of the run is decoding; those that wait for one another need a cascade.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        preparations: Mapping[str, Preparation],
        plan: Plan,
        limits: Limits,
        ahead: Ahead | Here,
        *,
        recall: Recall | None = None,
        shares: bool = False,
    ) -> None:
        self.samples, self.preparations, self.limits, self.ahead = samples, preparations, limits, ahead
        self.recall, self.shares = recall, shares
        self.missed: Counter[str] = Counter()  # branch → media that were looked up in vain
        self._claims: dict[tuple[str, bytes], _Claim] = {}
        self._keep: dict[tuple[str, int], bytes] = {}  # (branch, row) → what its embedding is to be kept under
        self.values = {value.name: value for value in plan.values}
        self.core_seconds = 0.0  # spent decoding and preparing, on all workers
        self.spans: list[Decoding] = []
        self._lock = threading.Lock()

    def __call__(self, branch: str, rows: Sequence[int], media: MediaRows) -> Iterator[Found]:
        """For each row, in order: the media slot that it was decoded into, its embedding if that is known, a row that
        is like it, or why there is none."""
        preparation = self.preparations[branch]

        def load(item: tuple[int, int]) -> Found:
            row, slot = item
            clock, began = time.thread_time(), time.perf_counter()
            try:
                if self.recall is None or branch not in self.recall.forms:
                    self._decode(branch, row, slot, media)
                    return slot
                return self._found(self.recall, branch, row, slot, media)
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
            for found in loaded:
                slot = taken.popleft()
                if not isinstance(found, int):
                    media.release(slot)
                yield found

    def computed(self, branch: str, rows: Sequence[int], embeddings_KD: Tensor) -> None:
        """Keep the embeddings of rows that were looked up in vain."""
        if self.recall is None:
            return
        with self._lock:
            contents = [self._keep.pop((branch, row), None) for row in rows]
        places = [place for place, content in enumerate(contents) if content is not None]
        if places:
            kept = [content for content in contents if content is not None]
            self.recall.keep(branch, kept, embeddings_KD[places])

    def _decode(self, branch: str, row: int, slot: int, media: MediaRows) -> None:
        source, seconds = self.samples[row].media[branch], self.preparations[branch].max_seconds
        medium = load_medium(branch, source, limits=self.limits, max_seconds=seconds)
        media.fill(slot, self._checked(branch, self._prepared(branch, medium)))

    def _found(self, recall: Recall, branch: str, row: int, slot: int, media: MediaRows) -> Found:
        """Look a medium up; else decode it, once for all rows that have it."""
        source = self.samples[row].media[branch]
        content = content_of(branch, source, self.limits)
        if content is None:
            self._decode(branch, row, slot, media)
            return slot
        known = recall.find(branch, content.digest)
        if known is not None:
            return Known(known)
        claim = self._claim(branch, content, row)
        if claim.row != row:
            claim.done.wait()  # whoever has it is at work on another thread: a claim is made by who decodes at once
            if claim.read:
                return Same(claim.row)
        try:
            self._decode(branch, row, slot, media)
            # a broken file is not kept, nor one that was written to while it was read
            if is_unchanged(branch, source, content, self.limits):
                claim.read = claim.row == row
                with self._lock:
                    self._keep[branch, row] = content.digest
        finally:
            with self._lock:
                self.missed[branch] += 1
            if claim.row == row:
                claim.done.set()
        return slot

    def _claim(self, branch: str, content: Content, row: int) -> _Claim:
        """The claim on a content: an earlier row's, else one of this row's own."""
        if not self.shares:
            return _Claim(row)
        with self._lock:
            return self._claims.setdefault((branch, content.digest), _Claim(row))

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
