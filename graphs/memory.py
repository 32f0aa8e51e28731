"""Scratch offsets from lifetimes under happens-before.

Two buffers may share bytes only where every use of one happens before the first write of the other on every legal
interleaving, not in one linear order: streams run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mmpipe.graphs.order import accesses, before, members
from mmpipe.graphs.plan import Buffer, Step

ALIGNMENT = 64  # bytes: a cache line, and what vector loads want
_EXACT = 4_000  # branches looked at for the lower bound; beyond them the best clique seen stands, a bound all the same


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def conflicts(steps: Sequence[Step], buffers: Sequence[Buffer]) -> dict[str, set[str]]:
    """Scratch buffer → those it may not share a byte with."""
    earlier = before(steps)
    used = accesses(steps)
    scratch = [buffer.name for buffer in buffers if buffer.home == "scratch"]
    found: dict[str, set[str]] = {name: set() for name in scratch}

    surely: dict[str, int] = {}  # buffer → the steps that happen before each of its writes
    for name in scratch:
        surely[name] = -1
        for write in members(used.get(name, (0, 0))[1]):
            surely[name] &= earlier[write]

    def ends_before(one: str, other: str) -> bool:
        return used.get(one, (0, 0))[0] & ~surely[other] == 0

    for position, one in enumerate(scratch):
        for other in scratch[position + 1 :]:
            if not ends_before(one, other) and not ends_before(other, one):
                found[one].add(other)
                found[other].add(one)
    return found


def assign(steps: Sequence[Step], buffers: Sequence[Buffer]) -> tuple[tuple[Buffer, ...], int]:
    """Give every scratch buffer its offset → (buffers, bytes of scratch). The best of several greedy orders."""
    apart = conflicts(steps, buffers)
    scratch = [buffer for buffer in buffers if buffer.home == "scratch"]
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name in (*step.reads, *step.writes):
            first.setdefault(name, index)
            last[name] = index
    orders: list[Callable[[Buffer], tuple[int, ...]]] = [
        lambda b: (-b.bytes, first.get(b.name, 0)),
        lambda b: (-b.bytes * (1 + last.get(b.name, 0) - first.get(b.name, 0)),),
        lambda b: (-len(apart[b.name]), -b.bytes),
        lambda b: (last.get(b.name, 0), -b.bytes),
        lambda b: (-sum(aligned(o.bytes) for o in scratch if o.name in apart[b.name]) - b.bytes,),
    ]
    best: tuple[int, dict[str, int]] | None = None
    for order in orders:
        offsets = _first_fit(sorted(scratch, key=order), apart)
        size = max((offsets[b.name] + aligned(b.bytes) for b in scratch), default=0)
        if best is None or size < best[0]:
            best = size, offsets
    assert best is not None
    placed = tuple(replace(b, offset=best[1][b.name]) if b.home == "scratch" else b for b in buffers)
    return placed, best[0]


def _first_fit(order: Sequence[Buffer], apart: Mapping[str, set[str]]) -> dict[str, int]:
    """Each buffer at the lowest offset where it meets none that it must stay apart from."""
    placed: dict[str, tuple[int, int]] = {}
    for buffer in order:
        offset = 0
        for start, end in sorted(placed[name] for name in apart[buffer.name] if name in placed):
            if start - offset >= aligned(buffer.bytes):
                break
            offset = max(offset, end)
        placed[buffer.name] = offset, offset + aligned(buffer.bytes)
    return {name: start for name, (start, _) in placed.items()}


def lower_bound(steps: Sequence[Step], buffers: Sequence[Buffer]) -> int:
    """Bytes of the heaviest set of scratch buffers that may all be live at once: no plan can need less."""
    apart = conflicts(steps, buffers)
    size = {buffer.name: aligned(buffer.bytes) for buffer in buffers if buffer.home == "scratch"}
    best, looked = 0, 0

    def grow(candidates: list[str], total: int) -> None:
        nonlocal best, looked
        best, looked = max(best, total), looked + 1
        for position, name in enumerate(candidates):
            rest = candidates[position:]
            if looked > _EXACT or total + sum(size[other] for other in rest) <= best:
                return
            grow([other for other in rest[1:] if other in apart[name]], total + size[name])

    grow(sorted(size, key=lambda name: -size[name]), 0)
    return best
