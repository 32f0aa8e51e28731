"""Packed rows: the same rows again, in a fraction of the memory."""

import pickle
import random
import tracemalloc
from datetime import date
from decimal import Decimal

import pytest

from mmpipe.media.rows import Rows

ODD = [
    ("4711", ("photos/4711.jpg", None, "4711/4711.wav"), ()),
    ("7", ("no such", "the 7 dwarfs of 7", None), ()),
    ("a/b", (None, None, None), ()),
    ("é", ("e\N{COMBINING ACUTE ACCENT}.jpg", "é.txt", None), ()),
    ("\\xff", ("\udcff.jpg", None, None), ()),  # a file's name that is no UTF-8
    (".jpg", (".jpg.jpg", None, ""), ()),
    ("kept", ("kept.jpg", "a\0b\n", None), (None, 1.5, "", date(2026, 1, 2), Decimal("1.10"), {"a": [1, None]}, b"\0")),
]


def test_rows_come_back_as_they_were():
    rows = Rows(ODD)
    assert list(rows) == ODD
    assert len(rows) == len(ODD)
    assert rows[-1] == ODD[-1]
    assert list(rows[1:5][1:-1]) == ODD[2:4]
    assert list(rows[::-2]) == ODD[::-2]
    with pytest.raises(IndexError):
        rows[len(ODD)]
    with pytest.raises(IndexError):
        rows[1:3][2]


def test_a_slice_that_is_sent_elsewhere_has_its_own_rows_alone():
    rows = Rows((f"{number}" * 20, (f"{number}.jpg",), ()) for number in range(5000))
    sent = pickle.dumps(rows[7:9])
    assert list(pickle.loads(sent)) == list(rows[7:9])
    assert len(sent) < 1000


def test_rows_are_counted_by_what_they_have():
    rows = Rows(ODD)
    assert rows.present() == {
        (True, True, False): 3,
        (False, False, False): 1,
        (True, False, False): 1,
        (True, False, True): 2,
    }
    assert rows[2:3].present() == {(False, False, False): 1}


def test_texts_that_hold_their_ids_by_chance_do_not_fill_the_table_of_shapes():
    draw = random.Random(1)
    given = [
        (str(number), (None if draw.random() < 0.3 else f"{draw.random()} of {number} and {draw.random()}",), ())
        for number in range(3000)
    ]
    rows = Rows(given)
    assert list(rows) == given
    assert len(rows._known) < 300


def test_a_row_takes_a_fraction_of_what_its_objects_would():
    def row(number):
        name = f"folder/item-{number:06d}"
        return name, (f"{name}.jpg", f"{name}.txt", f"{name}.flac"), ()

    def bytes_of(make):
        tracemalloc.start()
        kept = make()
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return taken, kept

    packed, rows = bytes_of(lambda: Rows(row(number) for number in range(20_000)))
    plain, objects = bytes_of(lambda: [row(number) for number in range(20_000)])
    assert list(rows) == objects
    assert packed < 80 * 20_000
    assert plain > 5 * packed
