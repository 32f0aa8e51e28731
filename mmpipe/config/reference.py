"""The keys of the configuration, written out. docs/configuration.md is what `reference()` returns; a test compares."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mmpipe.config.check import IMPLEMENTED
from mmpipe.config.keys import json_schema
from mmpipe.config.source import join
from mmpipe.config.values import OWN
from mmpipe.config.words import describe, follow

_BEFORE = """\
# Configuration

<!-- Written by mmpipe.config.reference.reference(); a test compares. -->

One YAML file declares a pipeline. `mmpipe check CONFIG` reads it and says what it means; `mmpipe schema` prints its
JSON Schema for editors. A wrong or unknown key is an error that names the file, the line, the key and what would be
right.

```yaml
task: classify
labels: [shirt, bag, sandal]
encoders:
  image: {model: "open_clip:ViT-B-32/laion2b_s34b_b79k"}
  text: {model: "hf:sentence-transformers/all-MiniLM-L6-v2", max_tokens: 64}
fusion:
  head: zero_shot
  modalities:
    image: {prompts: ["a photo of a {}"]}
  exits:
    - {after: image, threshold: 0.95}
input: {folder: media/, pair_by: stem}
output: {folder: out/}
```

**Paths** in a file are relative to that file. `output.folder`, and every path on the command line, is relative to
the current directory.

**`--set KEY=VALUE`** changes one key: `--set runtime.batch_size=8`, `--set fusion.exits.0.threshold=0.9` (lists
count from 0). The value is YAML.

**Text that YAML takes for something else** needs quotes: `no`, `yes`, `on`, `off`, `null`, numbers and dates. A
bare `no` among the labels is an error, not a label called False.

**Sizes** are written with their unit: `10GB` (powers of 1000) or `512MiB` (powers of 1024). **Shares** are
percentages or numbers from 0 to 1: `5%` or `0.05`.

**Exits.** Each `after` lists all that the exit sees, and must see more than the exit before it. The order is: a
layer of an encoder, deeper layers, the whole encoder, more modalities, then the layers of the head. An exit that
would see everything is refused: that is the last stage, which always answers. Confidence of the zero-shot head is
not calibrated: a threshold of 0.95 does not mean that 95% are right.

**Your own encoder or head** is named `package.module:Class` and is looked up beside the YAML too.
`configs/custom.yaml` and `configs/custom_parts.py` are a small example of both. An encoder is made as
`Encoder(**options)` and has `modality`, `dim`, `prepare(media)` (one decoded medium → tensors without a batch
dimension) and `module` (batched tensors → embedding `[batch, dim]`). A head is made as `Head(dims, labels,
**options)`; its `forward(embeddings, presence_BM)` returns logits `[batch, labels]`. Both are captured by
torch.export with a free batch size, so they hold no Python branch on values. Shapes are looked at when they are loaded,
and that no row depends on its neighbours or on chance.

What the types allow and nothing implements yet is refused by name; the tables say what works now.
"""


def reference() -> str:
    """docs/configuration.md: every key with its values, default and meaning."""
    schema = json_schema()
    tables = [("The top level", _table("", schema, schema))]
    tables += [
        (f"`{path}`", f"{about}\n\n{_table(path, at, schema)}") for path, about, at in _sections("", schema, schema)
    ]
    return "\n".join([_BEFORE, *(f"## {title}\n\n{text}" for title, text in tables)])


def _sections(
    path: str, at: Mapping[str, Any], schema: Mapping[str, Any]
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(pattern, description, schema) of each mapping below, in order: encoders.*, fusion, fusion.exits.*, …"""
    for key, field in at.get("properties", {}).items():
        for suffix, inner in _models(field, schema):
            here = join(path, key) + suffix
            yield here, inner["description"], inner
            yield from _sections(here, inner, schema)


def _models(
    field: Mapping[str, Any], schema: Mapping[str, Any], suffix: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What a key leads to that has keys itself; ".*" for each mapping or list on the way."""
    if "$ref" in field:
        inner = schema["$defs"][field["$ref"].rpartition("/")[2]]
        if "properties" in inner:
            yield suffix, inner
    for option in field.get("anyOf", ()):
        yield from _models(option, schema, suffix)
    for word in ("additionalProperties", "items"):
        if isinstance(field.get(word), Mapping):
            yield from _models(field[word], schema, f"{suffix}.*")


def _table(path: str, at: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    lines = ["| Key | Value | Default | Meaning |", "|---|---|---|---|"]
    required = at.get("required", ())
    for key, field in at["properties"].items():
        pattern = join(path, key)
        default = "required" if key in required else _default(field)
        meaning = field.get("description") or follow(field, schema)["description"]
        if pattern in IMPLEMENTED:
            meaning += f" *Works now: {', '.join(_word(value) for value in IMPLEMENTED[pattern])}.*"
        value = "see below" if any(_models(field, schema)) else describe(field, schema)
        cells = (f"`{key}`", value, default, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(field: Mapping[str, Any]) -> str:
    if "default" not in field:
        return "the defaults below"
    value = field["default"]
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _word(value: object) -> str:
    if value is None:
        return "null"
    return "package.module:Class" if value == OWN else f"{value:g}" if isinstance(value, float) else str(value)
