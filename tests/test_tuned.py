"""What `mmpipe autotune` measures and keeps, and what runs make of it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace

import pytest
from support import compilers, shop

from mmpipe import InputError, Pipeline, Sample, autotune, lowering, machine
from mmpipe.explain import collect
from mmpipe.graphs import backends
from mmpipe.graphs.backends import Unlowerable
from mmpipe.resolved import PLAIN, Choice
from mmpipe.tuned import Best, Tuned


def best(backend="inductor", dtype="float32", row=0.001, plain=0.003, ready=2.0):
    return Best(Choice(backend, dtype), row, plain, PLAIN, ready)


def test_a_compiler_is_waited_for_only_where_that_is_won_back():
    assert not best().pays(0)
    assert not best().pays(1999)
    assert best().pays(2000)  # 4 s saved, 2 s waited
    assert best("eager", "bfloat16").pays(0)
    assert "1999 rows would save 4.0 s, and getting ready takes 2.0 s" in best().not_yet(1999)


def test_single_calls_wait_for_a_compiler_once_they_would_have_won_it_back(weights, monkeypatch):
    made = []

    def lowering_of(self, plan, segment, module, choice, *rest):
        made.append(choice)
        return backends.lower("eager", segment, module, backends.Target(1))

    monkeypatch.setattr(lowering.Lowering, "_made", lowering_of)
    monkeypatch.setattr(Tuned, "best", lambda self, module, rows, threads: best(row=0.1, plain=0.6, ready=1.0))
    with Pipeline.load(shop.config(weights)) as pipeline:
        for number in range(1, 7):
            pipeline(text="red oak desk")
            way = pipeline.runners.resolved("call")
            assert set(way.segments) == (set() if number < 4 else {"image@0", "text@0", "audio@0"}), number
            assert way.more_from == (4 if number < 4 else None)
        assert not pipeline.runners._unproved_call  # it went through the gate
        assert pipeline.runners.resolved("call").backend == "inductor"


def test_calls_stay_as_they_were_where_the_other_backend_is_not_at_parity(weights, monkeypatch):
    def lowering_of(self, plan, segment, module, choice, *rest):
        run = backends.lower("eager", segment, module, backends.Target(1))
        return run if choice.backend == "eager" else lambda *tensors: tuple(-result for result in run(*tensors))

    monkeypatch.setattr(lowering.Lowering, "_made", lowering_of)
    monkeypatch.setattr(Tuned, "best", lambda self, module, rows, threads: best(row=0.1, plain=0.6, ready=1.0))
    with Pipeline.load(shop.config(weights)) as pipeline:
        wanted = pipeline(text="red oak desk")
        batches = pipeline.resolved
        for _ in range(6):
            assert pipeline(text="red oak desk") == wanted
        assert pipeline.runners.resolved("call").segments == {}
        assert pipeline.runners.lowering.refused == {}
        assert pipeline.resolved is batches


def test_winners_are_kept_for_this_machine_and_used(weights, cache, monkeypatch):
    made = shop.config(weights)
    with Pipeline.load(made) as pipeline:
        way, module = pipeline.resolved, pipeline.modules["image@0"]
        winner = best("eager", "bfloat16")
        Tuned().keep([(module, way.batch_size, way.threads, winner)])
    assert Tuned().best(module, way.batch_size, way.threads) == winner
    assert Tuned().best(module, way.batch_size + 4, way.threads) is None
    with Pipeline.load(made) as pipeline:
        assert pipeline.resolved.segments == {"image@0": winner.choice}
        assert "tuned: image@0 eager bfloat16, 3.00 × as fast as eager" in pipeline.resolved.reasons["backend"]
        before = pipeline.fingerprints([])
    assert dataclasses.replace(winner, plain=winner.choice).told == "eager bfloat16, the fastest that was tried"
    monkeypatch.setattr("mmpipe.tuned.hardware", lambda: "another")
    with Pipeline.load(made) as pipeline:
        assert pipeline.resolved.segments == {}
        assert pipeline.fingerprints([])["numerics"] != before["numerics"]
        assert pipeline.fingerprints([])["model"] == before["model"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2, "segments": {}}', '{"version": 1, "segments": []}'])
def test_a_broken_file_of_winners_counts_as_none(cache, text):
    path = cache / "tuned" / f"{machine.hardware()}.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert Tuned().entries == {}


@pytest.mark.parametrize(
    "change",
    [
        {"row_seconds": 0.0},
        {"row_seconds": math.nan},
        {"plain_row_seconds": -1.0},
        {"ready_seconds": math.inf},
        {"ready_seconds": "soon"},
        {"choice": {"backend": "bogus", "dtype": "float32"}},
        {"choice": {"backend": "inductor", "dtype": "float99"}},
        {"choice": ["inductor"]},
        {"plain": None},
    ],
)
def test_a_broken_winner_counts_as_none(weights, cache, change):
    with Pipeline.load(shop.config(weights)) as pipeline:
        way, module = pipeline.resolved, pipeline.modules["image@0"]
        path = Tuned().keep([(module, way.batch_size, way.threads, best("eager", "bfloat16"))])
    content = json.loads(path.read_text())
    (entry,) = content["segments"].values()
    entry |= change
    path.write_text(json.dumps(content))
    with Pipeline.load(shop.config(weights)) as pipeline:
        assert pipeline.resolved.segments == {}


def test_where_winners_can_not_be_kept_they_are_told(weights, cache, monkeypatch):
    monkeypatch.setattr(autotune, "_SECONDS", 0.0)
    cache.write_text("a file where a folder has to be")
    said = []
    with Pipeline.load(shop.config(weights)) as pipeline:
        tuning = autotune.autotune(pipeline, [], backends=["eager"], say=said.append)
    assert tuning.best
    assert "the winners are not kept, and no run will know them: [Errno 20] Not a directory" in said[-1]


def test_autotune_measures_what_a_large_job_runs_too(weights, cache, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(2)), raising=False)
    monkeypatch.setattr("mmpipe.placing._NUMBERS_FOR_THREADS", 0)  # these are large
    with Pipeline.load(shop.config(weights, runtime={"batch_size": "auto"})) as pipeline:
        places = {(rows, threads) for _, rows, threads in autotune._places(pipeline)}
        call = pipeline.runners.resolved("call")
        assert places == {(32, 2), (16, 1), (1, call.threads)}
        pipeline.settle([Sample(str(n), {"text": "a red mug"}) for n in range(1000)])
        assert (pipeline.resolved.batch_size, pipeline.resolved.threads) == (16, 1)


def test_autotune_measures_each_way_and_the_fastest_at_parity_wins(weights, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "_SECONDS", 0.0)
    monkeypatch.setattr(autotune, "bfloat16_gain", lambda: 2.0)
    said = []
    with Pipeline.load(shop.config(weights)) as pipeline:
        samples = pipeline.find(shop.media(tmp_path / "media", 9)).samples
        tuning = autotune.autotune(
            pipeline, samples, backends=["eager", "inductor"], say=said.append, lower=compilers.lower
        )
    assert {one.segment for one in tuning.tried} == {"image@0", "text@0", "audio@0"}
    text = [one for one in tuning.tried if one.segment == "text@0" and one.choice == Choice("eager", "bfloat16")]
    assert [one.why for one in text if "cosine -" not in one.why] == []
    assert all(one.why == "no compiler here" for one in tuning.tried if one.choice.backend == "inductor")
    assert {found.choice for (name, _, _), found in tuning.best.items() if name == "text@0"} == {PLAIN}
    assert len(said) == len(tuning.tried)
    for (name, rows, threads), found in tuning.best.items():
        fair = [
            one for one in tuning.tried if (one.segment, one.rows, one.threads, one.why) == (name, rows, threads, "")
        ]
        assert found.row_seconds == min(one.row_seconds for one in fair)
        assert Tuned().best(pipeline.modules[name], rows, threads) == found


def test_a_compiler_that_takes_its_process_down_is_a_line_and_what_comes_after_is_tried(weights, cache, monkeypatch):
    monkeypatch.setattr(autotune, "_SECONDS", 0.0)
    monkeypatch.setattr(autotune, "bfloat16_gain", lambda: 0.0)
    said = []
    with Pipeline.load(shop.config(weights, runtime={"batch_size": 4})) as pipeline:
        tuning = autotune.autotune(pipeline, [], backends=["openvino"], say=said.append, lower=compilers.crashing)
        places = {(one.segment, one.rows, one.threads) for one in tuning.tried}
    assert {segment for segment, _, _ in places} == {"image@0", "text@0", "audio@0"}
    assert set(tuning.best) == places
    assert all(best.choice == PLAIN for best in tuning.best.values())
    assert {(one.choice.backend, one.why) for one in tuning.tried} == {
        ("eager", ""),
        ("openvino", "it crashed (signal 11)"),
    }
    assert sum("not tried: it crashed (signal 11)" in text for text in said) == len(places)


def test_autotune_measures_on_the_cpu(pipeline, monkeypatch):
    there = replace(pipeline.resolved, device="cuda")
    monkeypatch.setattr(pipeline.runners, "resolved", lambda: there)
    with pytest.raises(InputError, match=r"autotune measures on the CPU, and runtime\.device is cuda"):
        autotune.autotune(pipeline, [])


def test_a_tuned_backend_that_is_gone_is_eager_and_explain_says_so(weights, cache, tmp_path, monkeypatch):
    made = shop.config(weights, runtime={"cache": "off"})
    with Pipeline.load(made) as pipeline:
        way = pipeline.resolved
        won = [(pipeline.modules[name], way.batch_size, way.threads, best(ready=0.0)) for name in ("image@0", "text@0")]
        Tuned().keep(won)
        samples = list(pipeline.find(shop.media(tmp_path / "media", 12)).samples)
        wanted = pipeline.predict(samples)
    whole, asked = lowering.lower, []

    def lower(backend, segment, module, target, examples=()):
        if backend == "inductor":
            asked.append(segment.name)
            if segment.name == "image@0":
                raise Unlowerable("inductor needs a C++ compiler")
            backend = "eager"
        return whole(backend, segment, module, target, examples)

    monkeypatch.setattr(lowering, "lower", lower)
    with Pipeline.load(made) as pipeline:
        answers = pipeline.predict(samples)
        assert pipeline.resolved.segments == {"text@0": Choice("inductor", "float32")}
        explained = collect.explain(pipeline, samples)
    assert {"image@0", "text@0"} == set(asked)
    assert [one.label for one in answers] == [one.label for one in wanted]
    (why,) = (one["why"] for one in explained["autos"] if one["key"] == "runtime.backend")
    assert "image@0 not inductor, which was fastest: inductor needs a C++ compiler" in why
    assert "tuned: text@0 inductor float32" in why
    backends = {one["name"]: one["backend"] for one in explained["segments"]}
    assert (backends["image@0"], backends["text@0"]) == ("eager", "inductor")
