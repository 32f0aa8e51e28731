"""Order, the bound on memory, errors in their place, and no thread left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpipe.media import Ahead


def own_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("mmpipe-ahead")]


class Meter:
    """What is started and not yet consumed, and the most it ever was."""

    def __init__(self) -> None:
        self.lock, self.now, self.items, self.over, self.most_items = threading.Lock(), 0, 0, False, 0

    def add(self, cost: int, limit: int) -> None:
        with self.lock:
            self.over |= self.now > 0 and self.now + cost > limit
            self.now += cost
            self.items += 1
            self.most_items = max(self.most_items, self.items)

    def consumed(self, cost: int) -> None:
        with self.lock:
            self.now -= cost
            self.items -= 1


@settings(max_examples=80, deadline=None)
@given(
    costs=st.lists(st.integers(0, 12), max_size=30),
    limit=st.integers(1, 20),
    workers=st.integers(1, 4),
    items_ahead=st.integers(1, 6),
    stop_after=st.none() | st.integers(0, 10),
)
def test_in_order_within_the_bound(
    costs: list[int], limit: int, workers: int, items_ahead: int, stop_after: int | None
) -> None:
    meter = Meter()

    def load(item: tuple[int, int]) -> int:
        meter.add(item[1], limit)
        time.sleep((item[0] * 7 % 3) * 1e-4)
        return item[0]

    got: list[int] = []
    with Ahead(workers, limit, items_ahead=items_ahead) as ahead:
        results = ahead.map(load, enumerate(costs), lambda item: item[1])
        for position in range(len(costs)):
            if position == stop_after:
                break
            got.append(next(results))
            meter.consumed(costs[position])
        else:
            with pytest.raises(StopIteration):
                next(results)
            assert own_threads() == []
    assert got == list(range(len(costs)))[:stop_after]
    assert not meter.over
    assert meter.most_items <= items_ahead
    assert own_threads() == []


def test_it_works_ahead_of_its_consumer() -> None:
    """Four items that wait for each other: only workers side by side get through."""
    together = threading.Barrier(4, timeout=20)
    with Ahead(4, 100) as ahead:
        assert sorted(ahead.map(lambda _: together.wait(), range(4), lambda _: 1)) == [0, 1, 2, 3]


def test_no_more_ahead_than_allowed() -> None:
    taken: list[int] = []
    with Ahead(1, 100, items_ahead=3) as ahead:
        results = ahead.map(lambda item: item, (taken.append(i) or i for i in range(20)), lambda _: 1)  # type: ignore[func-returns-value]
        for position in range(5):
            assert next(results) == position
            assert len(taken) == position + 3


def test_an_item_above_the_bound_goes_alone() -> None:
    running: set[int] = set()
    seen: list[set[int]] = []

    def load(cost: int) -> int:
        running.add(cost)
        time.sleep(0.005)
        seen.append(set(running))
        running.discard(cost)
        return cost

    with Ahead(3, 10) as ahead:
        assert list(ahead.map(load, [4, 50, 5], lambda cost: cost)) == [4, 50, 5]
    assert {50} in seen
    assert all(together == {50} for together in seen if 50 in together)


def test_errors_come_at_their_place_and_the_rest_follows() -> None:
    def load(item: int) -> int:
        if item == 2:
            raise KeyError(item)
        return item

    def cost(item: int) -> int:
        if item == 4:
            raise OSError("no header")
        return 1

    got: list[object] = []
    with Ahead(2, 100) as ahead:
        results = ahead.map(load, range(6), cost)
        while True:
            try:
                got.append(next(results))
            except StopIteration:
                break
            except (KeyError, OSError) as error:
                got.append(type(error))
    assert got == [0, 1, KeyError, 3, OSError, 5]


def test_an_iterable_that_fails_does_so_after_what_it_gave() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise RuntimeError("listing broke")

    got: list[int] = []
    with Ahead(2, 100) as ahead, pytest.raises(RuntimeError, match="listing broke"):
        got.extend(ahead.map(lambda item: item, items(), lambda _: 1))
    assert got == [1, 2]
    assert own_threads() == []


@pytest.mark.parametrize("how", ["close", "leave", "interrupt", "drop"])
def test_what_has_not_started_never_does(how: str) -> None:
    started: list[int] = []
    go = threading.Event()

    def load(item: int) -> int:
        started.append(item)
        if item:
            go.wait(20)
        return item

    def interrupted() -> None:
        with Ahead(1, 100, items_ahead=8) as ahead:
            results = ahead.map(load, range(100), lambda _: 1)
            assert next(results) == 0
            threading.Timer(0.05, go.set).start()
            if how == "close":
                results.close()
                assert own_threads() == []
                assert list(results) == []
            if how == "interrupt":
                raise KeyboardInterrupt

    if how == "drop":
        ahead = Ahead(1, 100, items_ahead=8)
        assert next(ahead.map(load, range(100), lambda _: 1)) == 0
        go.set()
        until = time.monotonic() + 20
        while own_threads() and time.monotonic() < until:
            time.sleep(0.005)
    elif how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    else:
        interrupted()
    assert own_threads() == []
    assert len(started) <= 2


@pytest.mark.parametrize("wrong", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_wrong_bounds(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="workers"):
        Ahead(wrong[0], wrong[1], items_ahead=wrong[2])
