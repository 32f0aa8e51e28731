"""A job's shards in parts: each row is computed once, whoever does it, and shards are whole and in order."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpipe import Prediction, Sample
from mmpipe.errors import MediaError
from mmpipe.parts import Part, Parts
from mmpipe.runtime.ledger import Decoding, Look, Outcome, Span, joined


def shards_of(*sizes):
    return [[Sample(f"{shard}-{row}", {}) for row in range(size)] for shard, size in enumerate(sizes)]


def outcome_of(samples):
    count = len(samples)
    return Outcome(
        present_NM=torch.ones(count, 1, dtype=torch.bool),
        opened_NM=torch.ones(count, 1, dtype=torch.bool),
        embedded_NM=torch.zeros(count, 1, dtype=torch.bool),
        exit_N=torch.zeros(count, dtype=torch.int64),
        confidence_N=torch.ones(count),
    )


def put(parts, part):
    samples = parts.samples(part)
    parts.put(part, [Prediction(sample.id, "ok") for sample in samples], outcome_of(samples))


def told(parts):
    return [[p.id for p in predictions] for _, predictions, _ in parts.whole()]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(2, 9), st.randoms(use_true_random=False))
def test_every_row_is_computed_once_and_told_of_in_order(sizes, workers, chance):
    shards = shards_of(*sizes)
    parts = Parts(shards, workers, bucket=8, least=16)
    taken, seen = [], []
    while parts.wait(0.0):
        part = parts.take()
        if part is not None:
            taken.append(part)
        if taken and (part is None or chance.random() < 0.5):
            put(parts, taken.pop(chance.randrange(len(taken))))
            seen += told(parts)
    assert seen == [[sample.id for sample in shard] for shard in shards]


def test_large_parts_come_first_and_are_whole_buckets():
    parts = Parts(shards_of(*[1024] * 5), 2, bucket=32, least=128)
    taken = []
    while (part := parts.take()) is not None:
        taken.append(part)
    rows = [part.stop - part.start for part in taken]
    assert sum(rows) == 5 * 1024
    assert rows[:2] == [1024, 1024]
    assert max(rows[-3:]) <= 256
    assert all(part.start % 32 == 0 for part in taken)
    assert min(rows) >= 128


def test_parts_of_a_lost_worker_are_computed_by_another():
    parts = Parts(shards_of(64, 64), 2, bucket=8, least=32)
    lost = [parts.take(), parts.take()]
    while (part := parts.take()) is not None:
        put(parts, part)
    assert told(parts) == []
    parts.give_back(lost)
    assert parts.any_lost()
    while (part := parts.take_lost()) is not None:
        put(parts, part)
    assert [len(rows) for rows in told(parts)] == [64, 64]
    assert not parts.wait(0.0)


def test_what_ends_a_part_is_raised_when_the_shards_before_it_have_been_told_of():
    parts = Parts(shards_of(16, 16, 16), 2, bucket=16, least=16)
    first, second, third = parts.take(), parts.take(), parts.take()
    put(parts, third)
    parts.fail([second], ValueError("of the second"))
    assert told(parts) == []
    put(parts, first)
    whole = parts.whole()
    assert len(next(whole)[1]) == 16
    with pytest.raises(ValueError, match="of the second"):
        next(whole)


def test_what_was_begun_after_a_part_that_failed_is_done_by_another_and_nothing_new_is_begun():
    parts = Parts(shards_of(16, 16, 16, 16), 2, bucket=16, least=16)
    first, second, third = parts.take(), parts.take(), parts.take()
    parts.fail([second, first], ValueError("of the second"))
    assert parts.take() is None
    assert parts.take_lost() == first
    put(parts, first)
    assert len(next(parts.whole())[1]) == 16
    put(parts, third)
    with pytest.raises(ValueError, match="of the second"):
        list(parts.whole())


def test_who_is_far_ahead_waits_unless_the_oldest_is_its_own():
    parts = Parts(shards_of(*[8] * 40), 2, bucket=8, least=8)
    oldest = parts.take()
    mine: list[Part] = []
    for _ in range(20):
        mine.append(parts.take())
        put(parts, mine[-1])
    parts.wait_for_room([oldest])  # it has the oldest itself: waiting would be for ever
    waiting = threading.Thread(target=parts.wait_for_room, args=(mine,), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    put(parts, oldest)
    assert len(told(parts)) == 21
    waiting.join(5)
    assert not waiting.is_alive()


def test_rows_answered_elsewhere_are_counted_once():
    parts = Parts(shards_of(8), 2, bucket=8, least=8)
    parts.answered(3)
    parts.answered(2)
    assert (parts.newly_answered(), parts.newly_answered()) == (5, 0)


def whole_outcome(count, seed):
    make = torch.Generator().manual_seed(seed)
    rows = list(range(count))
    return Outcome(
        present_NM=torch.rand(count, 2, generator=make) > 0.2,
        opened_NM=torch.rand(count, 2, generator=make) > 0.2,
        embedded_NM=torch.rand(count, 2, generator=make) > 0.2,
        exit_N=torch.randint(-1, 2, (count,), generator=make),
        confidence_N=torch.rand(count, generator=make),
        probabilities_NL=torch.rand(count, 3, generator=make),
        embeddings={"image": torch.rand(count, 4, generator=make)},
        failures={row: {"text": MediaError("text", "empty", str(row))} for row in rows[::3]},
        looks=[Look(0, rows[::2], [0] * len(rows[::2]), [0.5] * len(rows[::2]))],
        seconds={"image@0": 1.0},
        files_opened={"image": count},
        recalled={"image": 1},
        missed={"text": 2},
        notes=["a note"],
        spans=[Span("image@0", "caller", 0, 0, count, 0.0, 1.0)],
        decodings=[Decoding("image", "one", 0.0, 1.0)],
    )


def cut(outcome, start, stop):
    """Rows of an outcome as a part of its own would have them."""
    tables = ("present_NM", "opened_NM", "embedded_NM", "exit_N", "confidence_N", "probabilities_NL")
    look = outcome.looks[0]
    kept = [place for place, row in enumerate(look.rows) if start <= row < stop]
    return Outcome(
        **{name: getattr(outcome, name)[start:stop] for name in tables},
        embeddings={name: table[start:stop] for name, table in outcome.embeddings.items()},
        failures={row - start: why for row, why in outcome.failures.items() if start <= row < stop},
        looks=[Look(0, *([values[p] for p in kept] for values in ([row - start for row in look.rows], look.labels,
               look.confidences)))] if kept else [],
        seconds={"image@0": 0.5}, files_opened={"image": stop - start},
    )  # fmt: skip


def test_parts_add_up_to_the_whole():
    whole = whole_outcome(20, 0)
    found = joined([cut(whole, 0, 9), cut(whole, 9, 10), cut(whole, 10, 20)])
    for name in ("present_NM", "opened_NM", "embedded_NM", "exit_N", "confidence_N", "probabilities_NL"):
        assert torch.equal(getattr(found, name), getattr(whole, name)), name
    assert torch.equal(found.embeddings["image"], whole.embeddings["image"])
    assert {row: str(why["text"]) for row, why in found.failures.items()} == {
        row: str(why["text"]) for row, why in whole.failures.items()
    }
    assert found.looks == whole.looks
    assert found.seconds == {"image@0": 1.5}
    assert found.files_opened == {"image": 20}
    assert joined([whole]) is whole


def test_a_part_of_which_nothing_was_computed_has_zeros():
    one, other = whole_outcome(3, 1), whole_outcome(2, 2)
    other.probabilities_NL, other.embeddings = None, {}
    found = joined([other, one])
    assert torch.equal(found.probabilities_NL, torch.cat([torch.zeros(2, 3), one.probabilities_NL]))
    assert torch.equal(found.embeddings["image"], torch.cat([torch.zeros(2, 4), one.embeddings["image"]]))
    assert found.seconds == {"image@0": 2.0}
    assert found.recalled == {"image": 2}
    assert len(found.spans) == len(found.notes) == 2
    other.probabilities_NL = one.probabilities_NL = None
    assert joined([other, one]).probabilities_NL is None
