"""From files to rows: what the executor asks for is opened, decoded and prepared on threads, ahead of the model."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from mmpipe.build import Preparation
from mmpipe.cache import Recall
from mmpipe.decoders import Decoders
from mmpipe.errors import MediaError
from mmpipe.graphs.plan import Plan
from mmpipe.media import Ahead, Content, Limits, Room, content_of, estimate_bytes, is_unchanged
from mmpipe.preparing import prepared
from mmpipe.runtime.ledger import Decoding
from mmpipe.runtime.pool import MediaRows
from mmpipe.runtime.shard import Found, Known, Same
from mmpipe.types import Sample


class _Claim:
    """A row that decodes a content which others of its run have too: they wait to hear whether it could be read."""

    def __init__(self, row: int) -> None:
        self.row, self.read = row, False
        self.done = threading.Event()


class Feed:
    """Opens and prepares media on threads, ahead of the model, within the bound on memory that `room` is.

    With `recall` a medium is looked up before it is decoded, on the same threads: what is known is not decoded.
    Nor is, in a cascade, what another row of the run is decoding; a parallel run does not wait for another's answer.
    With `decoders` the threads hand files to processes, where there are some.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        preparations: Mapping[str, Preparation],
        plan: Plan,
        limits: Limits,
        ahead: Ahead,
        room: Room,
        *,
        recall: Recall | None = None,
        decoders: Decoders | None = None,
    ) -> None:
        self.decoders = decoders
        self.samples, self.preparations, self.limits = samples, preparations, limits
        self.ahead, self.room = ahead, room
        self.recall, self.shares = recall, len(plan.stage_plans[0].stages) == 1
        self.missed: Counter[str] = Counter()  # branch → media that were looked up in vain
        self._claims: dict[tuple[str, bytes], _Claim] = {}
        self._keep: dict[tuple[str, int], bytes] = {}  # (branch, row) → what its embedding is to be kept under
        self.values = {value.name: value for value in plan.values}
        self._processes_seconds = 0.0  # spent decoding by processes
        self.spent: list[float] = []  # seconds of a core for each portion of a source; several threads append
        self.spans: list[Decoding] = []
        self._lock = threading.Lock()

    def open(self, branch: str, media: MediaRows) -> MediaSource:
        """The media of one branch, decoded into `media`."""
        return MediaSource(self, branch, media)

    @property
    def core_seconds(self) -> float:
        """Spent decoding and preparing, on all workers."""
        return self._processes_seconds + sum(self.spent)

    def computing(self) -> None:
        """A bucket is about to be computed: what need not be decoded beside it waits."""
        self.ahead.hungry(False)

    def close(self) -> None:
        """Cancel what has not begun, wait for what has."""
        self.ahead.close()

    def load(self, branch: str, row: int, slot: int, media: MediaRows) -> Found:
        """On any thread: the slot that a medium was decoded into, its embedding if that is known, a row that is like
        it, or why there is none."""
        began = time.perf_counter()
        try:
            if self.recall is None or branch not in self.recall.forms:
                self._decode(branch, row, slot, media)
                return slot
            return self._found(self.recall, branch, row, slot, media)
        except MediaError as error:
            return error.alone()
        finally:
            self.spans.append(Decoding(branch, threading.current_thread().name, began, time.perf_counter()))

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
        source = self.samples[row].media[branch]

        def put(tensors: Mapping[str, Tensor]) -> None:
            media.fill(slot, self._checked(branch, tensors))

        needs = self.preparations[branch]
        if self.decoders is not None:
            about = self.limits, needs.decoded_seconds, needs.smallest_side
            with self.room.share() as share:
                share.take(estimate_bytes(branch, source, *about, reserve=share.take))
                if self.decoders.decode(branch, source, put, self._spent):
                    return
        with self.room.share() as share:  # of its own: a file that comes back is not counted twice
            put(prepared(branch, source, needs, self.limits, share.take))

    def _spent(self, seconds: float) -> None:
        with self._lock:
            self._processes_seconds += seconds

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


class MediaSource:
    """The media of one branch, in the order in which they are asked for.

    Neither its feed nor its queue know it: a shard and its samples are gone when its last row is, not when the
    collector comes, which in a process that has frozen its objects is late.
    """

    def __init__(self, feed: Feed, branch: str, media: MediaRows) -> None:
        self._media = media
        self._slot_of = slot_of = dict[int, int]()
        self._started = started = deque[int]()

        def load(row: int) -> Found:
            return feed.load(branch, row, slot_of[row], media)

        def room(row: int, wait: bool) -> bool:
            """A slot for a row that is about to begin."""
            if not wait and not media.has_free():
                return False
            slot_of[row] = media.take()
            started.append(row)
            return True

        self._queue = feed.ahead.queue(load, room, feed.spent)

    def put(self, rows: Iterable[int]) -> None:
        """Ask for rows; they are decoded ahead as far as there is room."""
        self._queue.put(rows)

    def ready(self) -> bool:
        """Whether the next is there without waiting."""
        return self._queue.ready()

    def get(self) -> Found:
        """The next. Waits."""
        found = self._queue.get()
        slot = self._slot_of.pop(self._started.popleft())
        if not isinstance(found, int):
            self._media.release(slot)
        return found

    def unstarted(self) -> int:
        """Rows that have been asked for and not begun."""
        return self._queue.unstarted()

    def drop(self) -> None:
        """Forget what was asked for and not got; its slots are free."""
        self._queue.drop()
        for row in self._started:
            self._media.release(self._slot_of.pop(row))
        self._started.clear()
