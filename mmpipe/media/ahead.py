"""Work done on threads ahead of its consumer, in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Ahead:
    """Decodes ahead, on threads that all its queues share. Its queues belong to one consumer's thread.

        with Ahead(workers) as ahead:
            queue = ahead.queue(load)
            queue.put(items)
            medium = queue.get()

    items_ahead (default: four for each worker) bounds the number of items of each queue that are started and not yet
    consumed. `beside`: threads that go on while the consumer has enough (default: half).
    """

    def __init__(self, workers: int, *, items_ahead: int | None = None, beside: int | None = None) -> None:
        self.workers = workers
        self.beside = max(1, workers // 2) if beside is None else beside
        self.items_ahead = 4 * workers if items_ahead is None else items_ahead
        if self.workers < 1 or self.items_ahead < 1:
            raise ValueError(f"workers={workers}, items_ahead={items_ahead}: < 1")
        self._threads: ThreadPoolExecutor | None = None
        self._turn = threading.Condition()
        self._loading, self._hungry = 0, True

    def queue(self, load: Callable[[T], R], room: Callable[[T, bool], bool] = lambda item, wait: True) -> Queue[T, R]:
        """load(item) for each item that is put, in order.

        `room(item, wait)` is called on the consumer's thread just before an item is started, and says whether it may
        be; with `wait` it waits until it may, because the consumer needs this very item.
        """
        return Queue(self, load, room)

    def submit(self, load: Callable[[T], R], item: T) -> Future[R]:
        """Put one item on the threads; they are started with the first."""
        if self._threads is None:
            self._threads = self._started()
        return self._threads.submit(self._in_turn, load, item)

    def _started(self) -> ThreadPoolExecutor:
        """The threads, each of which computes alone: a second team of OpenMP threads in a process of more threads than
        cores makes libgomp put every team to sleep between two operations (a fifth of a large model's time)."""
        import torch  # `mmpipe check` reads folders with this package, and needs no torch

        computing = torch.get_num_threads()
        begun = threading.Barrier(self.workers + 1)
        threads = ThreadPoolExecutor(self.workers, "mmpipe-ahead", initializer=_alone)
        for _ in range(self.workers):
            threads.submit(begun.wait)
        begun.wait()
        torch.set_num_threads(computing)  # of MKL's threads there is one number for all
        return threads

    def hungry(self, is_so: bool) -> None:
        """The consumer waits, or doesn't: while it has enough, all threads but `beside` leave the cores to it."""
        if self._hungry != is_so:
            with self._turn:
                self._hungry = is_so
                self._turn.notify_all()

    def _in_turn(self, load: Callable[[T], R], item: T) -> R:
        with self._turn:
            self._turn.wait_for(lambda: self._hungry or self._loading < self.beside)
            self._loading += 1
        try:
            return load(item)
        finally:
            with self._turn:
                self._loading -= 1
                self._turn.notify()

    def close(self) -> None:
        """Cancels what has not started, waits for what has, and ends the threads."""
        self.hungry(True)
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _alone() -> None:
    """This thread computes without others. Asked first: torch sets a thread's number when it first needs it, again."""
    import torch

    torch.get_num_threads()
    torch.set_num_threads(1)


class Here(Ahead):
    """As Ahead, without threads: each item when it is asked for. For so few that a thread would only add its start."""

    def __init__(self) -> None:
        super().__init__(1, items_ahead=1)

    def submit(self, load: Callable[[T], R], item: T) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(load(item))
        except Exception as error:  # noqa: BLE001 - raised at its place
            future.set_exception(error)
        return future

    def queue(self, load: Callable[[T], R], room: Callable[[T, bool], bool] = lambda item, wait: True) -> Queue[T, R]:
        return Queue(self, load, room, lazy=True)


class Queue(Generic[T, R]):
    """Items asked for, and their results in the same order. What `load` raises is raised in its place."""

    def __init__(
        self, ahead: Ahead, load: Callable[[T], R], room: Callable[[T, bool], bool], *, lazy: bool = False
    ) -> None:
        self._ahead, self._load, self._room, self._lazy = ahead, load, room, lazy
        self._asked: deque[T] = deque()
        self._started: deque[Future[R]] = deque()

    def __len__(self) -> int:
        """Results that are still to come."""
        return len(self._asked) + len(self._started)

    def put(self, items: Iterable[T]) -> None:
        """Ask for more; started as far as there is room."""
        self._asked.extend(items)
        self.push()

    def push(self) -> None:
        """Start what there is room for now. Called where the consumer has made room, or waits for something else."""
        while not self._lazy and self._asked and self._start(must=False):
            pass

    def unstarted(self) -> int:
        """Items asked for that have not been started."""
        return len(self._asked)

    def ready(self) -> bool:
        """Whether the next result is there without waiting."""
        self.push()
        return bool(self._started) and self._started[0].done()

    def drop(self) -> None:
        """Forget everything that is still to come, after what runs has ended."""
        self._asked.clear()
        self._ahead.hungry(True)
        for future in [future for future in self._started if not future.cancel()]:
            future.exception()  # waits
        self._started.clear()

    def get(self) -> R:
        """The next result. Waits for it; IndexError where nothing was asked for."""
        if not self._started:
            self._start(must=True)
        self.push()
        future = self._started[0]
        self._ahead.hungry(not future.done())
        future.exception()  # waits; an interrupt here leaves the item where it is
        self._started.popleft()
        try:
            return future.result()
        finally:
            del future  # else a raised error, its traceback and this frame keep each other alive

    def _start(self, *, must: bool) -> bool:
        """Start the next item, if there is room: in this queue's number, and where it is to be put."""
        if not must and len(self._started) >= self._ahead.items_ahead:
            return False
        item = self._asked[0]
        if not self._room(item, must):
            return False
        self._asked.popleft()
        self._started.append(self._ahead.submit(self._load, item))
        return True
