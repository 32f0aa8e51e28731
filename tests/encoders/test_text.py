"""Text encoders against the reference libraries on the same weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from mmpipe.encoders import EncoderError, load
from mmpipe.encoders.text import Pool, Tokens

PLAIN = ("bert", "distilbert", "electra", "albert", "roberta", "xlm-roberta", "camembert", "mpnet")


def _mean(model, tokenizer, texts):
    encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt", max_length=32)
    with torch.inference_mode():
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        states = model(**inputs).last_hidden_state
    mask = encoded["attention_mask"][..., None].float()
    return (states * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_folder_is_the_masked_mean(name, models, kit):
    from transformers import AutoModel, AutoTokenizer

    folder = models(name)
    encoder = load(f"hf:{folder}", "text", max_tokens=32)
    reference, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = kit.texts(32)
    whole = kit.batch(encoder, texts)
    assert whole["input_ids"].shape == (32, 32)
    for rows in kit.BATCHES:
        ours = kit.run(encoder.module, {key: value[:rows] for key, value in whole.items()})
        kit.agree(ours, _mean(reference, tokenizer, texts[:rows]), name)
    kit.exports(encoder, texts, name)
    assert encoder.mask == "attention_mask"
    assert any("mean" in note for note in encoder.notes)
    assert (encoder.layers is None) == (name == "albert")  # its layers share one set of weights
    if encoder.layers:
        assert len(encoder.module.get_submodule(encoder.layers)) == 3


def test_minilm_is_what_sentence_transformers_says(minilm_folder, kit):
    reference = pytest.importorskip("sentence_transformers").SentenceTransformer(str(minilm_folder), device="cpu")
    encoder = load(str(minilm_folder), "text")
    assert (encoder.dim, encoder.preprocessing["max_tokens"]) == (384, 256)
    short = load(f"hf:{minilm_folder}", "text", max_tokens=64)
    texts = kit.texts(32)
    for rows in kit.BATCHES:
        expected = reference.encode(texts[:rows], convert_to_tensor=True, batch_size=rows)
        if rows < 32:
            kit.agree(kit.run(encoder.module, kit.batch(encoder, texts[:rows])), expected, "MiniLM 256")
        fits = [i for i, text in enumerate(texts[:rows]) if len(text) < 200]
        ours = kit.run(short.module, kit.batch(short, texts[:rows]))
        kit.agree(ours[fits], expected[fits], "MiniLM 64")
    kit.exports(short, texts, "MiniLM")
    assert torch.equal(short.prompts(texts[:3]), kit.run(short.module, kit.batch(short, texts[:3])))


@pytest.fixture
def sentence_folder(models, tmp_path):
    """bert with Pooling (two modes), Dense and Normalize, written by sentence-transformers itself."""
    st = pytest.importorskip("sentence_transformers")
    modules = st.sentence_transformer.modules if hasattr(st, "sentence_transformer") else st.models
    torch.manual_seed(1)
    chain = [
        modules.Transformer(str(models("bert")), max_seq_length=20),
        modules.Pooling(32, pooling_mode=("max", "cls")),
        modules.Dense(64, 10),
        modules.Normalize(),
    ]
    reference = st.SentenceTransformer(modules=chain, device="cpu")
    reference.save(str(tmp_path / "st"))
    return tmp_path / "st", reference


def test_sentence_transformers_chain(sentence_folder, kit):
    folder, reference = sentence_folder
    encoder = load(f"hf:{folder}", "text")
    assert encoder.dim == 10
    texts = kit.texts(32)
    kit.agree(
        kit.run(encoder.module, kit.batch(encoder, texts)), reference.encode(texts, convert_to_tensor=True), "chain"
    )
    kit.exports(encoder, texts, "chain")


def test_default_prompt_is_prefixed(sentence_folder, kit):
    folder, reference = sentence_folder
    path = folder / "config_sentence_transformers.json"
    config = json.loads(path.read_text()) | {"prompts": {"query": "old bag "}, "default_prompt_name": "query"}
    path.write_text(json.dumps(config))
    encoder = load(f"hf:{folder}", "text")
    ours = kit.run(encoder.module, kit.batch(encoder, ["red shoe"]))
    kit.agree(ours, reference.encode(["old bag red shoe"], convert_to_tensor=True), "prefixed")


@pytest.mark.parametrize("mode", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_every_pooling_is_sentence_transformers(mode, kit):
    st = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    states = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1] + [0] * 6])
    features = {"token_embeddings": states.clone(), "attention_mask": mask}
    expected = st.Pooling(5, pooling_mode=mode)(features)["sentence_embedding"]
    kit.agree(Pool([mode])(states, mask), expected, mode)
    noise = states.masked_fill(mask[..., None] == 0, 1e4)
    assert torch.equal(Pool([mode])(noise, mask), Pool([mode])(states, mask)), "padding was read"


@pytest.mark.parametrize("name", ["clip", "clap", "siglip"])
def test_paired_text_towers(name, models, kit):
    import transformers

    folder = models(name)
    cls = {"clip": "CLIPTextModelWithProjection", "clap": "ClapTextModelWithProjection", "siglip": "SiglipTextModel"}[
        name
    ]
    reference = getattr(transformers, cls).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = load(f"hf:{folder}", "text")
    texts = kit.texts(32)
    for rows in kit.BATCHES:
        padding = "max_length" if name == "siglip" else True
        length = encoder.preprocessing["max_tokens"]
        encoded = tokenizer(texts[:rows], padding=padding, truncation=True, max_length=length, return_tensors="pt")
        inputs = {"input_ids": encoded["input_ids"]}
        if name != "siglip":
            inputs["attention_mask"] = encoded["attention_mask"]
        with torch.inference_mode():
            out = reference(**inputs)
        expected = out.pooler_output if name == "siglip" else out.text_embeds
        if name == "clap":  # the reference class normalises here, and the pipeline does later
            kit.agree(
                torch.nn.functional.normalize(encoder.prompts(texts[:rows])),
                torch.nn.functional.normalize(expected),
                name,
            )
        else:
            kit.agree(encoder.prompts(texts[:rows]), expected, name)
    kit.exports(encoder, texts, name)
    assert encoder.logit_scale is not None
    assert encoder.logit_scale > 1


def test_max_tokens_is_checked(models):
    folder = models("roberta")
    assert load(f"hf:{folder}", "text", max_tokens=64).preprocessing["max_tokens"] == 64
    with pytest.raises(EncoderError, match="max_tokens is 65; this model takes 3 to 64"):
        load(f"hf:{folder}", "text", max_tokens=65)


def test_a_row_depends_on_its_text_alone(minilm_folder, kit):
    encoder = load(f"hf:{minilm_folder}", "text", max_tokens=32)
    texts = kit.texts(8)
    first = kit.batch(encoder, texts)
    again = kit.batch(encoder, texts[::-1])
    assert torch.equal(first["input_ids"], again["input_ids"].flip(0))
    assert torch.equal(kit.run(encoder.module, first)[2], kit.run(encoder.module, again)[5])


LONG = {
    "words": lambda texts: " ".join(texts * 4000),
    "one word": lambda texts: "a" * 100_000,
    "a long word among others": lambda texts: (
        "the " * 28 + "a" * 1500 + " end" * 20_000
    ),  # cut, it is no longer unknown
    "spaces first": lambda texts: " " * 50_000 + " ".join(texts * 1000),
    "spaces last": lambda texts: texts[0] + " " * 50_000,
    "marks": lambda texts: "a,b;" * 20_000,
    "not latin": lambda texts: "犬が好き。Straße ÄÖ 😀 é" * 3000,
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("name", ["minilm", "clip", "xlm-roberta"])
def test_a_long_text_is_tokenised_as_far_as_it_is_read(name, kind, models, minilm_folder, kit):
    folder = minilm_folder if name == "minilm" else models(name)
    prepare = load(f"hf:{folder}", "text", max_tokens=32).host
    text, given = LONG[kind](kit.texts(8)), []

    class Seen(Tokens):
        def __call__(self, text):
            given.append(len(text))
            return super().__call__(text)

    seen = dataclasses.replace(prepare, tokens=Seen(prepare.tokens._core))(text)
    assert seen["input_ids"].tolist() == prepare.tokens(text)[0]
    if kind in ("words", "marks", "not latin"):
        assert sum(given) <= 10_000 < len(text)


def test_a_tokeniser_that_reads_the_end_gets_the_whole_text(minilm_folder):
    prepare = load(f"hf:{minilm_folder}", "text", max_tokens=32).host
    core = prepare.tokens._core
    core.enable_truncation(32, direction="left")
    text = "one " * 3000 + "last words"
    assert prepare(text)["input_ids"].tolist() == core.encode(text).ids


def test_what_is_not_supported_is_said(models, minilm_folder, tmp_path):
    with pytest.raises(EncoderError, match="no text encoder for model_type 'vit'"):
        load(f"hf:{models('vit')}", "text")
    folder = tmp_path / "copy"
    shutil.copytree(minilm_folder, folder)
    (folder / "modules.json").write_text(
        json.dumps([{"type": "x.Transformer", "path": ""}, {"type": "x.WordWeights", "path": "1"}])
    )
    with pytest.raises(EncoderError, match=r"modules\.json lists Transformer, WordWeights"):
        load(str(folder), "text")
    with pytest.raises(EncoderError, match="takes a str, not a int"):
        load(str(minilm_folder), "text", max_tokens=8).prepare(3)


def test_files_are_named_weights_first(minilm_folder):
    files = load(str(minilm_folder), "text", max_tokens=8).files
    assert Path(files[0]).name == "model.safetensors"
    assert all(Path(file).is_file() for file in files)
