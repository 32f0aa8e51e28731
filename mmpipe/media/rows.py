"""The rows of a listing, packed: names of files take tens of bytes where Python's objects would take hundreds.

They also lie apart from all that a forked process counts references in, so that it shares their pages instead of
copying them.
"""

from __future__ import annotations

import pickle
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, overload

Row = tuple[str, tuple[str | None, ...], tuple[Any, ...]]  # id, one value for each modality, one for each kept column
# A value beside its row's id: absent, what stands before and after the id in it, or itself, where it has no id in it.
Place = tuple[str, str] | str | None

_GIVEN = ""  # in a shape, the place of a value that is kept with its own row
_MOST_SHAPES = 256  # files have few; texts that chance upon their ids would have one each


class Rows(Sequence[Row]):
    """Rows that are only ever added to; each is made when it is asked for. A slice shares them."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._shapes: dict[tuple[Place, ...], int] = {}
        self._known: list[tuple[Place, ...]] = []  # by number
        self._shape_of, self._ends = array("H"), array("Q")
        self._own = bytearray()  # what is not in a row's shape: its id, the values given with it, what is kept
        self._range: range | None = None  # of a slice
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        row_id, values, kept = row
        places = tuple(place(value, row_id) for value in values)
        shape = tuple(_GIVEN if isinstance(one, str) else one for one in places)
        if shape not in self._shapes and len(self._shapes) >= _MOST_SHAPES:
            shape = tuple(None if value is None else _GIVEN for value in values)
        number = self._shapes.setdefault(shape, len(self._known))
        if number == len(self._known):
            self._known.append(shape)
        given = [value for value, where in zip(values, shape, strict=True) if where == _GIVEN]
        self._own += pickle.dumps((row_id, *given, *kept), pickle.HIGHEST_PROTOCOL)
        self._shape_of.append(number)
        self._ends.append(len(self._own))

    def __len__(self) -> int:
        return len(self._ends) if self._range is None else len(self._range)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        numbers = range(len(self._ends)) if self._range is None else self._range
        if isinstance(index, slice):
            part = Rows.__new__(Rows)
            part.__dict__.update(self.__dict__, _range=numbers[index])
            return part
        number = numbers[index]
        start = self._ends[number - 1] if number else 0
        row_id, *own = pickle.loads(memoryview(self._own)[start : self._ends[number]])
        shape, next_own = self._known[self._shape_of[number]], iter(own)
        values = tuple(next(next_own) if where == _GIVEN else whole(where, row_id) for where in shape)
        return row_id, values, tuple(next_own)

    def __reduce__(self) -> tuple[Any, ...]:
        """What is sent elsewhere of a slice are its own rows."""
        return Rows, (list(self),)

    def present(self) -> Counter[tuple[bool, ...]]:
        """How many rows have each set of values."""
        numbers = self._shape_of if self._range is None else [self._shape_of[number] for number in self._range]
        found: Counter[tuple[bool, ...]] = Counter()
        for number, count in Counter(numbers).items():
            found[tuple(where is not None for where in self._known[number])] += count
        return found


def place(value: str | None, row_id: str) -> Place:
    """Where a value is, as seen from its row's id: ("photos/", ".jpg") of "photos/4711.jpg" and "4711"."""
    if value is None:
        return None
    before, found, after = value.rpartition(row_id)
    return (before, after) if found else value


def whole(where: Place, row_id: str) -> str | None:
    """The value again."""
    return f"{where[0]}{row_id}{where[1]}" if isinstance(where, tuple) else where
