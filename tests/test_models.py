"""The whole pipeline on real architectures: small random weights in the hub's own formats, and the real MiniLM."""

from __future__ import annotations

import itertools
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from support import hub
from torch import nn

import mmpipe
from mmpipe import Pipeline
from mmpipe.encoders import load as load_encoder
from mmpipe.fusion.checkpoint import save_checkpoint
from mmpipe.fusion.heads import LinearHead
from mmpipe.graphs.cut import cut, stages_of

RATE = 16000
LABELS = ["red shoe", "old bag", "rain on a tin roof", "dog barks", "sandal"]
PROMPTS = {
    "image": ["a photo of a {}", "a picture of {}"],
    "text": ["{}", "a text about a {}"],
    "audio": ["the sound of a {}"],
}
WEIGHTS = {"image": 1.0, "text": 0.5, "audio": 2.0}
NAMES = tuple(PROMPTS)
EXITS = [{"after": "image", "threshold": 0.3}, {"after": ["image", "text"], "threshold": 0.3}]
COUNT = 20  # samples: two full buckets of 8 and one padded


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return hub.Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def media():
    """Of each modality, COUNT media as Python users give them."""
    return {
        "image": hub.pictures(COUNT),
        "text": [text or "." for text in hub.texts(COUNT)],
        "audio": [(sound, RATE) for sound in hub.sounds(COUNT, RATE, 2.0)],
    }


@pytest.fixture(scope="module")
def samples(media):
    """Every mix of modalities, over and over."""
    mixes = [mix for size in (3, 2, 1) for mix in itertools.combinations(NAMES, size)]
    return [{"id": str(row), **{name: media[name][row] for name in mixes[row % len(mixes)]}} for row in range(COUNT)]


def three(models):
    return {
        "image": hub.section(models, "open_clip"),
        "text": hub.section(models, "minilm"),
        "audio": hub.section(models, "clap"),
    }


def zero_shot(models, exits=(), **sections):
    """As configs/clip_clap.yaml, from local folders."""
    modalities = {name: {"prompts": PROMPTS[name], "weight": WEIGHTS[name]} for name in NAMES}
    made = {
        "labels": LABELS,
        "encoders": three(models),
        "fusion": {"head": "zero_shot", "modalities": modalities, "exits": list(exits)},
        "output": {"probabilities": True, "embeddings": True},
        "runtime": {"batch_size": 8, "dtype": "float32"},
    }
    return {**made, **sections}


@pytest.fixture(scope="module")
def full(models):
    with Pipeline.load(zero_shot(models)) as made:
        yield made


@pytest.fixture(scope="module")
def staged(models):
    with Pipeline.load(zero_shot(models, EXITS)) as made:
        yield made


# --- against the modules, one by one ----------------------------------------------------------------------------------


def encoded(section, modality, media):
    """What the encoder's own module says of media, and the encoder."""
    options = {key: value for key, value in section.items() if key != "model"}
    encoder = load_encoder(section["model"], modality, **options)
    return encoder, hub.run(encoder.module, hub.batch(encoder, media))


@pytest.fixture(scope="module")
def reference(models, media):
    """Embeddings of every medium, and each modality's log probabilities by the formula: modality → [COUNT, …]."""
    embeddings, log_p = {}, {}
    for name, section in three(models).items():
        encoder, embeddings[name] = encoded(section, name, media[name])
        per_template = []
        for template in PROMPTS[name]:
            towers = encoder.prompts([template.replace("{}", label) for label in LABELS])
            per_template.append(towers / towers.norm(dim=-1, keepdim=True))
        mean = sum(per_template) / len(per_template)
        prototypes = mean / mean.norm(dim=-1, keepdim=True)
        unit = embeddings[name] / embeddings[name].norm(dim=-1, keepdim=True)
        scale = 20.0 if encoder.logit_scale is None else encoder.logit_scale
        log_p[name] = torch.log_softmax(scale * (unit @ prototypes.T), dim=-1)
    return embeddings, log_p


def answer(log_p, row, names):
    """The weighted mean over present modalities, as probabilities."""
    total = sum(WEIGHTS[name] * log_p[name][row] for name in names)
    return torch.softmax(total / sum(WEIGHTS[name] for name in names), dim=-1)


def close(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return bool(np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max())


def test_zero_shot_is_the_modules_one_by_one_and_the_formula(full, samples, reference):
    for row, prediction in enumerate(full.predict(samples)):
        want = answer(reference[1], row, prediction.present)
        assert prediction.status == "ok"
        assert prediction.used == prediction.present == tuple(name for name in NAMES if name in samples[row])
        assert close(prediction.probabilities, want)
        assert prediction.label == LABELS[int(want.argmax())]


def test_every_subset_of_modalities_answers(full, staged, media, reference):
    subsets = [names for size in (1, 2, 3) for names in itertools.combinations(NAMES, size)]
    given = [{name: media[name][3] for name in names} for names in subsets]
    for names, late, early in zip(subsets, full.predict(given), staged.predict(given), strict=True):
        assert late.status == early.status == "ok"
        assert late.used == names
        assert close(late.probabilities, answer(reference[1], 3, names))
        assert close(early.probabilities, answer(reference[1], 3, early.used))


def test_exits_answer_by_what_they_saw_and_open_nothing_else(staged, samples, reference):
    predictions = staged.predict(samples)
    for row, prediction in enumerate(predictions):
        seen = prediction.answered_by.split("+") if prediction.answered_by != "all" else list(NAMES)
        assert prediction.used == tuple(name for name in prediction.present if name in seen)
        want = answer(reference[1], row, prediction.used)
        assert close(prediction.probabilities, want)
        threshold_met = float(want.max()) >= 0.3
        assert prediction.answered_by == "all" or threshold_met
    assert len({prediction.answered_by for prediction in predictions}) == 3  # else this tests too little


def test_embed_is_the_modules_normalised(models, samples, reference):
    with Pipeline.load(
        {"task": "embed", "encoders": three(models), "runtime": {"batch_size": 8, "dtype": "float32"}}
    ) as made:
        predictions, rows = made.predict(samples), made.embed(samples)
    for row, (prediction, together) in enumerate(zip(predictions, rows, strict=True)):
        parts = []
        for name in NAMES:
            raw = reference[0][name][row]
            present = name in samples[row]
            parts.append((raw / raw.norm()).numpy() if present else np.zeros(len(raw), np.float32))
            assert (name in prediction.embeddings) == present
            if present:
                assert close(prediction.embeddings[name], parts[-1])
                assert np.linalg.norm(prediction.embeddings[name]) == pytest.approx(1.0, abs=1e-6)
        assert close(prediction.embedding, np.concatenate(parts))
        assert np.array_equal(prediction.embedding, together)


# --- the numerics contract: within a plan, a row's bits are its sample's ----------------------------------------------


def bits(predictions):
    return {p.id: (p.label, p.probabilities, p.answered_by, b"".join(v.tobytes() for v in p.embeddings.values()))
            for p in predictions}  # fmt: skip


def assert_same_alone_and_in_any_order(pipeline, samples):
    want = bits(pipeline.predict(samples))
    shuffled = [samples[i] for i in torch.randperm(len(samples), generator=torch.Generator().manual_seed(1))]
    assert bits(pipeline.predict(shuffled)) == want
    assert bits(pipeline.predict(samples[3:8])) == {sample["id"]: want[sample["id"]] for sample in samples[3:8]}
    for sample in samples[:3]:
        assert bits(pipeline.predict([sample])) == {sample["id"]: want[sample["id"]]}


def test_a_row_s_bits_with_any_mix_of_modalities(staged, samples):
    """Alone, in any batch, in any order, beside samples that lack what it has."""
    assert_same_alone_and_in_any_order(staged, samples)


def test_exits_that_never_fire_are_the_full_pipeline_at_any_size_of_bucket(models, full, samples):
    never = [{**exit_, "threshold": 1.0} for exit_ in EXITS]
    with Pipeline.load(zero_shot(models, never, runtime={"batch_size": 30, "dtype": "float32"})) as made:
        assert made.resolved.batch_size == 32
        got = made.predict(samples)
        assert_same_alone_and_in_any_order(made, samples)
    assert {prediction.answered_by for prediction in got} == {"all"}
    for one, other in zip(got, full.predict(samples), strict=True):
        assert close(one.probabilities, other.probabilities)


def test_a_bucket_of_one(models, full, samples):
    with Pipeline.load(zero_shot(models, runtime={"batch_size": 1, "dtype": "float32"})) as made:
        assert made.resolved.batch_size == 1
        for one, other in zip(made.predict(samples[:8]), full.predict(samples[:8]), strict=True):
            assert close(one.probabilities, other.probabilities)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", hub.FAMILIES)
def test_a_row_s_bits_in_every_family(models, media, family, threads):
    """Segments as they run, at several sizes of bucket, on one thread and two."""
    modality, section = hub.FAMILIES[family], hub.section(models, family)
    with Pipeline.load({"task": "embed", "encoders": {modality: section}}) as pipeline:
        prepare = pipeline.built.preparations[modality].prepare
        made = cut(pipeline.graph)
    (segment,) = made.plan.segments
    prepared = [prepare(media[modality][row % COUNT]) for row in range(32)]
    inputs = [torch.stack([row[name.split(".")[1]] for row in prepared]) for name in segment.inputs]
    generator = torch.Generator().manual_seed(1)
    for count, rows in ((1, 8), (2, 4), (2, 32)):
        threads(count)
        with torch.inference_mode():
            want = made.modules[segment.name](*(rows_of[:rows] for rows_of in inputs))[0]
            for order in (
                torch.arange(rows).roll(1),
                torch.randperm(rows, generator=generator),
                torch.zeros(rows).long(),
            ):
                got = made.modules[segment.name](*(rows_of[:rows][order] for rows_of in inputs))[0]
                assert torch.equal(got, want[order]), (count, rows, order)


# --- exits inside encoders --------------------------------------------------------------------------------------------

# place → features of the layer's state, and what it is, by running the encoder's own module
DEPTHS = {
    "image.layer2": "vit",
    "text.layer1": "bert",
    "audio.layer1": "clap",
    "audio.layer2": "whisper",
}


def pooled_state(encoder, media, layer):
    """The state after a layer of the module itself, pooled as a probe pools it."""
    seen = []
    module = encoder.module.get_submodule(encoder.layers)[layer - 1]
    hook = module.register_forward_hook(lambda layer, given, out: seen.append(out if torch.is_tensor(out) else out[0]))
    inputs = hub.batch(encoder, media)
    hub.run(encoder.module, inputs)
    hook.remove()
    state = seen[0].clone()
    if encoder.mask is None:
        return state.flatten(1, -2).mean(1)
    mask = inputs[encoder.mask][..., None].float()
    return (state * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("place", DEPTHS)
def test_a_depth_exit_is_the_probe_on_the_module_s_state(models, media, place, tmp_path):
    modality, layer = place.split(".layer")
    section = hub.section(models, DEPTHS[place])
    encoder, embeddings = encoded(section, modality, media[modality])
    state = pooled_state(encoder, media[modality], int(layer))
    torch.manual_seed(2)
    weight, bias = 3 * torch.randn(len(LABELS), state.shape[1]), torch.randn(len(LABELS))
    dims = {modality: encoder.dim}
    head = LinearHead(dims, LABELS)
    file = tmp_path / "head.safetensors"
    save_checkpoint(
        file, head, kind="linear", labels=LABELS, dims=dims, probes={f"{place}.weight": weight, f"{place}.bias": bias}
    )
    early = torch.softmax(nn.functional.linear(state, weight, bias), dim=-1)
    with torch.no_grad():
        late = head({modality: embeddings}, torch.ones(COUNT, 1, dtype=torch.bool)).softmax(-1)
    threshold = float(early.amax(1).sort().values[COUNT // 2 - 1 : COUNT // 2 + 1].mean())  # half of them leave

    def configured(**fusion):
        return {
            "labels": LABELS,
            "encoders": {modality: section},
            "fusion": {"head": "linear", "checkpoint": str(file), **fusion},
            "output": {"probabilities": True},
            "runtime": {"batch_size": 8, "dtype": "float32"},
        }

    samples = [{"id": str(row), modality: medium} for row, medium in enumerate(media[modality])]
    with Pipeline.load(configured(exits=[{"after": place, "threshold": threshold}])) as made:
        predictions = made.predict(samples)
        assert_cut_computes_everything_once(made)
    assert Counter(prediction.answered_by for prediction in predictions) == {place: COUNT // 2, "all": COUNT // 2}
    for row, prediction in enumerate(predictions):
        assert close(prediction.probabilities, (early if prediction.answered_by == place else late)[row])


def assert_cut_computes_everything_once(pipeline):
    """Every operation of the fused graph is in one segment; what is carried has one row per sample."""
    made, stage = cut(pipeline.graph), stages_of(pipeline.graph.graph)
    operations = Counter(node.name for node in stage if node.op == "call_function")
    in_segments = sum(segment.nodes for segment in made.plan.segments)
    assert in_segments == sum(operations.values())
    names = Counter(
        node.name for module in made.modules.values() for node in module.graph.nodes if node.op == "call_function"
    )
    assert all(names[name] == 1 for name in operations), [name for name in operations if names[name] != 1]
    carried = [name for segment in made.plan.segments for name in segment.reads]
    values = {node.name: node.meta["mmpipe"] for node in pipeline.graph.graph.nodes}
    assert carried
    assert all(values[name].batch_leads for name in carried)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path):
    """What loading a YAML of these lines raises: the error, with "broken.yaml:LINE" of the key that is to blame."""

    def load(kind, *lines):
        path = tmp_path / "broken.yaml"
        path.write_text("\n".join(["labels: [a, b]", "encoders:", *lines]), encoding="utf-8")
        with pytest.raises(kind) as caught:
            Pipeline.load(path)
        assert type(caught.value) is kind
        return str(caught.value)

    return load


def says(message, *parts):
    for part in parts:
        assert part in message
    return True


def test_a_missing_folder(refused):
    message = refused(mmpipe.ConfigError, "  image: {model: 'open_clip:./nowhere'}")
    assert says(message, "broken.yaml:3", "encoders.image.model", "./nowhere", "does not exist")


@pytest.mark.parametrize("name", ["clip", "open_clip"])
def test_the_weights_of_another_model(refused, models, name):
    model = hub.section(models, name)["model"]
    line = f"  image: {{model: '{model}', weights: '{models('vit') / 'model.safetensors'}'}}"
    assert says(refused(mmpipe.ConfigError, line), "broken.yaml:3", "encoders.image.model", "logit_scale", "model")


def test_a_model_of_another_modality(refused, models):
    message = refused(mmpipe.ConfigError, f"  audio: {{model: 'hf:{models('bert')}'}}")
    assert says(message, "broken.yaml:3", "encoders.audio.model", "no audio encoder", "'bert'", "clap, whisper")


@pytest.mark.parametrize(("name", "modality"), [("whisper", "audio"), ("vit", "image")])
def test_zero_shot_needs_a_text_side(refused, models, name, modality):
    message = refused(
        mmpipe.ConfigError, f"  {modality}: {{model: 'hf:{models(name)}'}}", "fusion:", "  head: zero_shot"
    )
    assert says(message, "broken.yaml:5", "fusion.head", modality, "no text side", "head: linear")


def test_one_label_is_no_choice(models):
    with pytest.raises(mmpipe.ConfigError, match="at least 2"):
        Pipeline.load({"labels": ["a"], "encoders": {"image": hub.section(models, "clip")}})


def test_a_package_that_is_not_installed(refused, models, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = refused(mmpipe.MissingExtraError, f"  image: {{model: 'hf:{models('clip')}'}}")
    assert says(message, "broken.yaml:3", "pip install 'mmpipe[hf]'")


@pytest.mark.parametrize(
    ("kind", "after", "parts"),
    [
        (
            mmpipe.ConfigError,
            "image.layer2",
            ("broken.yaml:8", "exits.image.layer2.weight", "image.layer1, image.layer9"),
        ),
        (mmpipe.ModelError, "image.layer9", ("broken.yaml:7", "image.layer9", "3 layers")),
        (mmpipe.ModelError, "image.layer1", ("broken.yaml:7", "31 features", "32")),
    ],
    ids=["no probe", "too deep", "too narrow"],
)
def test_an_exit_that_the_encoder_has_not(refused, models, tmp_path, kind, after, parts):
    dims, labels = {"image": 32}, ["a", "b"]
    probes = {"image.layer9.weight": torch.zeros(2, 32), "image.layer1.weight": torch.zeros(2, 31)}
    probes |= {"image.layer9.bias": torch.zeros(2), "image.layer1.bias": torch.zeros(2)}
    head = LinearHead(dims, labels)
    save_checkpoint(tmp_path / "head.safetensors", head, kind="linear", labels=labels, dims=dims, probes=probes)
    message = refused(
        kind,
        f"  image: {{model: 'hf:{models('vit')}'}}",
        "fusion:",
        "  head: linear",
        "  checkpoint: head.safetensors",
        "  exits:",
        f"    - {{after: {after}, threshold: 0.9}}",
    )
    assert says(message, "fusion.exits", *parts)
