"""Work done on threads ahead of its consumer, in order, within a bound on memory."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Ahead:
    """Decodes ahead: `with Ahead(workers, memory_limit_bytes) as ahead: for medium in ahead.map(load, items, cost)`.

    memory_limit_bytes bounds the sum of the costs of all items that are started and not yet consumed; an item is
    consumed when the next one is asked for. One item above the bound is let through alone. items_ahead (default:
    four for each worker) bounds their number. Both hold for each iterator by itself. The bound is as good as `cost`.
    """

    def __init__(self, workers: int, memory_limit_bytes: int, *, items_ahead: int | None = None) -> None:
        self.workers = workers
        self.memory_limit_bytes = memory_limit_bytes
        self.items_ahead = 4 * workers if items_ahead is None else items_ahead
        if self.workers < 1 or self.memory_limit_bytes < 1 or self.items_ahead < 1:
            raise ValueError(
                f"workers={workers}, memory_limit_bytes={memory_limit_bytes}, items_ahead={items_ahead}: < 1"
            )
        self._pools: set[ThreadPoolExecutor] = set()  # outlive an iterator that was dropped: close() waits for them
        self._iterators: weakref.WeakSet[AheadIterator[object, object]] = weakref.WeakSet()

    def map(self, load: Callable[[T], R], items: Iterable[T], cost: Callable[[T], int]) -> AheadIterator[T, R]:
        """load(item) for each item, in order. Items and costs are taken on the consumer's thread.

        What `load`, `cost` or `items` raises is raised at that item's place; after an error of `load` or `cost`,
        asking again goes on with the next item.
        """
        iterator = AheadIterator(self, load, iter(items), cost)
        self._iterators.add(iterator)  # type: ignore[arg-type]
        return iterator

    def close(self) -> None:
        """Cancels what has not started, waits for what has, and ends the threads."""
        for iterator in list(self._iterators):
            iterator.close()
        while self._pools:
            self._pools.pop().shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Here:
    """As Ahead, without threads: each item when it is asked for. For so few that a thread would only add its start."""

    def map(self, load: Callable[[T], R], items: Iterable[T], cost: Callable[[T], int]) -> Generator[R, None, None]:
        """load(item) for each item, in order."""
        for item in items:
            yield load(item)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None


class AheadIterator(Generic[T, R]):
    """The results, in order. `close()` (or leaving the `Ahead`, or dropping the iterator) ends its threads."""

    def __init__(self, ahead: Ahead, load: Callable[[T], R], items: Iterator[T], cost: Callable[[T], int]) -> None:
        self._load, self._items, self._cost = load, items, cost
        self._limit_bytes, self._items_ahead = ahead.memory_limit_bytes, ahead.items_ahead
        self._pool = ThreadPoolExecutor(ahead.workers, thread_name_prefix="mmpipe-ahead")
        self._pools = ahead._pools
        self._pools.add(self._pool)
        self._started: deque[tuple[Future[R], int]] = deque()
        self._next: tuple[T, int] | None = None  # taken from items, waiting for room
        self._used_bytes = 0  # started, or with the consumer
        self._held_bytes = 0  # of _used_bytes: what the consumer has
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> R:
        self._used_bytes -= self._held_bytes
        self._held_bytes = 0
        self._start_what_fits()
        if not self._started:
            self.close()
            raise StopIteration
        future, cost = self._started[0]
        future.exception()  # waits; an interrupt here leaves the item where it is
        self._started.popleft()
        self._held_bytes = cost
        try:
            return future.result()
        finally:
            del future  # else a raised error, its traceback and this frame keep each other alive

    def _start_what_fits(self) -> None:
        while len(self._started) < self._items_ahead:
            if self._next is None and not self._take():
                return
            if self._next is None:
                continue  # its cost failed: it already has its place
            item, cost = self._next
            if self._used_bytes and self._used_bytes + cost > self._limit_bytes:
                return
            self._next = None
            self._used_bytes += cost
            self._started.append((self._pool.submit(self._load, item), cost))

    def _take(self) -> bool:
        """Moves one item from `items` to `_next`, or its error to its place. False: there are no more."""
        if self._ended:
            return False
        try:
            item = next(self._items)
        except StopIteration:
            self._ended = True
            return False
        except Exception as error:  # noqa: BLE001 - whatever the user's iterable raises, after what came before it
            self._ended = True
            self._failed(error)
            return True
        try:
            self._next = item, max(0, self._cost(item))
        except Exception as error:  # noqa: BLE001 - as load's own
            self._failed(error)
        return True

    def _failed(self, error: Exception) -> None:
        future: Future[R] = Future()
        future.set_exception(error)
        self._started.append((future, 0))

    def close(self) -> None:
        """Cancels what has not started, waits for what has, and ends the threads. May be called again."""
        self._ended, self._next = True, None
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pools.discard(self._pool)
        self._started.clear()

    def __del__(self) -> None:
        if hasattr(self, "_pool"):
            self._pool.shutdown(wait=False, cancel_futures=True)
