"""What explain concludes from numbers written by hand, and what it tells of a real run."""

from __future__ import annotations

import json

import pytest
import torch
from support import shop
from test_cli import mmpipe
from torch import nn

from mmpipe import Pipeline
from mmpipe.explain import collect, timing
from mmpipe.graphs import passes
from mmpipe.graphs.capture import capture
from mmpipe.graphs.cost import Product
from mmpipe.graphs.fuse import fuse
from mmpipe.runtime.device import HostDevice
from mmpipe.runtime.ledger import Decoding, Outcome


@pytest.fixture(scope="module")
def explained(pipeline, tmp_path_factory):
    media = shop.media(tmp_path_factory.mktemp("media"), 40)
    return collect.explain(pipeline, list(pipeline.find(media).samples))


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0),
        ([(1, 2)], 1),
        ([(1, 3), (2, 4)], 3),
        ([(5, 6), (1, 2)], 2),
        ([(1, 9), (2, 3)], 8),
        ([(1, 2), (2, 3)], 2),
    ],
)
def test_the_union_of_intervals(intervals, length):
    assert collect.covered(intervals) == length


def segment(name, seconds, share, products=0.5):
    found = {"name": name, "branch": name.partition("@")[0], "seconds": seconds, "share": share, "runs": 3, "rows": 96}
    return {**found, "stage": 0, "ms_per_row": 1.5, "products_share": products}


def outcome(*decodings):
    none = Outcome(*[None] * 5)
    none.decodings = [Decoding(branch, "1", 0.0, seconds) for branch, seconds in decodings]
    return none


def seconds(compute, waiting, other):
    return {
        "wall": compute + waiting + other,
        "compute": compute,
        "waiting": waiting,
        "other": other,
        "decode_core": 1.0,
    }


def test_a_run_that_computes_names_its_slowest_segment(pipeline):
    segments = [segment("image@0", 2.0, 0.25), segment("audio@2", 6.0, 0.75, products=0.8)]
    text, advice = collect.verdict(segments, seconds(8, 1, 1), pipeline, outcome())
    assert text.startswith("Bound by computing (80% of the time): audio@2 takes 75% of it, 1.5 ms a row")
    assert advice[0].startswith("80% of audio@2 is matrix products")


def test_a_run_that_waits_names_the_modality(pipeline):
    text, advice = collect.verdict(
        [segment("image@0", 1.0, 1.0)], seconds(1, 8, 1), pipeline, outcome(("image", 9.0), ("audio", 1.0))
    )
    assert text.startswith("Bound by decoding: the model waits 80% of the time; image takes 90% of the decoding")
    assert "Smaller image files" in advice[0]


def test_a_run_of_nothing_says_so(pipeline):
    idle = {**segment("image@0", 0.0, 0.0), "runs": 0}
    assert collect.verdict([idle], seconds(0, 0, 1), pipeline, outcome())[0].startswith("Nothing was computed")
    text, _ = collect.verdict([segment("image@0", 0.1, 1.0)], seconds(0.1, 0.1, 0.8), pipeline, outcome())
    assert text.startswith("Bound by neither")


def test_the_parts_of_a_real_run_add_up(explained, pipeline):
    parts = explained["seconds"]
    assert parts["compute"] + parts["waiting"] + parts["other"] == pytest.approx(parts["wall"])
    assert sum(line["share"] for line in explained["segments"]) == pytest.approx(1.0)
    assert [line["name"] for line in explained["segments"]] == [s.name for s in pipeline.plan.segments]
    for line in explained["segments"]:
        assert 0 < line["products_share"] <= 1
        assert line["flops"] > 0
        assert line["workspace_bytes"] > 0
    assert sum(explained["answered_by"].values()) <= explained["items"]
    assert json.loads(json.dumps(explained)) == explained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_timed_in_the_type_that_runs(weights, tmp_path, monkeypatch, dtype):
    seen = []

    def timed(products, timed, threads, device):
        seen.extend(products)
        return len(products) * 1e-9

    monkeypatch.setattr(collect, "products_seconds", timed)
    with Pipeline.load(shop.config(weights, runtime={"dtype": dtype})) as pipeline:
        collect.explain(pipeline, list(pipeline.find(shop.media(tmp_path / "media", 8)).samples))
        short = [name for name, choice in pipeline.resolved.segments.items() if choice.dtype == "bfloat16"]
    types = {product.dtype for product in seen}
    assert types == ({torch.float32, torch.bfloat16} if short else {torch.float32})  # heads stay float32
    assert bool(short) == (dtype == "bfloat16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("target", "shapes"),
    [
        (torch.ops.aten.addmm.default, ((32,), (8, 64), (64, 32))),
        (torch.ops.aten.mm.default, ((8, 64), (64, 32))),
        (torch.ops.aten.bmm.default, ((4, 8, 16), (4, 16, 8))),
        (torch.ops.aten.convolution.default, ((2, 3, 8, 8), (4, 3, 4, 4))),
    ],
)
def test_every_kind_of_product_can_be_timed(dtype, target, shapes):
    rest = ((4, 4), (0, 0), (1, 1), False, (0, 0), 1) if target is torch.ops.aten.convolution.default else ()
    one, other = (Product(target, shapes, dtype, rest, count) for count in (1, 3))
    timed = {}
    alone = timing.products_seconds([one], timed, 1, HostDevice())
    assert alone == timed[one] > 0
    assert timing.products_seconds([one, one], timed, 1, HostDevice()) == 2 * alone
    assert timing.products_seconds([other], {other: 1.0}, 1, HostDevice()) == 3.0


class AsWritten(nn.Module):
    """A norm that no convolution comes before, attention with scores that are read too, or neither."""

    def __init__(self, odd):
        super().__init__()
        self.conv, self.norm, self.odd = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), odd

    def forward(self, x):
        y = self.conv(self.norm(x)) if self.odd else self.norm(self.conv(x))
        scores = (y @ y.transpose(-1, -2)).softmax(-1)
        mixed = scores @ y
        return (mixed + scores.mean() if self.odd else mixed).flatten(1)


def test_what_no_pass_could_change_is_told():
    told = []
    for odd in (False, True):
        graph = fuse([capture(AsWritten(odd).eval(), {"x": torch.zeros(4, 8, 8)}, name="image")], None, [])
        passes.optimise(graph)
        told.append([what for what, _ in collect.left_as_written(graph)])
    assert told == [[], ["folding batch norms", "attention as one operation"]]


def test_every_fast_path_that_was_not_taken_has_a_reason(explained):
    whats = {line["what"] for line in explained["not_taken"]}
    assert {"bfloat16", "a compiled backend", "branches side by side", "embedding cache"} <= whats
    assert all(line["why"] for line in explained["not_taken"])
    keys = {line["key"] for line in explained["autos"]}
    assert {"runtime.schedule", "runtime.batch_size", "runtime.memory_limit", "lanes", "threads"} <= keys


def test_explaining_changes_nothing(pipeline, tmp_path):
    samples = list(pipeline.find(shop.media(tmp_path, 20)).samples)
    before = pipeline.predict(samples)
    collect.explain(pipeline, samples)
    assert pipeline.predict(samples) == before


def test_the_command_writes_a_page_and_a_trace(tmp_path):
    done = mmpipe("explain", "quickstart", "--limit", "20", "--trace", "trace.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Bound by" in done.stdout or "Nothing" in done.stdout
    assert "explain.html" in done.stdout
    page = (tmp_path / "explain.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "audio@2" in page
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert {"image@0", "in:image@0"} <= {event["name"] for event in trace["traceEvents"]}


def test_the_command_without_input_makes_media_up_and_prints_json(tmp_path):
    done = mmpipe("explain", "custom", "--json", "--limit", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["items"] == 8
    assert not (tmp_path / "explain.html").exists()
