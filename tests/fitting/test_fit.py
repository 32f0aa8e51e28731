"""`mmpipe fit` end to end: a shop whose pictures and titles tell the label, small random encoders."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image
from support import shop
from support.words import started

from mmpipe import Pipeline, cli
from mmpipe.fitting.measuring import Compared, Left, Measured, Reliability, Score
from mmpipe.fitting.words import summary
from mmpipe.fusion.checkpoint import read_checkpoint

LABELS = ["bright", "dark", "grey"]
WORDS = {"bright": "white lamp sun", "dark": "black coal night", "grey": "stone ash cloud"}


def media(folder, count=90, seed=0):
    """Titles and pictures tell the label mostly, sounds never; some of each are missing, one picture is broken."""
    folder.mkdir(parents=True)
    draw, rows = np.random.default_rng(seed), []
    for number in range(count):
        label, stem = LABELS[number % 3], folder / f"item-{number:03d}"
        level = {"bright": 200, "dark": 40, "grey": 120}[label] + draw.integers(-45, 45)
        pixels = np.clip(draw.normal(level, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
        if number % 7:
            Image.fromarray(pixels).save(stem.with_suffix(".png"))
        if number % 5 or not number % 7:
            stem.with_suffix(".txt").write_text(" ".join(draw.choice(WORDS[label].split(), 2)))
        if number % 2:
            soundfile.write(stem.with_suffix(".wav"), draw.normal(0, 0.1, 8000).astype(np.float32), 16000)
        rows.append((stem.name, label))
    (folder / "item-001.png").write_bytes(b"no picture")
    return rows


def write_truth(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "label"), *rows])
    return path


def rows_of(place):
    return list(csv.reader((place / "truth.csv").read_text().splitlines()))[1:]


@pytest.fixture(scope="module")
def place(tmp_path_factory, weights):
    """A folder with media, truth.csv and fit.yaml: no labels, no checkpoint, exits of every kind."""
    folder = tmp_path_factory.mktemp("fit")
    write_truth(folder / "truth.csv", media(folder / "media"))
    made = shop.config(weights)
    del made["labels"], made["fusion"]
    made["fusion"] = {
        "head": "transformer",
        "exits": [
            {"after": "image.layer1", "threshold": 0.9},
            {"after": "image", "threshold": 0.9},
            {"after": ["image", "text"], "threshold": 0.9},
            {"after": "head.layer1", "threshold": 0.9},
        ],
        "audit": {"share": "2%"},
        "on_mismatch": "full",
    }
    shop.write(folder / "fit.yaml", made)
    return folder


@pytest.fixture(scope="module")
def call(place):
    """The command line within this process, in `place`: (exit code, standard output, standard error)."""

    def run(*arguments):
        out, told = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(told):
            patch.chdir(place)
            patch.setattr(sys, "argv", ["mmpipe", *map(str, arguments)])
            code = 0
            try:
                cli.main()
            except SystemExit as ended:
                code = ended.code or 0
        assert "Traceback" not in told.getvalue()
        return code, out.getvalue(), told.getvalue()

    return run


def fit(call, output, *more, config="fit.yaml", truth="truth.csv"):
    return call("fit", config, "--input", "media", "--truth", truth, "--output", output, "--epochs", 3, *more)


@pytest.fixture(scope="module")
def fitted(place, call):
    code, results, told = fit(call, "done")
    assert code == 0, told
    return place / "done", results, told


def test_what_is_written_runs_and_knows_the_labels(fitted, place, call):
    folder, results, told = fitted
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "fit.html", "head.safetensors"]
    assert "Right on " in results
    assert "1 image could not be used" in told
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["labels"] == LABELS
    assert config["fusion"]["audit"] == {"share": 0.02}  # what is not about the head stays as it was
    assert config["fusion"]["on_mismatch"] == "full"
    assert not any(os.path.isabs(encoder["weights"]) for encoder in config["encoders"].values())
    truth = dict(rows_of(place))
    code, _, told = call("run", "done/config.yaml", "--input", "media", "--output", "predicted", "--json")
    assert code == 0, told
    with Pipeline.load(folder / "config.yaml") as pipeline:
        found = pipeline.predict(pipeline.find(place / "media").samples)
    assert np.mean([one.label == truth[one.id] for one in found]) > 0.8
    by_text = [one.label == truth[one.id] for one in found if "text" in one.present]
    assert np.mean(by_text) > 0.8


def test_exits_without_a_threshold_are_left_out_and_the_probes_are_those_of_the_rest(fitted):
    folder, _, _ = fitted
    config = yaml.safe_load((folder / "config.yaml").read_text())
    kept = [exit_["after"] for exit_ in config["fusion"]["exits"]]
    probes = read_checkpoint(folder / "head.safetensors").probes
    assert set(probes) == ({"image.layer1.weight", "image.layer1.bias"} if "image.layer1" in kept else set())
    assert all(0 <= exit_["threshold"] <= 1 for exit_ in config["fusion"]["exits"])


def test_the_report_is_one_file_that_loads_nothing(fitted):
    page = (fitted[0] / "fit.html").read_text()
    for title in ("Against baselines", "Every subset of modalities", "Exits", "Training", "Confusion", "Reliability"):
        assert f">{title}</h2>" in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "image+text+audio" in page.replace("<wbr>", "")


def test_the_same_seed_gives_the_same_head(fitted, call, place):
    code, _, told = fit(call, "again")
    assert code == 0, told
    one, two = (read_checkpoint(place / name / "head.safetensors") for name in ("done", "again"))
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
    config = (place / "again/config.yaml").read_text()
    assert config.replace("again", "done") == (place / "done/config.yaml").read_text()


def test_the_linear_head(call, place):
    overrides = ("--set", "fusion.head=linear", "--set", "fusion.exits=[]")
    code, results, told = fit(call, "linear", *overrides)
    assert code == 0, told
    code, _, told = call("run", "linear/config.yaml", "--input", "media", "--output", "linear-out")
    assert code == 0, told
    assert "logistic regression" in results


def test_a_label_with_markup_and_a_config_without_fusion(call, place, weights):
    made = shop.config(weights)
    del made["labels"], made["fusion"]
    shop.write(place / "bare.yaml", made)
    odd = [(id_, label.replace("grey", "<b>grey</b>: no")) for id_, label in rows_of(place)]
    write_truth(place / "odd.csv", odd)
    code, _, told = fit(call, "odd", config="bare.yaml", truth="odd.csv")
    assert code == 0, told
    assert "names no head: fitting a transformer" in told
    assert "<b>grey" not in (place / "odd/fit.html").read_text()
    assert call("check", "odd/config.yaml", "--input", "media")[0] == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: [], "no rows"),
        (lambda rows: [(f"x-{id_}", label) for id_, label in rows], "none of the 90 labelled ids is in the input"),
        (lambda rows: [(id_, "dark") for id_, _ in rows], "at least two labels"),
        (lambda rows: [(id_, "rare" if n == 5 else label) for n, (id_, label) in enumerate(rows)], "'rare' has 1"),
        (lambda rows: [*rows, rows[0]], "item-000"),
        (lambda rows: [(rows[0][0], ""), *rows[1:]], "blank"),
    ],
    ids=["empty", "strangers", "one label", "one sample", "twice", "blank"],
)
def test_a_truth_that_can_not_be_fitted_to_is_refused_before_a_model_is_loaded(call, place, change, says):
    write_truth(place / "bad.csv", change(rows_of(place)))
    code, results, told = fit(call, "bad", truth="bad.csv")
    assert (code, results) == (2, "")
    assert says in told
    assert "loading" not in told
    assert not (place / "bad").exists()


def test_labels_that_the_configuration_lacks_and_ids_that_the_input_lacks(call, place):
    write_truth(place / "some.csv", [*rows_of(place)[:60], ("gone", "dark")])
    code, _, told = fit(call, "few", "--set", "labels=[bright, dark]", truth="some.csv")
    assert code == 2
    assert "unknown label 'grey'" in told
    code, _, told = fit(call, "some", truth="some.csv")
    assert code == 0, told
    assert "30 of 90 samples have no label" in told
    assert "1 labels are of ids that the input doesn't have (gone)" in told


def test_the_configuration_that_init_writes(call, place, weights):
    made = shop.config(weights, labels=["first label", "second label"])
    made["fusion"] = {"head": "zero_shot", "modalities": {"text": {"prompts": ["{}"]}}}
    shop.write(place / "init.yaml", made)
    code, _, told = fit(call, "init", config="init.yaml")
    assert code == 2
    assert "--set fusion.head=transformer" in told
    code, _, told = fit(call, "init", "--set", "fusion.head=transformer", config="init.yaml")
    assert code == 0, told
    assert "taking the 3 of truth.csv" in told
    assert yaml.safe_load((place / "init/config.yaml").read_text())["labels"] == LABELS


def test_bad_usage(call, place):
    assert fit(call, "x", "--set", "fusion={head: zero_shot}")[0] == 2
    assert fit(call, "x", "--set", "task=embed", "--set", "fusion={}")[0] == 2
    assert fit(call, "x", "--limit", "0")[0] == 2
    assert fit(call, "x", truth="nowhere.csv")[0] == 2
    code, _, told = fit(call, "media/out")
    assert (code, "inside the input" in told) == (4, True)
    (place / "used").mkdir(exist_ok=True)
    (place / "used/mine.txt").write_text("mine")
    code, _, told = fit(call, "used")
    assert (code, "not empty" in told) == (4, True)


def test_embeddings_that_are_no_numbers_count_as_absent(call, place, weights):
    (place / "nan_parts.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def forward(self, x):\n        return torch.where(x[:, :1] > 120, torch.nan, x).float()\n\n\n"
        "class Level:\n    modality, dim = 'image', 4\n\n    def __init__(self):\n        self.module = Net()\n\n"
        "    def prepare(self, media):\n        import numpy as np\n\n"
        "        return {'x': torch.full((4,), float(np.asarray(media).mean()))}\n"
    )
    made = shop.config(weights)
    del made["labels"], made["fusion"]
    made["encoders"]["image"] = {"model": "nan_parts:Level"}
    shop.write(place / "nan.yaml", made)
    code, _, told = fit(call, "nan", config="nan.yaml")
    assert code == 0, told
    assert "image could not be used" in told
    assert (place / "nan/nan_parts.py").exists()  # what a configuration names lies beside it


def test_ctrl_c_writes_nothing(place):
    process = started("fit", "fit.yaml", "--input", "media", "--truth", "truth.csv", "--output", "cut", cwd=place)
    while "embedding" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in told
    assert not (place / "cut").exists()


def test_truth_in_jsonl_and_the_result_in_json(call, place):
    lines = [json.dumps({"id": id_, "label": label}) for id_, label in rows_of(place)]
    (place / "truth.jsonl").write_text("\n".join(lines))
    code, results, _ = fit(call, "jsonl", "--limit", "45", "--json", truth="truth.jsonl")
    assert code == 0
    assert 8 <= json.loads(results)["full"]["samples"] <= 11  # a fifth of 45, rounded by label


@pytest.mark.parametrize(("differ", "told"), [(0, False), (1, False), (8, True)])
def test_thresholds_that_the_test_part_contradicts_are_told_of(differ, told):
    curve = Reliability((0,) * 10, (0.0,) * 10, (0.0,) * 10)
    left = Left("image", 0.9, 40, 31, differ, Score(30, 40), curve)
    found = Measured(
        Score(30, 40), 0.7, Score(28, 40), ((30,),), curve, (), (left,), (Compared("x", Score(20, 40), 3, 1),)
    )
    assert ("8 of 40 answers differ, more than the 1%" in summary(found)) == told
    assert "Each label counted alike: 70.0%." in summary(found)
