"""Model ids, where files are looked for, weights that don't fit, classes of one's own."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpipe import encoders
from mmpipe.encoders import EncoderError, MissingPackage, hub, load, pull, register


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("hf:org/name", ("hf", "org/name", None)),
        ("org/name", ("hf", "org/name", None)),
        ("org/name@v1.2", ("hf", "org/name@v1.2", None)),
        ("open_clip:ViT-B-32/laion2b", ("open_clip", "ViT-B-32/laion2b", None)),
        ("open_clip:ViT-B-32/w.pt", ("open_clip", "ViT-B-32", "w.pt")),
        ("open_clip:hf-hub:org/name", ("open_clip", "hf-hub:org/name", None)),
        ("hf-hub:org/name", ("open_clip", "hf-hub:org/name", None)),
        ("hf:here", ("hf", "here", "here")),
        ("./here", ("hf", "./here", "here")),
        ("tiny:image", ("tiny", "image", None)),
        ("my.package:Thing", ("own", "my.package:Thing", None)),
        ("mine:Thing", ("own", "mine:Thing", None)),
        ("calendar:Calendar", ("own", "calendar:Calendar", None)),
        ("tiny:here", ("tiny", "here", None)),
    ],
)
def test_what_an_id_means(model, expected, tmp_path):
    (tmp_path / "w.pt").touch()
    (tmp_path / "mine.py").touch()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text("{}")
    kind, name, found = expected
    assert hub.parse(model, tmp_path) == (kind, name, None if found is None else tmp_path / found)


@pytest.mark.parametrize("model", ["timm:resnet50", "nothing", "hf:", "", "a b/c"])
def test_an_unknown_id_says_what_is_known(model, tmp_path):
    with pytest.raises(EncoderError, match=r"hf:"):
        hub.parse(model, tmp_path)


def test_kinds_are_registered_once(monkeypatch):
    monkeypatch.setattr(hub, "_factories", dict(hub._factories))
    register("mine", "somewhere:load")
    with pytest.raises(EncoderError, match="'mine' is already registered, for somewhere:load"):
        register("mine", "elsewhere:load")
    assert hub.parse("mine:x", Path()) == ("mine", "x", None)


def test_names():
    assert encoders.__all__ == sorted(encoders.__all__)
    assert MissingPackage("transformers", "hf", "hf:x").args[0].endswith("pip install 'mmpipe[hf]'")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("hf:a/b", "smell"), "no modality 'smell'"),
        (("open_clip:ViT-B-32", "image"), "random weights are never used"),
        (("open_clip:ViT-B-32/nope", "image"), "'nope' is neither a tag nor a local file"),
        (("open_clip:ViT-B-23", "image"), "no architecture 'ViT-B-23'; near it: ViT-B-32"),
        (("hf:./nowhere", "text"), "no such folder"),
    ],
)
def test_errors_say_what_to_do(arguments, match, tmp_path):
    with pytest.raises(EncoderError, match=match):
        load(*arguments, base=tmp_path)


@pytest.mark.parametrize("model", ["hf:nobody/nothing", "nobody/nothing@main", "hf-hub:nobody/nothing"])
def test_offline_and_not_cached(model, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EncoderError, match="is not in the local cache and can't be downloaded") as caught:
        load(model, "image" if "hub" in model else "text")
    assert "mmpipe pull" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_cached_hub_model_loads_offline(monkeypatch, tmp_path, models):
    """The hub's cache layout, written by hand: blobs are left out, snapshots may hold plain files."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--org--small" / "snapshots" / ("a" * 40)
    shutil.copytree(models("bert"), snapshot)
    refs = tmp_path / "models--org--small" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert load("org/small", "text", max_tokens=8).dim == 32
    assert Path(pull("hf:org/small@main", "text")[0]) == snapshot / "model.safetensors"


@pytest.fixture
def folder(models, tmp_path):
    shutil.copytree(models("bert"), tmp_path / "bert")
    return tmp_path / "bert"


def _rewrite(folder, change, name="model.safetensors"):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def test_missing_key_is_refused(folder):
    _rewrite(folder, lambda tensors: tensors.pop("encoder.layer.1.attention.self.query.weight"))
    with pytest.raises(EncoderError, match=r"1 missing \(encoder.layer.1.attention.self.query.weight\)"):
        load(f"hf:{folder}", "text")


def test_wrong_shape_is_refused(folder):
    def cut(tensors):
        tensors["encoder.layer.0.output.dense.weight"] = torch.zeros(32, 32)

    _rewrite(folder, cut)
    with pytest.raises(EncoderError, match=r"1 of another shape \(encoder.layer.0.output.dense.weight\)"):
        load(f"hf:{folder}", "text")


def test_more_layers_than_the_configuration_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(EncoderError, match=r"16 not in the model \(encoder.layer.2"):
        load(f"hf:{folder}", "text")


def test_code_from_the_hub_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(EncoderError, match="auto_map: this model runs Python code"):
        load(f"hf:{folder}", "text")


def test_no_weights_no_model(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="holds no weights"):
        load(f"hf:{folder}", "text")
    (folder / "model.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(EncoderError, match="can't be loaded as BertModel"):
        load(f"hf:{folder}", "text")


def test_a_pickle_of_tensors_loads_and_one_of_code_does_not(folder, models, kit):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    texts = kit.texts(3)
    expected, encoder = load(f"hf:{models('bert')}", "text"), load(f"hf:{folder}", "text")
    assert torch.equal(encoder.prompts(texts), expected.prompts(texts))
    torch.save({"a": Path("not a tensor")}, folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="can't be loaded"):
        load(f"hf:{folder}", "text")


def test_weights_replace_those_of_the_id(folder, models, tmp_path, kit):
    other = tmp_path / "other.safetensors"
    tensors = {key: value + 0.01 for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, other)
    texts = kit.texts(3)
    plain = load(f"hf:{folder}", "text").prompts(texts)
    encoder = load(f"hf:{folder}", "text", weights="other.safetensors", base=tmp_path)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(encoder.prompts(texts), load(f"hf:{folder}", "text").prompts(texts))
    assert not torch.equal(encoder.prompts(texts), plain)
    assert encoder.files[0] == str(other)
    with pytest.raises(EncoderError, match="no such file or folder"):
        load(f"hf:{folder}", "text", weights="missing.safetensors", base=tmp_path)
    tensors.pop("embeddings.LayerNorm.weight")
    save_file(tensors, other)
    with pytest.raises(EncoderError, match=r"1 missing \(embeddings.LayerNorm.weight\)"):
        load(f"hf:{folder}", "text", weights=other)


def test_other_rows_of_half_precision_become_float32(folder):
    _rewrite(folder, lambda tensors: tensors.update({key: value.half() for key, value in tensors.items()}))
    encoder = load(f"hf:{folder}", "text")
    assert {value.dtype for value in encoder.module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop("visual.proj"), "Missing key.*visual.proj"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "Unexpected key.*more"),
        (lambda tensors: tensors.update({"visual.positional_embedding": torch.zeros(50, 32)}), "1 of another shape"),
        (lambda tensors: tensors.update({"visual.proj": torch.zeros(32, 32)}), r"1 of another shape \(visual.proj\)"),
    ],
)
def test_open_clip_weights_that_do_not_fit(change, match, models, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(models("open_clip"), folder)
    _rewrite(folder, change, "open_clip_model.safetensors")
    with pytest.raises(EncoderError, match=match):
        load(f"open_clip:{folder}", "image")


def test_loading_says_nothing_and_leaves_logging_as_it_was(models, capfd):
    from transformers.utils import logging as hf_logging

    folders = models("roberta"), models("open_clip")
    capfd.readouterr()
    load(f"hf:{folders[0]}", "text")
    load(str(folders[1]), "image")
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == 0
    assert hf_logging.is_progress_bar_enabled()


OWN = """
import torch

class Mine:
    modality, dim = "image", 4

    def __init__(self, width=1):
        self.width = width
        self.module = torch.nn.Dropout() if width else 1 / width

    def prepare(self, media):
        return {"x": torch.zeros(self.dim)}
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "my_encoders.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("my_encoders", None)


def test_a_class_of_one_s_own_is_found_beside_the_configuration(own):
    before = list(sys.path)
    encoder = load("my_encoders:Mine", "image", options={"width": 7}, base=own)
    assert (encoder.width, encoder.module.training) == (7, False)
    assert isinstance(encoder, encoders.Encoder)
    assert sys.path == before


def test_two_folders_with_modules_of_one_name(own, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "my_encoders.py").write_text(OWN.replace("4", "40"))
    assert [load("my_encoders:Mine", "image", base=base).dim for base in (own, other, own)] == [4, 40, 4]


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (
            OWN.replace("import torch", "import tortch"),
            r"my_encoders.py:2: ModuleNotFoundError: No module named 'tortch'",
        ),
        (OWN.replace("1):", "1:"), r"my_encoders.py:7: SyntaxError"),
        (OWN + "\n1 / 0", r"my_encoders.py:14: ZeroDivisionError: division by zero"),
        (OWN.replace("def prepare", "def other"), "lacks prepare"),
        (OWN.replace('"image"', '"text"'), "is an encoder for 'text', not for 'image'"),
        (OWN.replace("torch.nn.Dropout()", "3"), "its 'module' is a int"),
        (OWN.replace("Mine", "Yours"), "has no 'Mine'"),
    ],
)
def test_a_broken_class_names_the_place(source, match, own):
    (own / "my_encoders.py").write_text(source)
    with pytest.raises(EncoderError, match=match):
        load("my_encoders:Mine", "image", base=own)


def test_a_constructor_that_fails_names_the_place(own):
    with pytest.raises(EncoderError, match=r"Mine\(width=0\) failed: .*my_encoders.py:9: ZeroDivisionError") as caught:
        load("my_encoders:Mine", "image", options={"width": 0}, base=own)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(EncoderError, match="no module 'no_such', neither installed nor in"):
        load("no_such.thing:Mine", "image", base=own)
    with pytest.raises(EncoderError, match="use options"):
        load("my_encoders:Mine", "image", max_tokens=3, base=own)


def test_what_an_own_class_needs_is_fetched_with_its_options(own):
    (own / "my_encoders.py").write_text(OWN.replace("width=4", "width").replace("width=1", "width"))
    assert hub.pull("my_encoders:Mine", "image", options={"width": 3}, base=own) == []
