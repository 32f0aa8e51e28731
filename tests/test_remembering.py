"""What a later start takes from an earlier one: the same answers to the bit, and no model library."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import hub

from mmpipe import ConfigError, Pipeline, remembering
from mmpipe.encoders import load, recorded
from mmpipe.encoders.hub import asked
from mmpipe.encoders.text import Tokenise, Tokens
from mmpipe.graphs.digest import digest

ZERO_SHOT = ("open_clip", "clip", "siglip", "minilm", "clap")
LABELS = ["shoe", "bag", "rain"]


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def loads(monkeypatch):
    """What is loaded through its library, as it happens."""
    models, load_encoder = [], remembering.load_encoder

    def counted(model, *args, **settings):
        models.append(model)
        return load_encoder(model, *args, **settings)

    monkeypatch.setattr(remembering, "load_encoder", counted)
    return models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return hub.Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def bert(models, tmp_path):
    return shutil.copytree(models("bert"), tmp_path / "bert")


def embedding(config):
    """(of three media, the graph's digest, what a calibration would bind to)."""
    with Pipeline.load(config) as pipeline:
        (modality,) = pipeline.config.encoders
        media = hub.media_of(modality, 3)
        rows = pipeline.embed([{"id": str(n), modality: medium} for n, medium in enumerate(media)])
        return rows, digest(pipeline.graph), pipeline._built.core


@pytest.mark.parametrize("family", hub.FAMILIES)
def test_the_second_start_loads_nothing_and_says_the_same(models, family, loads):
    config = {"task": "embed", "encoders": {hub.FAMILIES[family]: hub.section(models, family)}}
    first, again = embedding(config), embedding(config)
    assert len(loads) == 1
    assert np.array_equal(first[0], again[0])
    assert first[1:] == again[1:]


@pytest.mark.parametrize("family", ZERO_SHOT)
def test_labels_that_were_compared_before_need_no_text_tower(models, family, loads):
    modality = hub.FAMILIES[family]

    def answers(labels):
        config = {"labels": labels, "encoders": {modality: hub.section(models, family)}}
        with Pipeline.load(config) as pipeline:
            return [(p.label, p.confidence) for p in pipeline.predict([{modality: hub.media_of(modality, 1)[0]}])]

    first = answers(LABELS)
    assert answers(LABELS) == first
    assert len(loads) == 1
    answers([*LABELS, "dog"])
    assert len(loads) == 2


_STARTS = """
import json, sys
from mmpipe import Pipeline
with Pipeline.load(sys.argv[1]) as pipeline:
    (found,) = pipeline.predict([json.loads(sys.argv[2])])
print(json.dumps([found.label, found.confidence, "transformers" in sys.modules, "open_clip" in sys.modules]))
"""


def test_it_imports_no_model_library(models, tmp_path):
    encoders = {hub.FAMILIES[name]: hub.section(models, name) for name in ("open_clip", "clap", "bert")}
    path = tmp_path / "pipeline.json"
    path.write_text(json.dumps({"labels": LABELS, "encoders": encoders}), encoding="utf-8")
    hub.pictures(5)[4].save(tmp_path / "shoe.png")
    sample = json.dumps({"image": str(tmp_path / "shoe.png"), "text": "a red shoe"})
    command = [sys.executable, "-c", _STARTS, str(path), sample]
    told = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2)]
    assert told[0][2:] == [True, True]
    assert told[1][2:] == [False, False]
    assert told[0][:2] == told[1][:2]


def _other_weights(folder):
    tensors = {name: tensor * 1.5 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "other.safetensors", metadata={"format": "pt"})
    os.replace(folder / "other.safetensors", folder / "model.safetensors")


def _other_length(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 16}))


def _pooling(folder):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    parts = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(parts))


@pytest.mark.parametrize("change", [_other_weights, _other_length, _pooling])
def test_a_model_that_was_changed_is_loaded_anew(bert, loads, change):
    config = {"task": "embed", "encoders": {"text": {"model": f"hf:{bert}"}}}
    before = embedding(config)
    change(bert)
    after = embedding(config)
    assert len(loads) == 2
    assert before[2] != after[2]
    assert np.array_equal(after[0], embedding(config)[0])
    assert len(loads) == 2


def test_what_goes_wrong_is_told_as_without_it(bert, loads):
    config = {"task": "embed", "encoders": {"text": {"model": f"hf:{bert}"}}}
    embedding(config)
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="can't be loaded"):
        embedding(config)
    weights.unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        embedding(config)
    shutil.rmtree(bert)
    with pytest.raises(ConfigError, match="does not exist"):
        embedding(config)


def test_a_hub_model_is_the_one_that_the_hub_has_now(models, monkeypatch, tmp_path, loads):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--small"
    (repository / "refs").mkdir(parents=True)
    for number in "ab":
        shutil.copytree(models("bert"), repository / "snapshots" / (number * 40))
    _other_weights(repository / "snapshots" / ("b" * 40))
    config = {"task": "embed", "encoders": {"text": {"model": "org/small", "max_tokens": 8}}}

    def now(commit):
        (repository / "refs" / "main").write_text(commit * 40)
        return embedding(config)[0]

    first, second = now("a"), now("b")
    assert len(loads) == 2
    assert not np.array_equal(first, second)
    assert np.array_equal(second, now("b"))
    assert len(loads) == 2


def test_lengths_that_are_not_kept_are_captured_of_the_model_itself(bert, loads, cache):
    config = {"task": "embed", "encoders": {"text": {"model": f"hf:{bert}", "max_tokens": 32}}}
    first = embedding(config)
    for graph in (cache / "captured").glob("*.graph"):
        graph.unlink()
    again = embedding(config)
    assert len(loads) > 1
    assert np.array_equal(first[0], again[0])
    assert first[1:] == again[1:]


def test_a_graph_that_was_captured_of_a_known_model_holds_none_of_its_weights(bert, loads, cache):
    config = {"task": "embed", "encoders": {"text": {"model": f"hf:{bert}", "max_tokens": 32}}}
    embedding(config)
    for graph in (cache / "captured").glob("*.graph"):
        graph.unlink()
    before = embedding(config)
    _other_weights(bert)
    after = embedding(config)
    assert not np.array_equal(before[0], after[0])
    monkey = load(f"hf:{bert}", "text", max_tokens=32)
    want = hub.run(monkey.module, hub.batch(monkey, hub.media_of("text", 3))).numpy()
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    assert np.allclose(after[0], want, atol=1e-5)


def test_what_is_written_while_it_is_loaded_is_not_recorded(bert, monkeypatch, loads, cache):
    load_encoder = remembering.load_encoder

    def slow(*args, **settings):
        encoder = load_encoder(*args, **settings)
        _other_length(bert)
        return encoder

    monkeypatch.setattr(remembering, "load_encoder", slow)
    config = {"task": "embed", "encoders": {"text": {"model": f"hf:{bert}"}}}
    embedding(config)
    assert not list((cache / "captured").glob("*.encoder"))
    monkeypatch.setattr(remembering, "load_encoder", load_encoder)
    assert np.array_equal(embedding(config)[0], embedding(config)[0])
    assert len(list((cache / "captured").glob("*.encoder"))) == 1


def test_a_transformer_in_a_folder_of_its_own_is_known_with_what_is_beside_it(models, tmp_path, loads):
    folder = tmp_path / "sentences"
    shutil.copytree(models("bert"), folder / "0_Transformer")
    (tmp_path / "pooling").mkdir()
    (folder / "1_Pooling").symlink_to(tmp_path / "pooling")
    parts = [{"type": "x.Transformer", "path": "0_Transformer"}, {"type": "x.Pooling", "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(parts))
    found = []
    for mode in ("cls_token", "max_tokens"):
        (tmp_path / "pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
        config = {"task": "embed", "encoders": {"text": {"model": f"hf:{folder}"}}}
        found += [embedding(config)[0], embedding(config)[0]]
    assert len(loads) == 2
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[2], found[3])
    assert not np.array_equal(found[0], found[2])


def test_weights_beside_another_folder_s_configuration(models, tmp_path, loads):
    folder = shutil.copytree(models("open_clip"), tmp_path / "clip")
    weights = tmp_path / "elsewhere.safetensors"
    shutil.move(folder / "open_clip_model.safetensors", weights)
    config = {"task": "embed", "encoders": {"image": {"model": f"open_clip:{folder}", "weights": str(weights)}}}
    first = embedding(config)[0]
    assert np.array_equal(first, embedding(config)[0])
    about = folder / "open_clip_config.json"
    told = json.loads(about.read_text())
    told["preprocess_cfg"]["mean"] = [0.1, 0.2, 0.3]
    about.write_text(json.dumps(told))
    assert not np.array_equal(first, embedding(config)[0])
    assert len(loads) == 2


def test_a_folder_that_cannot_be_used_costs_nothing(bert, monkeypatch, cache):
    (cache / "captured").mkdir(parents=True)
    (cache / "captured").chmod(0o755)
    monkeypatch.setattr(recorded, "written", None)  # nobody asks for it
    config = {"task": "embed", "encoders": {"text": {"model": f"hf:{bert}"}}}
    assert np.array_equal(embedding(config)[0], embedding(config)[0])


def test_what_cannot_be_recorded_is_loaded_every_time(models, loads, cache):
    config = {"task": "embed", "encoders": {"text": {"model": f"open_clip:{models('open_clip')}"}}}  # Python's tokens
    first, again = embedding(config), embedding(config)
    assert len(loads) == 2
    assert np.array_equal(first[0], again[0])
    (record,) = (cache / "captured").glob("*.encoder")
    assert record.stat().st_size == 32  # the hash of nothing: it is not tried again


def test_weights_in_another_number_type_are_read_where_they_are(bert, tmp_path):
    halves = {name: tensor.half() for name, tensor in load_file(bert / "model.safetensors").items()}
    save_file(halves, bert / "model.safetensors", metadata={"format": "pt"})
    encoder = load(f"hf:{bert}", "text")
    what = asked(f"hf:{bert}", "text", base=tmp_path)
    content = recorded.written(encoder, what, None, time.time_ns())
    assert len(content) < (bert / "model.safetensors").stat().st_size / 2
    again = recorded.read(content, what, lambda: encoder)
    assert again is not None
    own, read = dict(encoder.module.named_parameters()), dict(again.module.named_parameters())
    assert list(own) == list(read)
    assert all(torch.equal(own[name], read[name]) for name in own)


def test_a_module_that_is_nobodys_file_is_not_recorded(bert, monkeypatch, tmp_path):
    encoder, what = load(f"hf:{bert}", "text"), asked(f"hf:{bert}", "text", base=tmp_path)
    monkeypatch.setattr(recorded, "_OWN_BYTES", 1000)
    with torch.no_grad():
        encoder.module.transformer.embeddings.word_embeddings.weight.mul_(2)
    with pytest.raises(recorded.Unrecordable, match="not those of its files"):
        recorded.written(encoder, what, None, time.time_ns())


AWKWARD = [*hub.TEXTS, " ", "[CLS] [SEP] [PAD]", "<s>x</s>", "a" * 3000, "Ａ ﬁ é\u0301", "\u200d\x00\ufeff", "İ ẞ"]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("family", ["bert", "mpnet", "roberta", "clip", "siglip", "clap", "minilm"])
def test_tokens_are_those_of_the_tokeniser_itself(models, family, split):
    from transformers import AutoTokenizer

    folder = hub.minilm() if family == "minilm" else models(family)
    reference = AutoTokenizer.from_pretrained(folder, split_special_tokens=split)
    core = Tokens.of(AutoTokenizer.from_pretrained(folder, split_special_tokens=split), 12)
    assert core is not None
    for tokens in (core, Tokens.read(core.written()), pickle.loads(pickle.dumps(core))):
        for text in AWKWARD:
            got = Tokenise(tokens, 12, masked=True)(text)
            want = reference(text, padding="max_length", truncation=True, max_length=12, return_attention_mask=True)
            assert got["input_ids"].tolist() == want["input_ids"]
            assert got["attention_mask"].tolist() == want["attention_mask"]
