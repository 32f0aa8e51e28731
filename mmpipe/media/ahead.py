"""Work done on threads ahead of its consumer, in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

from mmpipe.errors import MmpipeError

T = TypeVar("T")
R = TypeVar("R")
_Task = tuple["Future[Any]", Callable[[Any], Any], Any]  # load(item) → future

_LOOK_AGAIN_SECONDS = 0.01
PORTION_SECONDS = 0.003  # what a thread is given at once takes no longer, so that it soon hears that it should wait


class Ahead:
    """Decodes ahead, on threads that all its queues share. Its queues belong to one consumer's thread.

        with Ahead(workers) as ahead:
            queue = ahead.queue(load)
            queue.put(items)
            medium = queue.get()

    items_ahead (default: four for each worker) bounds the number of items of each queue that are started and not yet
    consumed. `beside`: threads that go on while the consumer has enough (default: half). While it waits, all do but
    as many as `computing` says are at work elsewhere.
    """

    _lazy = False  # an item is not started before it is asked for

    def __init__(
        self,
        workers: int,
        *,
        items_ahead: int | None = None,
        beside: int | None = None,
        computing: Callable[[], int] = lambda: 0,
    ) -> None:
        self.workers = workers
        self.beside = max(1, workers // 2) if beside is None else beside
        self.items_ahead = 4 * workers if items_ahead is None else items_ahead
        self.computing = computing
        if self.workers < 1 or self.items_ahead < 1:
            raise ValueError(f"workers={workers}, items_ahead={items_ahead}: < 1")
        self._threads: list[threading.Thread] = []
        self._turn = threading.Condition()
        self._tasks: deque[_Task] = deque()  # in the order in which they are to begin
        self._loading, self._hungry, self._closing = 0, True, False

    def queue(
        self,
        load: Callable[[T], R],
        room: Callable[[T, bool], bool] = lambda item, wait: True,
        spent: list[float] | None = None,
    ) -> Queue[T, R]:
        """load(item) for each item that is put, in order.

        `room(item, wait)` is called on the consumer's thread just before an item is started, and says whether it may
        be; with `wait` it waits until it may, because the consumer needs this very item. `spent` gets the seconds of a
        core that each portion took.
        """
        return Queue(self, load, room, spent, lazy=self._lazy)

    def submit(self, load: Callable[[T], R], item: T) -> Future[R]:
        """Put one item on the threads; they are started with the first."""
        if not self._threads:
            self._start()
        future: Future[R] = Future()
        with self._turn:
            self._tasks.append((future, load, item))
            self._turn.notify()
        return future

    def _start(self) -> None:
        """The threads, each of which computes alone: a second team of OpenMP threads in a process of more threads than
        cores makes libgomp put every team to sleep between two operations (a fifth of a large model's time)."""
        import torch  # `mmpipe check` reads folders with this package, and needs no torch

        computing = torch.get_num_threads()
        begun = threading.Semaphore(0)
        for number in range(self.workers):
            thread = threading.Thread(target=self._work, args=(begun,), name=f"mmpipe-ahead_{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system allows no more: those that are there do it
                if not self._threads:
                    raise MmpipeError(f"no thread can be started that decodes media: {error}") from error
                break
            self._threads.append(thread)
        for _ in self._threads:
            begun.acquire()
        torch.set_num_threads(computing)  # of MKL's threads there is one number for all

    def hungry(self, is_so: bool) -> None:
        """The consumer waits, or doesn't: while it has enough, all threads but `beside` leave the cores to it."""
        if self._hungry != is_so:
            with self._turn:
                self._hungry = is_so
                self._turn.notify_all()

    def _work(self, begun: threading.Semaphore) -> None:
        """A thread's life. It takes the oldest task when it may begin, not before: the consumer waits for that one."""
        _alone()
        begun.release()
        while (task := self._next()) is not None:
            future, load, item = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(load(item))
                except BaseException as error:  # noqa: BLE001 - the consumer raises it
                    future.set_exception(error)
            del task, future, load, item  # else the last one's medium lives until the next comes
            with self._turn:
                self._loading -= 1

    def _next(self) -> _Task | None:
        """The oldest task, when its turn has come. None: no more will come."""
        with self._turn:
            while not self._tasks or self._loading >= self._allowed():
                if self._closing and not self._tasks:
                    return None
                # nobody tells that computing has ended
                self._turn.wait(_LOOK_AGAIN_SECONDS if self._tasks and self._hungry else None)
            self._loading += 1
            return self._tasks.popleft()

    def _allowed(self) -> int:
        """How many threads may be loading now."""
        return max(self.beside, 1, self.workers - self.computing()) if self._hungry else self.beside

    def close(self) -> None:
        """Cancels what has not started, waits for what has, and ends the threads."""
        with self._turn:
            for future, _, _ in self._tasks:
                future.cancel()
            self._tasks.clear()
            self._closing = True
            self._turn.notify_all()
        for thread in self._threads:
            thread.join()

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

    _lazy = True

    def __init__(self) -> None:
        super().__init__(1, items_ahead=1)

    def submit(self, load: Callable[[T], R], item: T) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(load(item))
        except Exception as error:  # noqa: BLE001 - raised at its place
            future.set_exception(error)
        return future


class Queue(Generic[T, R]):
    """Items asked for, and their results in the same order. What `load` raises is raised in its place.

    Items that take little are handed to a thread a few at a time: what handing over costs, on a thread that waits for
    Python's lock like all others, is as much as many a small file.
    """

    def __init__(
        self,
        ahead: Ahead,
        load: Callable[[T], R],
        room: Callable[[T, bool], bool],
        spent: list[float] | None = None,
        *,
        lazy: bool = False,
    ) -> None:
        self._ahead, self._load, self._room, self._lazy = ahead, load, room, lazy
        self._asked: deque[T] = deque()
        self._started: deque[Future[list[_Outcome[R]]]] = deque()
        self._arrived: deque[_Outcome[R]] = deque()  # of what was started first
        self._begun = 0  # items started and not yet consumed
        self._seconds = PORTION_SECONDS  # that an item takes, about
        self._spent = [] if spent is None else spent

    def __len__(self) -> int:
        """Results that are still to come."""
        return len(self._asked) + self._begun

    def put(self, items: Iterable[T]) -> None:
        """Ask for more; started as far as there is room."""
        self._asked.extend(items)
        self.push()

    def push(self) -> None:
        """Start what there is room for now. Called where the consumer has made room, or waits for something else."""
        if self._lazy:
            return
        while self._asked:
            left = self._ahead.items_ahead - self._begun
            count = min(self._portion(), len(self._asked))
            if left < count or not self._start(count, must=False):  # a thread is not woken for less
                return

    def unstarted(self) -> int:
        """Items asked for that have not been started."""
        return len(self._asked)

    def ready(self) -> bool:
        """Whether the next result is there without waiting."""
        self.push()
        return bool(self._arrived) or (bool(self._started) and self._started[0].done())

    def drop(self) -> None:
        """Forget everything that is still to come, after what runs has ended."""
        self._asked.clear()
        self._ahead.hungry(True)
        for future in [future for future in self._started if not future.cancel()]:
            future.exception()  # waits
        self._started.clear()
        self._arrived.clear()
        self._begun = 0

    def get(self) -> R:
        """The next result. Waits for it; IndexError where nothing was asked for."""
        if not self._begun:
            self._start(1, must=True)
        self.push()
        if not self._arrived:
            future = self._started[0]
            self._ahead.hungry(not future.done())
            future.exception()  # waits; an interrupt here leaves the items where they are
            self._started.popleft()
            self._arrived.extend(future.result())
        self._begun -= 1
        return self._arrived.popleft().result()

    def _portion(self) -> int:
        """How many items a thread is given at once: what fits into PORTION_SECONDS, and leaves some to the others."""
        most = max(1, self._ahead.items_ahead // (4 * self._ahead.workers))
        return max(1, min(most, int(PORTION_SECONDS / max(self._seconds, 1e-9))))

    def _start(self, count: int, *, must: bool) -> bool:
        """Start the next items, `count` at most, as many as there is room for where they are to be put."""
        items: list[T] = []
        while len(items) < count and self._room(self._asked[0], must):
            items.append(self._asked.popleft())
        if not items:
            return False
        self._begun += len(items)
        self._started.append(self._ahead.submit(self._load_all, items))
        return True

    def _load_all(self, items: Sequence[T]) -> list[_Outcome[R]]:
        # Asking for a thread's clock lets the kernel give its core to another, and Python's lock is not given with it:
        # asked at every small file, all threads wait for one that may not run (a tenth of a job of small models).
        began, clock = time.perf_counter(), time.thread_time()
        loaded = [_Outcome.of(self._load, item) for item in items]
        self._spent.append(time.thread_time() - clock)
        each = (time.perf_counter() - began) / len(items)
        self._seconds += (each - self._seconds) / 8  # threads may forget one another's: it is only about
        return loaded


class _Outcome(Generic[R]):
    """What a call returned or raised."""

    __slots__ = ("_error", "_value")

    def __init__(self, value: R | None, error: BaseException | None) -> None:
        self._value, self._error = value, error

    @classmethod
    def of(cls, call: Callable[[T], R], item: T) -> _Outcome[R]:
        try:
            return cls(call(item), None)
        except BaseException as error:  # noqa: BLE001 - raised at its place
            return cls(None, error)

    def result(self) -> R:
        error, self._error = self._error, None  # else the error, its traceback and this frame keep each other alive
        if error is not None:
            try:
                raise error
            finally:
                del error
        return cast(R, self._value)
