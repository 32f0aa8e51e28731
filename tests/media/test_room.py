"""The bound on what is decoded at once: kept, fair, and no thread waits for ever."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpipe.media import Room


def side_by_side(work: Callable[[], None], threads: int) -> None:
    """On so many threads, all of which come to their end."""
    running = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for one in running:
        one.start()
    for one in running:
        one.join(30)
        assert not one.is_alive()


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.integers(0, 12), min_size=1, max_size=40), limit=st.integers(1, 20), threads=st.integers(1, 6))
def test_together_they_stay_within_the_bound(costs: list[int], limit: int, threads: int) -> None:
    room, lock, left = Room(limit), threading.Lock(), list(enumerate(costs))
    holding: dict[int, int] = {}
    over: list[dict[int, int]] = []

    def work() -> None:
        while True:
            with lock:
                if not left:
                    return
                number, cost = left.pop()
            with room.share() as share:
                share.take(cost)
                with lock:
                    holding[number] = cost
                    if sum(holding.values()) > limit and sum(map(bool, holding.values())) > 1:
                        over.append(dict(holding))
                time.sleep(1e-4)
                with lock:
                    del holding[number]

    side_by_side(work, threads)
    assert not over
    assert room.used_bytes == 0


def test_who_needs_much_is_not_passed_for_ever() -> None:
    room, order = Room(10), []

    def take(count: int) -> None:
        with room.share() as share:
            share.take(count)
            order.append(count)

    with room.share() as share:
        share.take(6)
        running = []
        for count in (9, 1, 2):  # 1 and 2 would fit beside the 6, but have come after the 9
            running.append(threading.Thread(target=take, args=(count,), daemon=True))
            running[-1].start()
            while len(room._waiting) < len(running):
                time.sleep(0.001)
        assert order == []
    for one in running:
        one.join(30)
    assert order[0] == 9
    assert sorted(order) == [1, 2, 9]


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 20)), min_size=1, max_size=30),
    limit=st.integers(1, 20),
    threads=st.integers(1, 6),
)
def test_who_needs_more_waits_for_it_too(costs: list[tuple[int, int]], limit: int, threads: int) -> None:
    """Over the bound goes one at most, and what others hold meanwhile is what they took to begin with."""
    room, lock, left = Room(limit), threading.Lock(), list(enumerate(costs))
    begun: dict[int, int] = {}
    grown: dict[int, int] = {}
    over: list[tuple[dict[int, int], dict[int, int]]] = []

    def work() -> None:
        while True:
            with lock:
                if not left:
                    return
                number, (first, more) = left.pop()
            with room.share() as share:
                share.take(first)
                with lock:
                    begun[number] = first
                share.take(more)
                with lock:
                    grown[number] = more
                    if sum(begun.values()) + sum(grown.values()) > limit and len(grown) > 1:
                        over.append((dict(begun), dict(grown)))
                time.sleep(1e-4)
                with lock:
                    del begun[number], grown[number]

    side_by_side(work, threads)
    assert not over
    assert (room.used_bytes, room._holders) == (0, 0)


def test_large_ones_go_one_after_the_other() -> None:
    """Each opened first, for little, and then decoded, for much."""
    room, most = Room(100), [0]

    def decode() -> None:
        with room.share() as share:
            share.take(4)
            share.take(40)
            most[0] = max(most[0], room.used_bytes)
            time.sleep(0.01)

    side_by_side(decode, 8)
    assert most[0] <= 100


def test_a_share_does_not_wait_for_itself_and_is_given_back_whatever_happens() -> None:
    room = Room(10)
    with contextlib.suppress(KeyError), room.share() as share:
        share.take(8)
        share.take(50)
        assert room.used_bytes == 58
        raise KeyError
    with room.share():
        assert room.used_bytes == 0
    with pytest.raises(ValueError, match="limit_bytes"):
        Room(0)
