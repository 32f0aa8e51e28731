"""Order, errors in their place, and no thread left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpipe.errors import MmpipeError
from mmpipe.media import Ahead, Here


def own_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("mmpipe-ahead")]


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(0, 30),
    workers=st.integers(1, 4),
    items_ahead=st.integers(1, 6),
    stop_after=st.none() | st.integers(0, 10),
)
def test_in_order_and_no_more_than_allowed(count: int, workers: int, items_ahead: int, stop_after: int | None) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def load(item: int) -> int:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep((item * 7 % 3) * 1e-4)
        return item

    got: list[int] = []
    with Ahead(workers, items_ahead=items_ahead) as ahead:
        queue = ahead.queue(load)
        queue.put(range(count))
        for position in range(count):
            if position == stop_after:
                break
            got.append(queue.get())
            with lock:
                now[0] -= 1
        else:
            with pytest.raises(IndexError):
                queue.get()
    assert got == list(range(count))[:stop_after]
    assert most[0] <= items_ahead
    assert own_threads() == []


def test_it_works_ahead_of_its_consumer() -> None:
    """Four items that wait for each other: only workers side by side get through."""
    together = threading.Barrier(4, timeout=20)
    with Ahead(4) as ahead:
        queue = ahead.queue(lambda _: together.wait())
        queue.put(range(4))
        assert sorted(queue.get() for _ in range(4)) == [0, 1, 2, 3]


def test_no_more_ahead_than_allowed() -> None:
    started: list[int] = []
    with Ahead(1, items_ahead=3) as ahead:
        queue = ahead.queue(lambda item: item, lambda item, wait: started.append(item) or True)  # type: ignore[func-returns-value]
        queue.put(range(20))
        for position in range(5):
            assert queue.get() == position
            assert len(queue) == 19 - position
            assert len(started) <= position + 4


def test_what_is_asked_for_later_begins_at_once() -> None:
    go = threading.Event()
    with Ahead(2) as ahead:
        queue = ahead.queue(lambda item: go.set() or item)
        assert not queue.ready()  # nothing is to come
        queue.put([1])
        assert go.wait(20)  # though nobody has asked for its result
        while not queue.ready():
            time.sleep(0.001)
        queue.put([2, 3])
        assert [queue.get() for _ in range(3)] == [1, 2, 3]


class AtOnce:
    """Loads an item in so many seconds; remembers which began, in order, and how many were at it at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.begun, self.most = seconds, list[int](), 0
        self._now, self._lock = 0, threading.Lock()

    def __call__(self, item: int) -> int:
        with self._lock:
            self.begun.append(item)
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self.seconds)
        with self._lock:
            self._now -= 1
        return item


class Portions(Ahead):
    """Remembers how many items it handed to a thread at once."""

    def __init__(self, workers: int, *, items_ahead: int) -> None:
        super().__init__(workers, items_ahead=items_ahead)
        self.portions: list[int] = []

    def submit(self, load: Callable[[Any], Any], item: Any) -> Future[Any]:
        self.portions.append(len(item))
        return super().submit(load, item)


def test_half_of_the_threads_rest_while_the_consumer_has_enough() -> None:
    load = AtOnce(0.002)
    with Ahead(4, items_ahead=100) as ahead:
        queue = ahead.queue(load)
        queue.put(range(8))
        assert [queue.get() for _ in range(8)] == list(range(8))  # it waits: all four
        assert load.most > 2
        ahead.hungry(False)
        load.most = 0
        queue.put(range(20))
        while len([f for f in queue._started if f.done()]) < 20:
            time.sleep(0.001)
        assert load.most <= 2
        assert [queue.get() for _ in range(20)] == list(range(20))


@pytest.mark.parametrize("beside", [0, 1, 3])
def test_as_many_go_on_beside_a_busy_consumer_as_it_allows(beside: int) -> None:
    """With 0 nothing begins until it waits again; then all threads do, and all comes, in order."""
    load = AtOnce(0.005)
    with Ahead(4, items_ahead=200, beside=beside) as ahead:
        queue = ahead.queue(load)
        ahead.hungry(False)
        queue.put(range(100))
        time.sleep(0.05)
        assert load.most == beside
        assert (len(load.begun) > 0) == (beside > 0)
        assert [queue.get() for _ in range(100)] == list(range(100))
        assert load.most > beside


def test_threads_leave_the_cores_to_what_computes_though_the_consumer_waits() -> None:
    load, busy = AtOnce(0.005), [3]
    with Ahead(4, items_ahead=100, beside=0, computing=lambda: busy[0]) as ahead:
        queue = ahead.queue(load)
        queue.put(range(40))
        assert [queue.get() for _ in range(10)] == list(range(10))
        assert load.most == 1
        busy[0] = 9  # more than there are cores: somebody must feed them
        assert queue.get() == 10
        busy[0] = 0
        assert [queue.get() for _ in range(29)] == list(range(11, 40))
        assert load.most > 1


def test_what_was_asked_for_first_begins_first() -> None:
    """However many threads there are: the consumer waits for the oldest, and for nothing else."""
    load = AtOnce(0.003)
    with Ahead(4, items_ahead=100, beside=1) as ahead:
        queue = ahead.queue(load)
        ahead.hungry(False)
        queue.put(range(20))
        while len(load.begun) < 20:
            time.sleep(0.001)
    assert load.begun == list(range(20))


def test_what_takes_little_is_handed_over_a_few_at_a_time() -> None:
    def load(item: int) -> int:
        if item == 150:
            raise KeyError(item)
        return item

    with Portions(2, items_ahead=64) as ahead:
        queue = ahead.queue(load)
        queue.put(range(300))
        assert [queue.get() for _ in range(150)] == list(range(150))
        with pytest.raises(KeyError):
            queue.get()
        assert [queue.get() for _ in range(149)] == list(range(151, 300))
    assert ahead.portions[0] == 1
    assert max(ahead.portions) == 8  # an eighth of what may be ahead: all threads have something to do
    assert len(ahead.portions) < 100


def test_what_takes_long_is_handed_over_one_by_one() -> None:
    with Portions(2, items_ahead=64) as ahead:
        queue = ahead.queue(AtOnce(0.004))
        queue.put(range(20))
        assert [queue.get() for _ in range(20)] == list(range(20))
    assert ahead.portions == [1] * 20


def test_what_waits_beside_a_busy_consumer_ends_with_it() -> None:
    with Ahead(2, beside=0) as ahead:
        queue = ahead.queue(lambda item: item)
        ahead.hungry(False)
        queue.put(range(6))
        queue.drop()
        ahead.hungry(False)
        queue.put(range(6))
    assert own_threads() == []


def test_nothing_begins_without_room_until_it_must() -> None:
    asked: list[bool] = []

    def room(item: int, wait: bool) -> bool:
        asked.append(wait)
        return wait

    with Ahead(2) as ahead:
        queue = ahead.queue(lambda item: item, room)
        queue.put([1, 2])
        assert not queue.ready()
        assert True not in asked
        assert queue.get() == 1
        assert asked.count(True) == 1


def test_errors_come_at_their_place_and_the_rest_follows() -> None:
    def load(item: int) -> int:
        if item == 2:
            raise KeyError(item)
        return item

    got: list[object] = []
    with Ahead(2) as ahead:
        queue = ahead.queue(load)
        queue.put(range(6))
        while len(queue):
            try:
                got.append(queue.get())
            except KeyError as error:
                got.append(type(error))
    assert got == [0, 1, KeyError, 3, 4, 5]


@pytest.mark.parametrize("how", ["leave", "interrupt"])
def test_what_has_not_started_never_does(how: str) -> None:
    started: list[int] = []
    go = threading.Event()

    def load(item: int) -> int:
        started.append(item)
        if item:
            go.wait(20)
        return item

    def interrupted() -> None:
        with Ahead(1, items_ahead=8) as ahead:
            queue = ahead.queue(load)
            queue.put(range(100))
            assert queue.get() == 0
            threading.Timer(0.05, go.set).start()
            if how == "interrupt":
                raise KeyboardInterrupt

    if how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    else:
        interrupted()
    assert own_threads() == []
    assert len(started) <= 2


def test_without_threads_each_item_is_loaded_when_it_is_asked_for() -> None:
    loaded: list[int] = []
    with Here() as here:
        queue = here.queue(lambda item: loaded.append(item) or 10 // item)  # type: ignore[func-returns-value]
        queue.put([2, 0, 5])
        assert loaded == []
        assert queue.get() == 5
        assert loaded == [2]
        with pytest.raises(ZeroDivisionError):
            queue.get()
        assert queue.get() == 2
    assert own_threads() == []


def test_what_is_dropped_is_forgotten() -> None:
    go, started = threading.Event(), []

    def load(item: int) -> int:
        started.append(item)
        go.wait(20)
        return item

    with Ahead(1, items_ahead=3) as ahead:
        queue = ahead.queue(load)
        queue.put(range(10))
        assert queue.unstarted() == 7
        ahead.hungry(False)
        threading.Timer(0.02, go.set).start()
        queue.drop()
        assert len(queue) == 0
        queue.put([77])
        assert queue.get() == 77
    assert len(started) <= 2


@pytest.mark.parametrize("wrong", [(0, 1), (1, 0)])
def test_wrong_bounds(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="workers"):
        Ahead(wrong[0], items_ahead=wrong[1])


def test_its_threads_compute_alone_and_the_consumer_as_before() -> None:
    """A team of OpenMP threads beside the consumer's would slow each of its operations down."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Ahead(2) as ahead:

            def threads(item: int) -> int:
                torch.randn(100_000).exp()  # the first operation of a thread sets its number anew
                return torch.get_num_threads()

            queue = ahead.queue(threads)
            queue.put(range(8))
            assert [queue.get() for _ in range(8)] == [1] * 8
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("allowed", [0, 2])
def test_a_system_that_allows_no_more_threads(monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    """Those that could be started do it; where there is none it is an error, and nobody waits for ever."""
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith("mmpipe-ahead") and len(own_threads()) >= allowed:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with Ahead(4, items_ahead=2) as ahead:
        queue = ahead.queue(lambda item: item)
        if allowed:
            queue.put(range(9))
            assert [queue.get() for _ in range(9)] == list(range(9))
        else:
            with pytest.raises(MmpipeError, match="can't start new thread"):
                ahead.submit(str, 1)
    assert own_threads() == []
