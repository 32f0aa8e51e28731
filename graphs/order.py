"""Happens-before: which step has surely ended when another begins, on every legal interleaving.

A step comes after those before it on its stream, after those that it waits for, and after what they come after. Sets of
steps are integers used as bit sets, so that plans of hundreds of steps are checked in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmpipe.graphs.plan import PlanError, Step


def before(steps: Sequence[Step]) -> list[int]:
    """For each step, the set of steps (bit i: step i) that happen before it. Raises PlanError for a cycle.

    Streams keep the order of submission. A wait for a step that is submitted later is allowed here: whether the host
    could submit the plan is another question (`check` asks it).
    """
    place = {step.name: index for index, step in enumerate(steps)}
    edges: list[list[int]] = []
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        comes_after = [place[name] for name in step.waits if name in place]
        if step.stream in last:
            comes_after.append(last[step.stream])
        last[step.stream] = index
        edges.append(comes_after)
    known: list[int | None] = [None] * len(steps)
    for start in range(len(steps)):
        _visit(start, edges, known, steps)
    return [value or 0 for value in known]


def _visit(start: int, edges: Sequence[Sequence[int]], known: list[int | None], steps: Sequence[Step]) -> None:
    """Depth first without recursion; `open_` holds the path, so that meeting it again is a cycle."""
    stack, open_ = [start], set[int]()
    while stack:
        current = stack[-1]
        if known[current] is not None:
            stack.pop()
            continue
        open_.add(current)
        missing = [index for index in edges[current] if known[index] is None]
        if missing:
            circular = next((index for index in missing if index in open_), None)
            if circular is not None:
                raise PlanError(f"{steps[current].name} and {steps[circular].name} wait for each other: a cycle")
            stack.extend(missing)
            continue
        bits = 0
        for index in edges[current]:
            bits |= (known[index] or 0) | 1 << index
        known[current] = bits
        open_.discard(current)
        stack.pop()


def accesses(steps: Sequence[Step]) -> dict[str, tuple[int, int]]:
    """Buffer → (steps that read or write it, steps that write it), as sets."""
    found: dict[str, tuple[int, int]] = {}
    for index, step in enumerate(steps):
        for name in {*step.reads, *step.writes}:
            uses, writes = found.get(name, (0, 0))
            found[name] = uses | 1 << index, writes | (1 << index if name in step.writes else 0)
    return found


def members(bits: int) -> list[int]:
    """The steps of a set, in order."""
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return found
