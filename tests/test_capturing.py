"""Captured graphs that are kept: the same graph without a capture, and a capture wherever anything may differ."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch
from support import hub, shop, words
from torch import nn

from mmpipe import Pipeline, Sample, capturing, remembering
from mmpipe.fusion.heads import TransformerHead
from mmpipe.graphs.digest import digest
from mmpipe.graphs.fuse import mark_of
from mmpipe.graphs.plan import GraphError

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def captures(monkeypatch):
    """Names of what is captured, as it happens."""
    names, capture = [], capturing.capture

    def counted(module, rows, *, name, layers=None):
        names.append(name)
        return capture(module, rows, name=name, layers=layers)

    monkeypatch.setattr(capturing, "capture", counted)
    return names


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return hub.Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return shop.weights(tmp_path_factory.mktemp("weights"))


def nodes(graph):
    return [(node.op, node.name, str(node.target), mark_of(node)) for node in graph.graph.nodes]


def embedding(pipeline):
    return pipeline.predict([{"id": "1", "image": hub.pictures(5)[4], "text": "a red shoe"}])[0]


@pytest.mark.parametrize("family", hub.FAMILIES)
def test_the_second_load_captures_nothing_and_has_the_same_graph(models, family, captures):
    config = {"task": "embed", "encoders": {hub.FAMILIES[family]: hub.section(models, family)}}
    with Pipeline.load(config) as pipeline:
        first = pipeline.graph
    assert captures == [hub.FAMILIES[family]]
    with Pipeline.load(config) as pipeline:
        again = pipeline.graph
    assert captures == [hub.FAMILIES[family]]
    assert nodes(again) == nodes(first)
    assert digest(again) == digest(first)


def test_heads_with_depths_and_exits_too_and_answers_to_the_bit(weights, captures):
    exits = [{"after": "image.layer1", "threshold": 0.9}, {"after": "head.layer1", "threshold": 0.8}]
    config = shop.config(weights, exits, runtime={"cache": "off"})
    told = []
    for _ in range(2):
        with Pipeline.load(config) as pipeline:
            told.append([(one.label, one.confidence, one.answered_by) for one in (embedding(pipeline),)])
    assert captures == ["image", "text", "audio", "head"]
    assert told[0] == told[1]


def test_other_weights_of_the_same_architecture_need_no_capture(weights, captures, tmp_path):
    others = shop.weights(tmp_path / "others")
    shop.tiny.save(others / "photo.safetensors", "photo", shop.tiny.PhotoNet())  # every number another
    found = []
    for folder in (weights, others):
        with Pipeline.load(shop.config(folder, output={"embeddings": True})) as pipeline:
            found.append(embedding(pipeline).embeddings)
    assert len(captures) == 4
    assert not (found[0]["image"] == found[1]["image"]).all()
    assert (found[0]["text"] == found[1]["text"]).all()


def test_what_shapes_the_graph_is_part_of_the_name(models, captures, monkeypatch):
    def load(**options):
        Pipeline.load({"task": "embed", "encoders": {"text": {**hub.section(models, "bert"), **options}}}).close()
        return len(captures)

    assert [load(max_tokens=16), load(max_tokens=16), load(max_tokens=24)] == [1, 1, 2]
    about = models("bert") / "config.json"
    before = about.read_text()
    about.write_text(json.dumps(json.loads(before) | {"hidden_act": "relu"}))
    try:
        assert load(max_tokens=16) == 3
    finally:
        about.write_text(before)
    assert load(max_tokens=16) == 3
    monkeypatch.setattr(remembering, "versions", lambda: {"torch": "99"})
    assert load(max_tokens=16) == 4


def test_a_class_of_the_user_s_own_is_captured_every_time(tmp_path, captures, cache):
    path = words.config(tmp_path / "words")
    for _ in range(2):
        Pipeline.load(path).close()
    assert captures == ["text", "head"] * 2
    assert not cache.exists()


_MINE = """
import torch
from mmpipe.encoders import BuiltEncoder
class Twice(torch.nn.Module):
    def forward(self, x):
        return x * 2
class Mine(BuiltEncoder):
    def __init__(self):
        row, about = {"x": torch.ones(4)}, {"modality": "text", "dim": 4, "example": "a", "preprocessing": {}}
        super().__init__(module=Twice(), prepare=lambda text: row, **about)
"""


def test_a_module_of_the_user_s_own_in_an_encoder_of_ours_too(tmp_path, captures, cache):
    (tmp_path / "mine_parts.py").write_text(_MINE, encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"task": "embed", "encoders": {"text": {"model": "mine_parts:Mine"}}}), encoding="utf-8")
    for _ in range(2):
        Pipeline.load(path).close()
    assert captures == ["text"] * 2
    assert not cache.exists()


def test_what_a_module_does_not_tell_keeps_it_from_being_kept():
    plain = nn.Linear(2, 2)
    assert capturing._architecture(plain) == capturing._architecture(nn.Linear(2, 2))
    seen = [capturing._architecture(plain)]
    for value in (torch.ones(2), torch.zeros(2), signal.SIGINT, signal.SIGTERM, Sample("a", {}), Sample("b", {})):
        plain.setting = value
        seen.append(capturing._architecture(plain))
    assert all(one != other for place, one in enumerate(seen) for other in seen[:place])
    plain.setting = lambda x: x
    assert capturing._architecture(plain) is None


def test_tied_weights_are_another_architecture_than_untied_ones():
    tied, untied = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval().requires_grad_(False) for _ in range(2))
    tied[1].weight = nn.Parameter(tied[0].weight.detach(), requires_grad=False)  # another parameter, the same memory
    tied[1].bias = nn.Parameter(tied[1].bias.detach().clone(), requires_grad=False)
    assert [name for name, _ in tied.named_parameters()] == [name for name, _ in untied.named_parameters()]
    assert capturing._architecture(tied) != capturing._architecture(untied)


def test_off_means_off(weights, captures, monkeypatch):
    monkeypatch.setenv("MMPIPE_CACHE", "off")
    for _ in range(2):
        Pipeline.load(shop.config(weights)).close()
    assert len(captures) == 8


@pytest.mark.parametrize("damage", ["changed", "cut", "folder open to others"])
def test_what_somebody_touched_is_captured_anew(weights, captures, cache, damage):
    Pipeline.load(shop.config(weights)).close()
    files = sorted((cache / "captured").iterdir())
    assert len(files) == 4
    if damage == "folder open to others":
        (cache / "captured").chmod(0o777)
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
        if damage == "changed":
            path.write_bytes(content.replace(b"aten", b"evil"))
    Pipeline.load(shop.config(weights)).close()
    assert captures == ["image", "text", "audio", "head"] * 2


def test_what_cannot_be_captured_fails_as_without_a_cache(captures, cache):
    class Loop(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    for _ in range(2):
        with pytest.raises(GraphError, match="can't be captured"):
            capturing._kept(
                Loop(),
                {"x": torch.ones(3)},
                [],
                lambda whole: capturing.capture(whole, {"x": torch.ones(3)}, name="x", layers=None),
            )
    assert not list((cache / "captured").glob("*"))


_ARCHITECTURE = """
import json, sys
from mmpipe import capturing
from mmpipe.encoders import load
print(json.dumps(capturing._architecture(load(sys.argv[1], "text").module)))
"""


def test_a_module_s_description_is_the_same_in_every_process(models, monkeypatch):
    """transformers' modules hold sets, whose order is another in every process."""
    found = set()
    for seed in range(4):
        monkeypatch.setenv("PYTHONHASHSEED", str(seed))
        command = [sys.executable, "-c", _ARCHITECTURE, hub.section(models, "bert")["model"]]
        found.add(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1


@pytest.mark.parametrize("batch", [1, 5])
def test_a_head_with_fourier_features_and_floors_is_captured(batch):
    torch.manual_seed(0)
    dims = {"image": 6, "text": 5, "audio": 4}
    head = TransformerHead(
        dims, ["a", "b", "c"], width=8, depth=2, heads=2, direct=True, fourier={"image": 16, "audio": 8}, floors=True
    )
    for features in head.fourier.values():
        for buffer in features.buffers():
            buffer.normal_()
    captured = capturing.captured_head(head.eval(), dims, 3, own=False)
    presence_BM = torch.rand(batch, 3) < 0.5
    embeddings = {name: torch.randn(batch, dim) for name, dim in dims.items()}
    given = {"presence": presence_BM, **embeddings}
    with torch.no_grad():
        found = captured.graph(*[given[name] for name in captured.inputs])
        want = head.all_depths(embeddings, presence_BM)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)
