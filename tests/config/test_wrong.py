"""Wrong configurations: each is refused with file, line, key and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.configurations import EXITS, IMAGE, START, START2, START3, refused, written

from mmpipe.config import load
from mmpipe.config.check import IMPLEMENTED

# (text, line or None where no line can be known, path, a word of message or remedy)
WRONG: list[tuple[str, int | None, str, str]] = [
    # YAML
    ("labels: [a, b\nencoders: {}\n", 2, "", "not valid YAML"),
    ("task: a: b\n", 1, "", "column 8"),
    (f"{START}fusion:\n\thead: linear\n", 5, "", "spaces"),
    (f"{START}labels: [c, d]\n", 4, "labels", "lines 1 and 4"),
    (f"{START}fusion: {{head: linear, head: linear}}\n", 4, "fusion.head", "keep one"),
    ("- a\n- b\n", 1, "", "task: classify"),
    ("classify\n", 1, "", "task: classify"),
    ("", None, "", "empty"),
    ("# nothing\n---\n", None, "", "empty"),
    (f"{START}---\ntask: embed\n", 4, "", "remove the line ---"),
    (f"{START}no: 1\n", 4, "", 'quote it: "no"'),
    (f"{START}? [a]\n: 1\n", 4, "", "key"),
    (f"{START}output: !!python/object:os.system {{}}\n", 4, "output", "!!python/object:os.system is refused"),
    (f"{START}output: !!set {{a}}\n", 4, "output", "!!set"),
    (f"{START}output: &a [*a]\n", 4, "output.0", "contains itself"),
    (f"{START}output: *nowhere\n", 4, "", "nowhere"),
    (f"{START}output: {'[' * 80}{']' * 80}\n", 4, "output" + ".0" * 49, "too deeply"),
    (f"{START}output: {'[' * 5000}\n", None, "", "too deeply"),
    ("task: \x07\n", 1, "", "U+0007"),
    ("labels: [2024-13-45, b]\n", 1, "labels.0", "quote it"),
    ('task: !!float ""\n', 1, "task", "quote it"),
    ('labels: [!!int "_", b]\n', 1, "labels.0", "quote it"),
    ("labels: [!!bool x, b]\n", 1, "labels.0", "quote it"),
    ("labels: [!!timestamp x, b]\n", 1, "labels.0", "quote it"),
    (f"labels: [{'1:' * 3000}1.5, b]\n", 1, "labels.0", "quote it"),
    (f"labels: [{'1:' * 30000}1, b]\n{IMAGE}", 1, "labels.0", "text is needed"),
    ('task: "\\UFFFFFFFF"\n', None, "", "can't be parsed"),
    # labels
    (IMAGE, 1, "labels", "labels_file"),
    (f"labels: [yes, no]\n{IMAGE}", 1, "labels.0", 'quote it: "yes"'),
    (f"labels:\n- a\n- no\n{IMAGE}", 3, "labels.1", 'quote it: "no"'),
    (f"labels:\n- a\n- 12\n{IMAGE}", 3, "labels.1", 'quote it: "12"'),
    (f"labels:\n- a\n- 2024-01-01\n{IMAGE}", 3, "labels.1", 'quote it: "2024-01-01"'),
    (f"labels:\n- a\n- ~\n{IMAGE}", 3, "labels.1", 'quote it: "~"'),
    (f"labels:\n- a\n- b\n- a\n{IMAGE}", 4, "labels.2", "items 0 and 2"),
    (f"labels:\n- a\n- ' '\n{IMAGE}", 3, "labels.1", "blank"),
    (f"labels: [a]\n{IMAGE}", 1, "labels", "at least 2"),
    (f"labels:\n- a\n{IMAGE}", 1, "labels", "at least 2, got a list of 1"),
    (f"labels: a, b\n{IMAGE}", 1, "labels", "a list"),
    (f"labels_file: l.txt\n{START}", 1, "labels_file", "keep one"),
    (f"labels_file: none.txt\n{IMAGE}", 1, "labels_file", "no such file"),
    (f"task: embed\n{START}", 2, "labels", "remove labels"),
    (f"task: clasify\n{START}", 1, "task", "did you mean classify?"),
    # encoders
    ("labels: [a, b]\n", 1, "encoders", "image"),
    ("labels: [a, b]\nencoders: {}\n", 2, "encoders", "at least one"),
    ("labels: [a, b]\nencoders:\n  imge: {model: org/name}\n", 3, "encoders.imge", "did you mean image?"),
    ("labels: [a, b]\nencoders:\n  image: org/name\n", 3, "encoders.image", "model"),
    ("labels: [a, b]\nencoders:\n  image: {modle: org/name}\n", 3, "encoders.image.modle", "did you mean model?"),
    ("labels: [a, b]\nencoders:\n  image: {weights: w}\n", 3, "encoders.image.model", "missing"),
    (f"{START2}image: {{model: minilm}}\n", 3, "encoders.image.model", "hf:ORG/NAME"),
    (f"{START2}image: {{model: openclip:A/b}}\n", 3, "encoders.image.model", "open_clip:A/b"),
    (f"{START2}image: {{model: openclip:RN50}}\n", 3, "encoders.image.model", "open_clip:RN50"),
    (f"{START2}image: {{model: nowhere.at:All}}\n", 3, "encoders.image.model", "add nowhere.py"),
    (f"{START2}image: {{model: open_clip:RN50}}\n", 3, "encoders.image.model", "random"),
    (f"{START2}image: {{model: tiny:photo}}\n", 3, "encoders.image.model", "weights: FILE"),
    (f"{START2}image: {{model: hf:./no}}\n", 3, "encoders.image.model", "'./no' does not exist"),
    (f"{START2}image: {{model: ./no}}\n", 3, "encoders.image.model", "hf:./no"),
    (f"{START2}image: {{model: timm:resnet50}}\n", 3, "encoders.image.model", "use open_clip:"),
    (
        f"{START2}image: {{model: a/b, weights: w}}\n",
        3,
        "encoders.image.weights",
        "'w' does not exist",
    ),
    (f"{START2}image: {{model: a/b, max_tokens: 4}}\n", 3, "encoders.image.max_tokens", "for text"),
    (f"{START2}text: {{model: a/b, max_tokens: 0}}\n", 3, "encoders.text.max_tokens", "from 1"),
    (
        f"{START2}text: {{model: a/b, max_tokens: 6.5}}\n",
        3,
        "encoders.text.max_tokens",
        "whole number",
    ),
    (f"{START2}audio: {{model: a/b, max_seconds: 0}}\n", 3, "encoders.audio.max_seconds", "above 0"),
    (
        f"{START2}audio: {{model: a/b, max_seconds: .inf}}\n",
        3,
        "encoders.audio.max_seconds",
        "above 0",
    ),
    (f"{START2}text: {{model: a/b, options: {{x: 1}}}}\n", 3, "encoders.text.options", "your own"),
    # fusion
    (f"{START}fusion: {{head: zero_shoot}}\n", 4, "fusion.head", "zero_shot"),
    (f"{START}fusion: {{head: linear}}\n", 4, "fusion.head", "random weights are refused"),
    (f"{START}fusion: {{head: transformer}}\n", 4, "fusion.head", "checkpoint: FILE.safetensors"),
    (f"{START}fusion: {{head: linear, checkpoint: no.st}}\n", 4, "fusion.checkpoint", "'no.st' does not exist"),
    (f"{START}fusion: {{options: {{a: 1}}}}\n", 4, "fusion.options", "your own head"),
    (f"{START}fusion: {{modalities: {{text: {{}}}}}}\n", 4, "fusion.modalities.text", "encoders: image"),
    (
        f"{START}fusion: {{modalities: {{image: {{prompts: []}}}}}}\n",
        4,
        "fusion.modalities.image.prompts",
        "at least 1",
    ),
    (f'{START}fusion: {{modalities: {{image: {{prompts: ["a"]}}}}}}\n', 4, "fusion.modalities.image.prompts.0", "{}"),
    (f"{START}fusion: {{modalities: {{image: {{weight: 0}}}}}}\n", 4, "fusion.modalities.image.weight", "above 0"),
    (f"{START}fusion: {{confidence: entropie}}\n", 4, "fusion.confidence", "did you mean entropy?"),
    (f"{START}fusion: {{deliberate: {{below: 1.2}}}}\n", 4, "fusion.deliberate.below", "0 to 1"),
    (f"{START}fusion: {{deliberate: {{views: 1}}}}\n", 4, "fusion.deliberate.views", "2"),
    (f"{START}fusion: {{audit: {{share: 5}}}}\n", 4, "fusion.audit.share", "5% or 0.05"),
    (f"task: embed\n{IMAGE}fusion: {{head: linear}}\n", 4, "fusion.head", "remove head"),
    (f"task: embed\n{IMAGE}fusion: {{exits: [{{after: image, threshold: 1}}]}}\n", 4, "fusion.exits", "remove exits"),
    (f"task: embed\n{IMAGE}fusion: {{deliberate: {{below: 0.5}}}}\n", 4, "fusion.deliberate", "remove deliberate"),
    (f"task: embed\n{IMAGE}fusion: {{audit: {{share: 1%}}}}\n", 4, "fusion.audit", "remove audit"),
    # exits
    (f"{EXITS}{{after: image}}\n", 8, "fusion.exits.0.threshold", "missing"),
    (f"{EXITS}{{after: image, treshold: 1}}\n", 8, "fusion.exits.0.treshold", "threshold?"),
    (
        f"{EXITS}{{after: image, threshold: 1.5}}\n",
        8,
        "fusion.exits.0.threshold",
        "0 to 1, got 1.5",
    ),
    (
        f"{EXITS}{{after: image, threshold: 1e-3}}\n",
        8,
        "fusion.exits.0.threshold",
        "quotes: 0.001",
    ),
    (f"{EXITS}{{after: image, threshold: .nan}}\n", 8, "fusion.exits.0.threshold", "0 to 1"),
    (f"{EXITS}{{after: [], threshold: 1}}\n", 8, "fusion.exits.0.after", "at least 1"),
    (f"{EXITS}{{after: all, threshold: 1}}\n", 8, "fusion.exits.0.after.0", "always answers"),
    (f"{EXITS}{{after: imgae, threshold: 1}}\n", 8, "fusion.exits.0.after.0", "image?"),
    (f"{START}fusion:\n  exits:\n  - {{after: text, threshold: 1}}\n", 6, "fusion.exits.0.after", "no text encoder"),
    (f"{START}fusion:\n  exits:\n  - {{after: image, threshold: 1}}\n", 6, "fusion.exits.0.after", "always answers"),
    (
        f"{EXITS}{{after: [image, text, audio], threshold: 1}}\n",
        8,
        "fusion.exits.0.after",
        "last",
    ),
    (f"{EXITS}{{after: [image, image], threshold: 1}}\n", 8, "fusion.exits.0.after", "twice"),
    (f"{EXITS}{{after: image.layer0, threshold: 1}}\n", 8, "fusion.exits.0.after.0", "from 1"),
    (f"{EXITS}{{after: image.layer4, threshold: 1}}\n", 8, "fusion.exits.0.after", "probe"),
    (f"{EXITS}{{after: head.layer1, threshold: 1}}\n", 8, "fusion.exits.0.after", "no layers"),
    (
        f"{EXITS}{{after: [image, text.layer4], threshold: 1}}\n",
        8,
        "fusion.exits.0.after",
        "not implemented: an exit inside an encoder",
    ),
    (
        f"{EXITS}{{after: image, threshold: 1}}\n  - {{after: text, threshold: 1}}\n",
        9,
        "fusion.exits.1.after",
        "the exit text does not extend the one before it, image",
    ),
    (
        f"{EXITS}{{after: image, threshold: 1}}\n  - {{after: image, threshold: 0.5}}\n",
        9,
        "fusion.exits.1.after",
        "stands twice",
    ),
    # runtime
    (f"{START}runtime: {{schedule: paralel}}\n", 4, "runtime.schedule", "parallel"),
    (f"{START}runtime: {{dtype: float16}}\n", 4, "runtime.dtype", "use auto, float32 or bfloat16"),
    (f"{START}runtime: {{dtype: int3}}\n", 4, "runtime.dtype", "bfloat16"),
    (f"{START}runtime: {{device: 'cuda:x'}}\n", 4, "runtime.device", "cuda:N"),
    (f"{START}runtime: {{device: gpu}}\n", 4, "runtime.device", "cuda:N"),
    (f"{START}runtime: {{device: cuda, backend: onnx}}\n", 4, "runtime.backend", "onnx computes on the CPU"),
    (f"{START}runtime: {{backend: openvino, device: 'cuda:1'}}\n", 4, "runtime.backend", "runtime.device is cuda:1"),
    (
        f"{START}runtime: {{device: cpu, backend: tensorrt}}\n",
        4,
        "runtime.backend",
        "tensorrt computes on an NVIDIA GPU",
    ),
    (f"{START}runtime: {{batch_size: 513}}\n", 4, "runtime.batch_size", "1 to 512"),
    (f"{START}runtime: {{batch_size: yes}}\n", 4, "runtime.batch_size", "1 to 512"),
    (f"{START}runtime: {{memory_limit: 4}}\n", 4, "runtime.memory_limit", "10GB"),
    (f"{START}runtime: {{memory_limit: 4 gigs}}\n", 4, "runtime.memory_limit", "10GB"),
    (f"{START}runtime: {{cache: onn}}\n", 4, "runtime.cache", "off"),
    (f"{START}runtimes: {{}}\n", 4, "runtimes", "did you mean runtime?"),
    (f"{START}runtime: 3\n", 4, "runtime", "schedule"),
    # input, output
    (f"{START}input: {{folder: a, manifest: b.csv}}\n", 4, "input.manifest", "keep one"),
    (f"{START}input: {{manifest: b.xlsx}}\n", 4, "input.manifest", ".parquet"),
    (f"{START}input: {{pattern: {{image: 'a.jpg'}}}}\n", 4, "input.pattern.image", "{id}"),
    (f"{START}input: {{pattern: {{image: '../{{id}}.jpg'}}}}\n", 4, "input.pattern.image", "leaves"),
    (f"{START}input: {{manifest: a.csv, columns: {{name: sku}}}}\n", 4, "input.columns.name", "id, image"),
    (f"{START}input: {{max_failed: 101%}}\n", 4, "input.max_failed", "100%"),
    (f"{START}input: {{decode: faster}}\n", 4, "input.decode", "fast"),
    (f"{START}input: {{limits: {{image_megapixel: 3}}}}\n", 4, "input.limits.image_megapixel", "image_megapixels?"),
    (f"{START}output: {{top_k: 0}}\n", 4, "output.top_k", "1 to 100"),
    (f"{START}output: {{top_k: '3'}}\n", 4, "output.top_k", "without quotes: 3"),
    (f"{START}output: {{probabilities: 1}}\n", 4, "output.probabilities", "true or false"),
    (f"{START}output: {{shard_rows: 65537}}\n", 4, "output.shard_rows", "65536"),
    (f"{START}output: {{folder: ''}}\n", 4, "output.folder", "text"),
]


@pytest.mark.parametrize(("text", "line", "path", "word"), WRONG)
def test_wrong(text: str, line: int | None, path: str, word: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    error = refused(file)
    assert (error.where, error.path) == (str(file) if line is None else f"{file}:{line}", path)
    assert word in f"{error.message}\n{error.hint}"
    assert error.exit_code == 2


def test_each_unimplemented_value_is_tried() -> None:
    tried = {path for _, _, path, _ in WRONG}
    assert {pattern.replace("*", "image") for pattern in IMPLEMENTED} <= tried


def test_several_problems_at_once(tmp_path: Path) -> None:
    text = f"labels: [a, no]\n{IMAGE}output: {{top_k: 0, shard_rows: 0}}\nruntime: {{dtype: x, backend: y}}\n"
    error = refused(written(tmp_path, text + "y: 1\nz: 1\n"))
    assert error.path == "labels.1"
    assert str(error).count("also: ") == 4
    assert "and 2 more" in str(error)


@pytest.mark.parametrize(
    ("exits", "names"),
    [
        (["image"], ["image"]),
        (["text", ["text", "audio"]], ["text", "text+audio"]),
        (
            ["image.layer2", "image.layer4", "image", ["image", "text"]],
            ["image.layer2", "image.layer4", "image", "image+text"],
        ),
        (["image.layer4", ["text", "image"], "head.layer1", "head.layer2"], None),
    ],
)
def test_exits_that_extend_each_other(exits: list[Any], names: list[str] | None, tmp_path: Path) -> None:
    written(tmp_path, "", "head.safetensors")
    fusion: dict[str, Any] = {"head": "transformer", "checkpoint": "head.safetensors"}
    text = yaml.safe_dump(
        {**yaml.safe_load(START3), "fusion": {**fusion, "exits": [{"after": a, "threshold": 0.9} for a in exits]}}
    )
    found = [exit_.name for exit_ in load(written(tmp_path, text)).fusion.exits]
    assert names is None or found == names


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("image", "image.layer4"),
        ("image.layer4", "image.layer2"),
        ("image.layer4", "text"),
        ("image", "text.layer2"),
        ("head.layer1", ["image", "text"]),
        ("head.layer2", "head.layer1"),
        (["image", "text"], ["image", "audio"]),
    ],
)
def test_exits_that_do_not_extend_the_one_before(before: Any, after: Any, tmp_path: Path) -> None:
    written(tmp_path, "", "head.safetensors")
    exits = [{"after": before, "threshold": 0.9}, {"after": after, "threshold": 0.9}]
    fusion = {"head": "transformer", "checkpoint": "head.safetensors", "exits": exits}
    error = refused(written(tmp_path, yaml.safe_dump({**yaml.safe_load(START3), "fusion": fusion})))
    assert error.path == "fusion.exits.1.after"
    assert "does not extend" in error.message


def test_a_mistyped_key_is_not_called_missing_as_well(tmp_path: Path) -> None:
    assert "missing" not in str(refused(written(tmp_path, START2 + "image: {modle: org/name}\n")))
