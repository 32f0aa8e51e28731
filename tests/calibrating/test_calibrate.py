"""`mmpipe calibrate`: what it scores is what the pipeline does; its file, its report, its words."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import shop
from typer.testing import CliRunner

from mmpipe import Pipeline
from mmpipe.calibrating.certifying import calibrate, temperatures_of
from mmpipe.calibrating.page import render
from mmpipe.calibrating.request import Request
from mmpipe.calibrating.scores import read_scores, with_truth, write_scores
from mmpipe.calibrating.shadow import chosen, shadow
from mmpipe.calibrating.words import summary, verdict
from mmpipe.cli import app
from mmpipe.config import load
from mmpipe.errors import ConfigError, InputError, OutputError
from mmpipe.fusion.calibration import split

DEPTHS = [
    {"after": "image.layer1", "threshold": 0.0},
    {"after": "image", "threshold": 0.0},
    {"after": ["image", "text"], "threshold": 0.0},
    {"after": "head.layer1", "threshold": 0.0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = shop.media(tmp_path_factory.mktemp("shop") / "media", 60)
    (made / "item-004.png").write_bytes(b"no picture")
    (made / "item-008.wav").write_bytes(b"no sound")
    return made


@pytest.fixture(scope="module")
def scored(weights, folder):
    with Pipeline.load(shop.config(weights, DEPTHS)) as pipeline:
        return shadow(pipeline, pipeline.find(folder).samples)


def looks_of(weights, folder, exits):
    """(exit, id) → label and confidence, as the pipeline's own gates have them, nobody leaving."""
    with Pipeline.load(shop.config(weights, exits)) as pipeline:
        samples = pipeline.find(folder).samples
        _, outcome = pipeline.run(samples, exits=False)
        return {
            (pipeline.plan.exits[look.exit_index].name, samples[row].id): (label, confidence)
            for look in outcome.looks
            for row, label, confidence in zip(look.rows, look.labels, look.confidences, strict=True)
        }


@pytest.mark.parametrize("order", [("image", "text"), ("text", "audio"), ("audio", "image")])  # all subsets, all firsts
def test_scores_of_every_order_are_what_the_pipelines_exits_compute(weights, folder, scored, order):
    scores, ids = scored
    sequence = next(s for s in scores.sequences() if order in s and order[:1] in s)  # with all that the order has
    at_zero = [{"after": list(after), "threshold": 0.0} for after in sequence]
    looks = looks_of(weights, folder, at_zero)
    exits = scores.exits(sequence, {}, "max_probability")
    assert [after for after in sequence if ".layer" in after[0]][-1] == ("head.layer1",)
    assert (("image.layer1",) in sequence) == (order[0] == "image")
    for e, name in enumerate(exits.names):
        gated = {id_ for row, id_ in enumerate(ids) if exits.gated_EN[e, row]}
        assert gated == {id_ for exit_name, id_ in looks if exit_name == name}
        for row, id_ in enumerate(ids):
            if id_ in gated:
                label, confidence = looks[name, id_]
                assert exits.confidence_EN[e, row] == pytest.approx(confidence, abs=2e-5)
                assert exits.differs_EN[e, row] == (label != scores.full_N[row])
    for row, id_ in enumerate(ids):
        assert looks["all", id_][0] == scores.full_N[row]


def test_costs_rise_along_the_exits_and_count_only_what_a_sample_has(scored):
    scores, _ = scored
    for sequence in scores.sequences():
        cost_FN = scores.exits(sequence, {}, "max_probability").cost_FN
        assert (cost_FN[1:] >= cost_FN[:-1] - 1e-12).all()
        alone = scores.present_NM.sum(dim=1).numpy() == 1
        everything = scores.present_NM.all(dim=1).numpy()
        assert cost_FN[-1, alone].max() < cost_FN[-1, everything].min()
    assert 0 < scores.seconds["image.layer1"] < scores.seconds["image"]


def test_a_calibrated_pipeline_does_what_was_tested(weights, folder, scored, tmp_path):
    scores, ids = scored
    result = calibrate(scores, max_disagreement=0.4, certainty=0.6)
    assert result.calibration.promise is not None
    names = [exit_.name for exit_ in result.calibration.exits]
    from mmpipe.calibrated import write_calibration

    write_calibration(tmp_path / "c.json", result.calibration)
    written = shop.config(weights, DEPTHS)
    written["fusion"]["calibration"] = str(tmp_path / "c.json")
    with Pipeline.load(written) as pipeline:
        answered = {one.id: one for one in pipeline.predict(pipeline.find(folder).samples)}
    exits = result.certified.exits
    at_N = exits.leaving(np.array([result.certified.thresholds]))[0]
    for row, id_ in enumerate(ids):
        expected = "all" if at_N[row] == len(exits.names) else exits.names[at_N[row]]
        assert answered[id_].answered_by == expected
    assert set(names) & {one.answered_by for one in answered.values()}


def test_scores_are_read_back_and_bad_files_refused(scored, tmp_path):
    scores, ids = scored
    truth = {id_: shop.LABELS[row % 4] for row, id_ in enumerate(ids) if row % 2}
    known = with_truth(scores, ids, truth)
    assert known.truth_N.tolist() == [row % 4 if row % 2 else -1 for row in range(len(ids))]
    write_scores(tmp_path / "s.safetensors", known)
    back = read_scores(tmp_path / "s.safetensors")
    assert back.logits.keys() == scores.logits.keys()
    assert all(
        torch.equal(
            back.logits[n],
            t,
        )
        or torch.isnan(t).any()
        for n, t in scores.logits.items()
    )
    assert (back.labels, back.seconds, back.model) == (scores.labels, scores.seconds, scores.model)
    assert torch.equal(back.truth_N, known.truth_N)
    (tmp_path / "s.safetensors").write_bytes(b"none")
    with pytest.raises(InputError, match="holds no scores"):
        read_scores(tmp_path / "s.safetensors")
    with pytest.raises(InputError, match=r"none of the 1 ids.*'elsewhere'"):
        with_truth(scores, ids, {"elsewhere": "mug"})


def test_true_labels_add_a_statement_and_temper_by_truth(scored):
    scores, ids = scored
    known = with_truth(scores, ids, {id_: shop.LABELS[row % 4] for row, id_ in enumerate(ids)})
    result = calibrate(known, max_disagreement=0.4, certainty=0.6)
    assert result.calibration.accuracy is not None
    assert "statement of its own" in summary(result)
    parts = split(scores.count)
    assert temperatures_of(scores, parts)["image+text+audio"] == 1.0
    assert temperatures_of(known, parts)["image+text+audio"] != 1.0


def test_temperatures_come_from_the_learn_split_alone(scored):
    scores, _ = scored
    parts = split(scores.count)
    before = temperatures_of(scores, parts)
    for logits_NL in (changed := {name: table.clone() for name, table in scores.logits.items()}).values():
        logits_NL[torch.from_numpy(parts.test)] = 3.0
    from dataclasses import replace

    assert temperatures_of(replace(scores, logits=changed), parts) == before


def test_too_few_items_are_said_to_be_too_few(scored):
    result = calibrate(scored[0], max_disagreement=0.01)
    assert result.calibration.exits == ()
    assert result.calibration.promise is None
    assert verdict(result).startswith("No exit can be certified with")
    assert result.needed > scored[0].count
    page = render(result, "shop")
    assert f"about {result.needed:,} are needed" in page


def test_a_sample_is_drawn_at_random_and_in_order(folder, weights):
    samples = list(range(1000))
    few = chosen(samples, 50)
    assert len(set(few)) == 50
    assert few == sorted(few)
    assert max(few) > 500
    assert chosen(samples, None) == chosen(samples, 5000) == samples


# --- the command ----------------------------------------------------------------------------------------------------


def call(*arguments):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def test_the_command_writes_a_file_that_a_run_can_use_and_a_report(weights, folder, tmp_path):
    config = shop.write(tmp_path / "shop.yaml", shop.config(weights, shop.EXITS))
    truth = tmp_path / "truth.csv"
    ids = [f"item-{number:03d}" for number in range(60)]
    truth.write_text("id,label\n" + "".join(f"{id_},mug\n" for id_ in ids))
    done = call(config, "--input", folder, "--max-disagreement", "40%", "--certainty", "0.6", "--truth", truth)
    assert done.exit_code == 0, done.output
    assert "drawn at random from your data" in done.stdout
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert found["promise"]["max_disagreement"] == 0.4
    assert found["accuracy"]["items"] > 0
    page = (tmp_path / "calibration.html").read_text()
    for words in ("Worst classes", "Disagreement against saving", "Reliability", "says nothing about whether"):
        assert words in page
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    again = call(
        config, "--set", f"fusion.calibration={tmp_path / 'calibration.json'}", "--input", folder, "--limit", 20
    )
    assert again.exit_code == 0, again.output  # what was certified before is left aside
    assert "No exit can be certified" in again.stdout
    assert not json.loads((tmp_path / "calibration.json").read_text())["exits"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["embed"], 2, "nothing to calibrate"),
        (["quickstart", "--max-disagreement", "0%"], 2, "above 0%"),
        (["quickstart", "--certainty", "sure"], 2, "--certainty"),
        (["quickstart", "--certainty", "100%"], 2, "below 100%"),
        (["quickstart", "--truth", "none.csv"], 2, "none.csv"),
        (["quickstart", "--output", "nowhere/c.json"], 4, "no such folder"),
        (["quickstart", "--output", "c.html"], 2, "JSON"),
        (["quickstart", "--limit", "10"], 2, "--input"),
        (["quickstart", "--input", "nowhere"], 2, "nowhere"),
        (["custom"], 2, "nowhere to leave early"),
    ],
)
def test_what_can_not_be_calibrated_is_refused_first(arguments, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(*arguments)
    assert done.exit_code == code, done.output
    assert words in done.output


def test_shares_as_people_write_them():
    config = load("quickstart")
    assert Request.of(config, "1%", "95%").max_disagreement == 0.01
    assert Request.of(config, "0.5 %", "0.9").certainty == 0.9
    assert Request.of(config, 0.02, 0.99).max_disagreement == 0.02
    for odd in ("1", "5", "-1%", "", "1%%", "nan", "inf"):
        with pytest.raises(ConfigError):
            Request.of(config, odd)
    with pytest.raises(OutputError):
        Request.of(config, output=config.source.folder)


def test_quickstart_is_certified_on_the_scores_that_ship_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("quickstart")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert found["promise"]["items_learn"] + found["promise"]["items_test"] == 4000
    assert found["promise"]["observed"] <= 0.01
    assert found["expected"]["saving"] > 0.25
    assert found["accuracy"]["loss_at_most"] < 0.02
    with Pipeline.load("quickstart", overrides=["fusion.calibration=calibration.json"]) as pipeline:
        assert pipeline.built.max_disagreement == 0.01
        assert any(one.answered_by != "all" for one in pipeline.predict(pipeline.find().samples))


def test_scores_of_another_model_are_refused(tmp_path, monkeypatch):
    """A folder of packaged configurations whose quickstart has another head."""
    import importlib.resources

    import mmpipe.config.keys
    from mmpipe.fusion.checkpoint import read_checkpoint, save_checkpoint
    from mmpipe.fusion.heads import TransformerHead

    configs = tmp_path / "configs"
    shipped = importlib.resources.files("mmpipe.configs")
    shutil.copytree(str(shipped), configs, ignore=shutil.ignore_patterns("media", "__pycache__"))
    (configs / "quickstart" / "media").mkdir()
    read = read_checkpoint(configs / "quickstart" / "head.safetensors")
    torch.manual_seed(0)
    head = TransformerHead(read.meta["modalities"], read.meta["labels"], **read.meta["options"])
    save_checkpoint(
        read.path, head, kind="transformer", labels=read.meta["labels"], dims=read.meta["modalities"],
        options=read.meta["options"],
    )  # fmt: skip
    monkeypatch.setattr(mmpipe.config.keys, "_packaged_folder", lambda: configs)
    monkeypatch.chdir(tmp_path)
    done = call("quickstart")
    assert done.exit_code == 2
    assert "scores of another model" in done.output
    assert "--input" in done.output
    assert not (tmp_path / "calibration.json").exists()


def test_an_exit_that_is_not_worth_its_looks_may_be_left_out(scored):
    scores, _ = scored
    sequences = list(scores.sequences())
    assert len(sequences) == len(set(sequences))
    modalities = [tuple(after for after in s if ".layer" not in after[0]) for s in sequences]
    assert (("image",), ("image", "text")) in modalities
    assert (("image",),) in modalities
    assert (("image", "text"),) in modalities
    assert () in modalities
    dear = replace(scores, seconds={**scores.seconds, "head": 100.0})
    exits = dear.exits(sequences[0], {}, "max_probability")
    assert (exits.without() < exits.cost_FN[-1]).all()  # without exits the head looks once
    assert (exits.outcome(np.full((1, len(exits.names)), np.inf))[1] < 0).all()


def test_what_is_known_is_not_encoded_again_and_costs_what_it_would_cost(weights, folder, cache):
    """`cache` names a folder of its own."""
    exits = [{"after": ["image", "text"], "threshold": 0.0}]
    found = []
    for _ in range(2):
        with Pipeline.load(shop.config(weights, exits)) as pipeline:
            found.append(shadow(pipeline, pipeline.find(folder).samples)[0])
            run = pipeline.run(pipeline.find(folder).samples, exits=False)[1]
            assert run.missed == {"image": 1, "audio": 1}  # the broken ones
    first, second = found
    torch.testing.assert_close(second.logits, first.logits, rtol=0, atol=0, equal_nan=True)
    assert first.seconds.keys() == second.seconds.keys()
    for name, seconds in second.seconds.items():
        assert seconds > first.seconds[name] / 20, name  # not what looking it up takes


@pytest.mark.parametrize("right", [True, False])
def test_a_second_look_is_tried_where_true_labels_are_given(weights, folder, tmp_path, monkeypatch, right):
    """Truth that the second look, which turns every answer round, is always right of, or never."""
    monkeypatch.setattr("mmpipe.deliberating.weigh", lambda p_VL, sure_V: p_VL[0].flip(0))
    made = shop.config(weights, shop.EXITS)
    made["fusion"]["deliberate"] = {"below": 1.0, "views": 3}
    with Pipeline.load(made) as pipeline:
        samples = pipeline.find(folder).samples
        firsts, _ = pipeline.run(samples, exits=False, deliberate=False)
        seconds, _ = pipeline.run(samples, exits=False, deliberate=True)
    truth = tmp_path / "truth.csv"
    labelled = {one.id: one.label for one in (seconds if right else firsts) if one.label}
    truth.write_text("id,label\n" + "".join(f"{id_},{label}\n" for id_, label in labelled.items()))
    config = shop.write(tmp_path / "shop.yaml", made)
    done = call(config, "--input", folder, "--max-disagreement", "40%", "--certainty", "0.6", "--truth", truth)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "calibration.json").read_text())["second_look"]
    assert found["items"] == len(labelled)
    assert 20 <= found["looked_at"] <= sum(one.deliberated for one in seconds)  # temperatures make some sure
    assert (found["won"], found["lost"]) == ((found["looked_at"], 0) if right else (0, found["looked_at"]))
    assert found["pays"] == right
    verdict = "it stays on" if right else "it is not shown to pay, and is left out"
    assert verdict in done.stdout.replace("\n", " ")
    assert verdict in (tmp_path / "calibration.html").read_text()
