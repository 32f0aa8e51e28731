"""The configuration: what it accepts, and that whatever it refuses is said with file, line, key and remedy."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.configurations import EXAMPLE, IMAGE, START, START2, refused, written

from mmpipe.config import Config, json_schema, load, packaged_names, parse_model
from mmpipe.config.reference import reference
from mmpipe.config.values import format_size, parse_share, parse_size
from mmpipe.errors import ConfigError


def test_every_key_of_the_example(tmp_path: Path) -> None:
    config = load(written(tmp_path, EXAMPLE))
    assert config.all_labels == ("shirt", "bag", "sandal")
    assert config.modalities == ("image", "text", "audio")
    assert [exit_.name for exit_ in config.fusion.exits] == ["image", "image+text"]
    assert config.encoders["audio"].max_seconds == 10.0
    assert config.runtime.cache_limit == 10_000_000_000
    assert config.runtime.memory_limit == "auto"
    assert config.input.max_failed == 0.05
    assert config.output_folder == Path("out")
    assert config.resolve("media/") == tmp_path / "media"
    assert config.source.name == "shop"
    with pytest.raises(Exception, match="frozen"):
        config.task = "embed"  # type: ignore[misc]


def test_an_audit_and_a_second_look(tmp_path: Path) -> None:
    text = EXAMPLE.replace("share: 0%", "share: 2%").replace("deliberate: null", "deliberate: {views: 6}")
    fusion = load(written(tmp_path, text)).fusion
    assert fusion.audit is not None
    assert (fusion.audit.share, fusion.audit.on_drift) == (0.02, "warn")
    assert fusion.deliberate is not None
    assert (fusion.deliberate.below, fusion.deliberate.views) == (0.8, 6)


@pytest.mark.parametrize("name", ["clip_clap", "embed", "custom"])
def test_packaged_configurations(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(name)
    assert name in packaged_names()
    assert config.output_folder == Path("out", name)
    assert (config.source.packaged, config.source.name) == (True, name)
    assert config.source.file == config.resolve(f"{name}.yaml")


def test_a_file_wins_over_a_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embed").mkdir()
    assert load("embed").source.packaged  # a folder is no configuration
    (tmp_path / "embed").rmdir()
    written(tmp_path, START, "embed")
    assert load("embed").all_labels == ("a", "b")
    error = refused("embd")
    assert "did you mean embed" in error.hint
    assert "clip_clap" in error.hint
    assert refused("no.yaml").message == "no such file"


def test_what_is_no_text_file(tmp_path: Path) -> None:
    error = refused(written(tmp_path, b"task: embed\nlabels: [caf\xe9]\n"))
    assert error.where.endswith("shop.yaml:2")
    assert "UTF-8" in error.message
    assert "1 MB" in refused(written(tmp_path, b"#" * 1_000_001)).message
    assert "folder" in refused(tmp_path).message
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert "aliases expand" in refused(written(tmp_path, bomb)).message
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "regular" in refused(tmp_path / "pipe.yaml").message
    assert load(written(tmp_path, b"\xef\xbb\xbf" + START.encode())).all_labels == ("a", "b")


def test_merge_keys_keep_the_lines_of_what_stands_there(tmp_path: Path) -> None:
    text = f"{START2}text: &t {{model: a/b, max_tokens: 8}}\n  image:\n    <<: *t\n    max_tokens: null\n"
    config = load(written(tmp_path, text))
    assert config.encoders["image"].model == "a/b"
    assert config.encoders["image"].max_tokens is None
    error = refused(written(tmp_path, text.replace("    max_tokens: null\n", "")))
    assert (error.path, error.where[-2:]) == ("encoders.image.max_tokens", ":3")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("l.txt", "a\n\n b \n", None),
        ("l.txt", "\ufeffa\nb\n", None),
        ("l.json", '["a", "b"]', None),
        ("l.yaml", "- a\n- b\n", None),
        ("l.txt", "a\n", "at least two"),
        ("l.txt", "a\nb\na\n", "twice"),
        ("l.json", "[1, 2]", "quote"),
        ("l.json", '["a",', "not JSON (line 1)"),
        ("l.yaml", "a: b", "a list"),
        ("l.yaml", "- a\n- [", "line 2"),
        ("l.yaml", "- a\n- no\n", "false"),
    ],
)
def test_labels_file(name: str, content: str, word: str | None, tmp_path: Path) -> None:
    written(tmp_path, content, name)
    file = written(tmp_path, f"{IMAGE}labels_file: {name}\n")
    if word is None:
        assert load(file).all_labels == ("a", "b")
    else:
        error = refused(file)
        assert (error.path, error.where) == ("labels_file", f"{file}:3")
        assert word in f"{error.message}\n{error.hint}"


def test_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "minilm").mkdir()
    file = written(tmp_path / "in", EXAMPLE)
    given_ = [
        "fusion.exits.0.threshold=0.5",
        "input.folder=pics",
        "labels=[x, y]",
        "runtime={cache: off, memory_limit: 1GiB}",
    ]
    config = load(file, overrides=[*given_, "encoders.text.model=hf:./minilm", "input.limits.audio_minutes=1"])
    assert config.fusion.exits[0].threshold == 0.5
    assert config.all_labels == ("x", "y")
    assert (config.runtime.cache, config.runtime.memory_limit) == ("off", 2**30)
    assert config.resolve(str(config.input.folder)) == tmp_path / "here" / "pics"
    assert config.encoders["text"].id.path == str(tmp_path / "here" / "minilm")
    assert config.error("fusion.exits.0.threshold", "no").where == "--set"
    assert config.error("fusion.exits.1.threshold", "no").where == f"{file}:14"
    assert config.error("runtime.memory_limit", "no").where == "--set"


@pytest.mark.parametrize(
    ("override", "path", "word"),
    [
        ("fusion.exits.0.threshold=9", "fusion.exits.0.threshold", "0 to 1"),
        ("fusion.exits.7.threshold=1", "fusion.exits", "count from 0"),
        ("fusion.exits.x.threshold=1", "fusion.exits", "list of 2"),
        ("task.a=1", "task", "'classify'"),
        ("fusion.heads=linear", "fusion.heads", "head?"),
        ("labels=[a, no]", "labels.1", 'quote it: "no"'),
        ("labels=[a", "", "not valid YAML"),
        ("fusion=3", "fusion", "got 3"),
        ("labels", "", "KEY=VALUE"),
        ("=3", "", "KEY=VALUE"),
        ("a..b=3", "", "KEY=VALUE"),
    ],
)
def test_wrong_overrides(override: str, path: str, word: str, tmp_path: Path) -> None:
    error = refused(written(tmp_path, EXAMPLE), overrides=[override])
    assert (error.where, error.path) == ("--set", path)
    assert word in f"{error.message}\n{error.hint}"


def test_a_mapping_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given_ = {"labels": ("a", "b"), "encoders": {"image": {"model": "a/b"}}, "output": {"folder": Path("out")}}
    config = load(given_)
    assert config.output_folder == Path("out")
    assert config.resolve("x") == tmp_path / "x"
    error = refused({**given_, "labels": ["a", False]})
    assert (error.where, error.path) == ("", "labels.1")
    assert "not text" in refused({**given_, 3: 4}).message
    assert refused({**given_, "encoders": {"image": {"model": object()}}}).path == "encoders.image.model"
    endless: dict[str, Any] = {}
    endless["a"] = endless
    assert "deeply" in refused(endless).message


@pytest.mark.parametrize(
    ("text", "kind", "name", "revision", "path"),
    [
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "open_clip", "ViT-B-32", "laion2b_s34b_b79k", None),
        ("open_clip:RN50", "open_clip", "RN50", None, None),
        ("open_clip:RN50/./w.safetensors", "open_clip", "RN50", "./w.safetensors", "./w.safetensors"),
        ("open_clip:./folder", "open_clip", "./folder", None, "./folder"),
        ("open_clip:hf-hub:org/name", "open_clip", "hf-hub:org/name", None, None),
        ("hf-hub:org/name", "open_clip", "hf-hub:org/name", None, None),
        ("hf:org/name@v1.0", "hf", "org/name", "v1.0", None),
        ("org/name@main", "hf", "org/name", "main", None),
        ("hf:bert-base-uncased", "hf", "bert-base-uncased", None, None),
        ("hf:/abs/path", "hf", "/abs/path", None, "/abs/path"),
        ("hf:./models/a@b", "hf", "./models/a@b", None, "./models/a@b"),
        ("timm:vit_small_patch16_224.augreg", "timm", "vit_small_patch16_224.augreg", None, None),
        ("tiny:photo", "tiny", "photo", None, None),
        ("my.parts:Encoder", "own", "my.parts:Encoder", None, None),
    ],
)
def test_model_ids(text: str, kind: str, name: str, revision: str | None, path: str | None) -> None:
    model = parse_model(text)
    assert (model.kind, model.name, model.revision, model.path) == (kind, name, revision, path)


@given(st.integers(min_value=1, max_value=10**14))
def test_sizes_survive_being_written(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


def test_sizes_and_shares() -> None:
    assert [parse_size(text) for text in ("10GB", "512MiB", "1.5 KB", "7B")] == [10**10, 2**29, 1500, 7]
    assert [parse_share(value) for value in ("1%", "0.5 %", 0.01, 0, 1.0)] == [0.01, 0.005, 0.01, 0.0, 1.0]


ENCODERS = st.dictionaries(
    st.sampled_from(["image", "text", "audio"]), st.just({"model": "hf:org/name"}), min_size=1, max_size=3
)
VALID = st.fixed_dictionaries(
    {
        "encoders": ENCODERS,
        "labels": st.lists(st.text("abcä 1", min_size=1).filter(str.strip), min_size=2, unique=True),
    },
    optional={
        "task": st.just("classify"),
        "fusion": st.fixed_dictionaries(
            {}, optional={"confidence": st.sampled_from(["max_probability", "margin", "entropy"]), "audit": st.none()}
        ),
        "runtime": st.fixed_dictionaries(
            {},
            optional={
                "batch_size": st.just("auto") | st.integers(1, 512),
                "memory_limit": st.just("auto") | st.integers(1, 10**12).map(format_size),
                "cache": st.sampled_from(["auto", "on", "off", True, False]),
                "cache_limit": st.integers(1, 10**12).map(format_size),
            },
        ),
        "input": st.fixed_dictionaries(
            {},
            optional={
                "folder": st.text("ab/", min_size=1),
                "pair_by": st.sampled_from(["stem", "folder"]),
                "max_failed": st.floats(0, 1) | st.integers(0, 100).map(lambda number: f"{number}%"),
            },
        ),
        "output": st.fixed_dictionaries({}, optional={"top_k": st.integers(1, 100), "probabilities": st.booleans()}),
    },
)


def dumped(config: Config) -> Any:
    return json.loads(config.model_dump_json(exclude_unset=True))


@given(VALID)
@settings(max_examples=100, deadline=None)
def test_valid_configurations_round_trip(data: dict[str, Any]) -> None:
    config = load(data)
    again = load(dumped(config))
    assert again.model_dump() == config.model_dump()
    assert load(yaml.safe_load(yaml.safe_dump(dumped(config)))).model_dump() == config.model_dump()
    assert load(json.loads(config.model_dump_json())).model_dump() == config.model_dump()


ODD = [
    "",
    "\t",
    ": ",
    "- ",
    "[",
    "}",
    "&a ",
    "*a",
    "<<: ",
    "!!set ",
    "'",
    "no",
    ".nan",
    "1e400",
    "\x00",
    "\udcff",
    '"\\ud800"',
]


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutations_raise_nothing_but_config_errors(tmp_path: Path, data: st.DataObject) -> None:
    text = EXAMPLE
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 12))
        new = data.draw(st.sampled_from(ODD) | st.text(max_size=4))
        text = text[:at] + new + text[at + cut :]
    with contextlib.suppress(ConfigError):
        load(written(tmp_path, text.encode("utf-8", "surrogatepass")))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=3) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
PLACES = """
    task labels labels_file encoders encoders.image encoders.image.model encoders.text.max_tokens fusion fusion.head
    fusion.options fusion.modalities fusion.exits fusion.exits.0 fusion.exits.0.after runtime runtime.batch_size
    runtime.memory_limit runtime.cache input input.folder input.pattern input.keep input.max_failed input.limits output
    output.folder output.top_k unknown
""".split()  # noqa: SIM905


@given(st.sampled_from(PLACES), JUNK)
@settings(max_examples=200, deadline=None)
def test_any_value_anywhere_raises_nothing_but_config_errors(place: str, junk: Any) -> None:
    data = yaml.safe_load(EXAMPLE)
    around: Any = data
    *parts, last = place.split(".")
    for part in parts:
        around = around[int(part)] if isinstance(around, list) else around[part]
    around[int(last) if isinstance(around, list) else last] = junk
    with contextlib.suppress(ConfigError):
        load(data)


def test_schema_knows_every_key_and_the_reference_is_current() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert set(yaml.safe_load(EXAMPLE)) <= set(schema["properties"])
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text("utf-8") == reference(), "write the page anew with what reference() returns"


def test_import_is_light() -> None:
    code = "import sys, mmpipe, mmpipe.config, mmpipe.types; print('torch' in sys.modules, 'numpy' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]


def test_the_custom_parts_are_captured_and_sort_pictures_by_colour() -> None:
    import torch
    from PIL import Image

    from mmpipe import encoders

    config = load("custom")
    own = config.encoders["image"]
    encoder = encoders.load(own.model, "image", options=own.options, base=config.source.folder)
    parts = sys.modules["custom_parts"]
    head = parts.Prototypes({"image": encoder.dim}, list(config.all_labels), **config.fusion.options)
    colours = {
        "red": (220, 30, 10),
        "green": (10, 140, 60),
        "blue": (20, 60, 200),
        "black": (0, 0, 0),
        "white": (255, 250, 255),
    }
    inputs = [encoder.prepare(Image.new("RGB", (70, 50), colours[label])) for label in config.all_labels]
    pixels = torch.stack([each["pixels"] for each in inputs])

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = encoder.module, head

        def forward(self, pixels: torch.Tensor, presence_BM: torch.Tensor) -> Any:
            return self.head({"image": self.encoder(pixels)}, presence_BM)

    present = torch.ones(len(inputs), 1, dtype=torch.bool)
    batch = torch.export.Dim("batch", min=1, max=512)
    exported = torch.export.export(
        Whole().eval(), (pixels, present), dynamic_shapes=({0: batch}, {0: batch}), strict=False
    )
    captured = exported.module(check_guards=False)
    assert captured(pixels, present).argmax(dim=1).tolist() == list(range(len(inputs)))
    assert torch.allclose(captured(pixels[:1], present[:1]), Whole()(pixels, present)[:1], atol=1e-5)
    absent = captured(pixels[:2], torch.tensor([[True], [False]]))
    assert absent[1].unique().numel() == 1
    assert absent[0].unique().numel() > 1


def test_a_key_with_nothing_behind_it(tmp_path: Path) -> None:
    """All of it a comment, say: as if the key did not stand there."""
    sections = "fusion:\nruntime:\n  # batch_size: 8\ninput: {keep: , pattern: , columns: }\noutput: {}\n"
    config = load(
        written(tmp_path, f"task: classify\nlabels: [a, b]\nencoders: {{text: {{model: hf:a/b}}}}\n{sections}")
    )
    assert (config.fusion.exits, config.fusion.head) == ((), "zero_shot")
    assert (config.input.keep, dict(config.input.pattern)) == ((), {})
    config = load(written(tmp_path, EXAMPLE), overrides=["fusion.exits=null", "fusion.modalities=null"])
    assert (config.fusion.exits, dict(config.fusion.modalities)) == ((), {})
    for key in ("labels", "encoders", "encoders.text", "output.top_k", "runtime.batch_size"):
        assert refused(written(tmp_path, EXAMPLE), overrides=[f"{key}=null"]).path == key


def test_a_pattern_replaces_pair_by() -> None:
    config = load("quickstart", overrides=['input.pattern={image: "{id}.jpg"}'])
    assert config.input.pattern == {"image": "{id}.jpg"}


def test_labels_from_json_may_hold_half_a_character(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('["red", "A\\ud83d"]')
    text = "task: classify\nlabels_file: labels.json\nencoders: {text: {model: hf:a/b}}\n"
    error = refused(written(tmp_path, text))
    assert (error.path, "half a character" in str(error)) == ("labels_file", True)


def test_a_calibration_has_exits_of_its_own(tmp_path: Path) -> None:
    """Which probes they need is known when it has been read: the checkpoint may be for them, or missing."""
    for name in ("c.json", "probes.safetensors"):
        (tmp_path / name).touch()
    start = "task: classify\nlabels: [a, b]\nencoders: {text: {model: hf:a/b}}\nfusion:\n  calibration: c.json\n"
    assert load(written(tmp_path, f"{start}  checkpoint: probes.safetensors\n")).fusion.checkpoint
    assert load(written(tmp_path, f"{start}  exits: [{{after: text.layer1, threshold: 0.9}}]\n")).fusion.exits
