"""The bound on what is decoded at once: kept, fair, and no thread waits for ever."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpipe.media import Room


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

    running = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for one in running:
        one.start()
    for one in running:
        one.join(30)
        assert not one.is_alive()
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


def test_a_share_waits_once_and_is_given_back_whatever_happens() -> None:
    room = Room(10)
    with contextlib.suppress(KeyError), room.share() as share:
        share.take(8)
        share.take(50)  # holds some already: it must not wait for itself
        assert room.used_bytes == 58
        raise KeyError
    with room.share():
        assert room.used_bytes == 0
    with pytest.raises(ValueError, match="limit_bytes"):
        Room(0)
