"""What a run adds up to, from traces written by hand."""

from __future__ import annotations

import torch

from mmpipe.jobs import tally
from mmpipe.jobs.tally import Shown, Step, Tally, story_of
from mmpipe.runtime.ledger import Look, Outcome
from mmpipe.types import Prediction, Sample

MODALITIES = ("image", "text")
EXITS = ("image", "all")


def added(predictions, looks=(), seconds=None, made=None):
    made = made or Tally(("mug", "lamp"), EXITS, MODALITIES)
    count = len(predictions)
    opened = torch.tensor([[name in p.used + p.failed for name in MODALITIES] for p in predictions]).reshape(count, 2)
    outcome = Outcome(opened, opened, opened, torch.zeros(count), torch.zeros(count), looks=list(looks))
    outcome.seconds = seconds or {}
    outcome.files_opened = dict(zip(MODALITIES, opened.sum(0).tolist(), strict=True))
    made.add([Sample(p.id, {}) for p in predictions], predictions, outcome)
    return made


def answer(name, exit_name, confidence, label="mug", **rest):
    used = MODALITIES if exit_name == "all" else ("image",)
    skipped = () if exit_name == "all" else ("text",)
    return Prediction(
        name,
        rest.pop("status", "ok"),
        label=label,
        confidence=confidence,
        answered_by=exit_name,
        present=MODALITIES,
        used=rest.pop("used", used),
        skipped=rest.pop("skipped", skipped),
        **rest,
    )


def test_counts():
    rows = [
        answer("a", "image", 0.97),
        answer("b", "all", 0.5, label="lamp"),
        answer("c", "all", 1.0, status="partial", used=("text",), failed=("image",), error="image:empty: c.jpg: 0"),
        Prediction(
            "d",
            "failed",
            error="image:empty: d.jpg: 0; bytes.jpg; text:not_text: d.txt",
            present=MODALITIES,
            failed=MODALITIES,
        ),
    ]
    made = added(rows, seconds={"image@0": 1.0})
    added([Prediction("e", "failed", error="sample:no_media: has none of image, text")], [], {"image@0": 2.0}, made)
    assert made.rows == 5
    assert made.status == {"ok": 2, "partial": 1, "failed": 2}
    assert made.answered_by == {"image": 1, "all": 2}
    assert made.files_opened == {"image": 4, "text": 3}
    assert made.present == {"image": 4, "text": 4}
    assert made.by_label == {"mug": {"image": 1, "all": 1}, "lamp": {"all": 1}}
    assert [index for index, n in enumerate(made.confidence["all"]) if n] == [10, 19]
    assert made.errors == {"image:empty": 2, "text:not_text": 1, "sample:no_media": 1}
    assert [row.id for row in made.failures] == ["c", "d", "e"]
    assert made.seconds == {"image@0": 3.0}


def test_memory_does_not_grow_with_the_input():
    made = Tally(("mug", "lamp"), EXITS, MODALITIES)
    for start in range(0, 3000, 500):
        rows = [
            answer(f"{n}", "all", n / 3000)
            if n % 2
            else Prediction(
                f"{n}", "failed", error=f"text:not_found: {n}; {n}.txt: no such file; {n}:x", failed=("text",)
            )
            for n in range(start, start + 500)
        ]
        added(rows, made=made)
    assert len(made.failures) == tally.FAILURES
    assert len(made.drawn) == len(made.unsure) == tally.SHOWN
    assert made.errors == {"text:not_found": 1500}
    assert [shown.prediction.id for shown in made.unsure] == [str(n) for n in range(1, 25, 2)]
    drawn = [int(shown.prediction.id) for shown in made.drawn]
    assert drawn == sorted(drawn)
    assert max(drawn) > 1500  # from the whole of the run, not its beginning


def test_the_trace_of_a_sample_says_what_each_exit_saw():
    rows = [answer("a", "all", 0.9, label="lamp"), answer("b", "image", 0.95)]
    made = added(rows, [Look(0, [0, 1], [0, 0], [0.6, 0.95]), Look(1, [0], [1], [0.9])])
    steps = {shown.sample.id: shown.steps for shown in made.drawn}
    assert steps["a"] == (Step("image", "mug", 0.6, ("image",)), Step("all", "lamp", 0.9, MODALITIES))
    assert steps["b"] == (Step("image", "mug", 0.95, ("image",)),)
    assert made.stories["first"].shown.sample.id == "b"


def story(exit_name, *seen, exits=("image", "image+text", "all"), opened=None, **rest):
    opened = opened or [("image", "text", "audio")[: place + 1] for place in range(len(exits))]
    steps = tuple(Step(name, label, p, used) for name, (label, p), used in zip(exits, seen, opened, strict=False))
    label, confidence = seen[-1]
    rest.setdefault("skipped", ("audio",) if exit_name != "all" else ())
    return story_of(Shown(Sample("a", {}), answer("a", exit_name, confidence, label, **rest), steps), exits)


def test_which_story_a_trace_tells():
    assert story("image", ("mug", 0.99)).kind == "first"
    assert story("image+text", ("mug", 0.5), ("lamp", 0.97)).kind == "decided"
    assert story("all", ("mug", 0.8), ("lamp", 0.8), ("lamp", 0.97)).kind == "settled"
    assert story("all", ("mug", 0.5), ("mug", 0.6), ("mug", 0.97)) is None  # nobody disagreed
    assert story("image", ("mug", 0.99), skipped=()) is None  # there was nothing to skip
    assert story("image", ("mug", 0.99), status="partial") is None
    assert story("all", ("mug", 0.99), exits=("all",)) is None  # no exits, no story


def test_what_saw_nothing_more_settles_nothing():
    disagreed = (("mug", 0.8), ("lamp", 0.8), ("lamp", 0.97))
    no_sound = [("image",), ("image", "text"), ("image", "text")]
    assert story("all", *disagreed, opened=no_sound) is None
    deep = ("image", "image+text", "head.layer1", "all")
    whole = [("image",), ("image", "text"), ("image", "text", "audio"), ("image", "text", "audio")]
    assert story("all", *disagreed, ("lamp", 0.98), exits=deep, opened=whole).kind == "settled"


def test_a_label_that_changed_makes_the_better_story():
    changed = story("image+text", ("mug", 0.90), ("lamp", 0.96))
    same = story("image+text", ("mug", 0.30), ("mug", 0.99))
    assert changed.score > same.score
    surer = story("image", ("mug", 0.99))
    assert surer.score > story("image", ("mug", 0.96)).score
