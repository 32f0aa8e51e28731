"""Every key of a configuration, its type, its default, what it means; and `load`, the one way in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from mmpipe.config.check import anchor_paths, labels_of, problems_of
from mmpipe.config.source import Document, Problem, Source, apply_override, expand, parse_yaml, plain, read_text, shown
from mmpipe.config.values import (
    BatchSize,
    ModelId,
    Processes,
    Share,
    Size,
    SizeOrAuto,
    Text,
    Texts,
    checked,
    listed,
    nearest,
    one_or_more,
    parse_device,
    parse_exit_entry,
    parse_head,
    parse_model,
    switch_word,
    valid,
)
from mmpipe.config.words import translate
from mmpipe.errors import ConfigError

Modality = Literal["image", "text", "audio"]
Column = Literal["id", "image", "text", "audio"]


class _Keys(BaseModel):
    # defer_build: validators are made on first use; takes a fifth off the import, which `mmpipe --help` waits for
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _nothing_there(cls, given: object) -> object:
        """A list, mapping or section with nothing behind its key (only comments, say) is as one that is not there."""
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None or not cls._holds_several(key)}

    @classmethod
    def _holds_several(cls, key: object) -> bool:
        field = cls.model_fields.get(key) if isinstance(key, str) else None
        default = None if field is None else field.get_default(call_default_factory=True)
        return isinstance(default, tuple | Mapping | BaseModel)


class EncoderConfig(_Keys):
    """The model of one modality."""

    model: Annotated[Text, AfterValidator(valid(parse_model))] = Field(
        description="Model id, such as `open_clip:ViT-B-32/laion2b_s34b_b79k` or `hf:ORG/NAME`. Forms: "
        "`open_clip:NAME/PRETRAINED`, `open_clip:hf-hub:ORG/NAME`, `hf:ORG/NAME[@REVISION]` (or `ORG/NAME`), "
        "`timm:NAME`, `torchvision:NAME`, `torchaudio:BUNDLE`, `tiny:NAME`, or your own class "
        "`package.module:Class`, looked up beside the YAML too. After `KIND:` a local path works: `hf:./models/minilm`."
    )
    weights: Text | None = Field(
        default=None, description="Local file or folder with the weights, relative to the YAML."
    )
    max_tokens: Annotated[int, Field(ge=1, le=65536)] | None = Field(
        default=None,
        description="Text only: tokens beyond this are cut off. Null: the model's own limit. Long jobs pad a text no "
        "further than to the least of a few lengths that holds it.",
    )
    max_seconds: Annotated[float, Field(gt=0, le=86_400)] | None = Field(
        default=None, description="Audio only: seconds of sound that are read. Null: the model's own window."
    )
    options: Mapping[str, JsonValue] = Field(default={}, description="Keyword arguments of your own class.")

    @property
    def id(self) -> ModelId:
        return parse_model(self.model)


class ModalityConfig(_Keys):
    """How the zero-shot head uses one modality."""

    prompts: Annotated[tuple[Text, ...], Field(min_length=1), BeforeValidator(listed)] = Field(
        default=("{}",), description="Sentences a label is put into, in place of `{}`; their embeddings are averaged."
    )
    logit_scale: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Factor on the cosine similarity. Null: the model's own, else 20."
    )
    weight: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Weight of this modality in the mean.")


class ExitConfig(_Keys):
    """A place where a sample may answer early."""

    after: Annotated[
        tuple[Annotated[Text, AfterValidator(valid(parse_exit_entry))], ...],
        BeforeValidator(one_or_more),
        Field(min_length=1),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
    ] = Field(
        description="All that the exit sees: modalities (`image`, `[image, text]`), or one layer, from 1, of an "
        "encoder (`image.layer4`) or of the head (`head.layer1`: sees all modalities). Must extend the exit before."
    )
    threshold: Annotated[float, Field(ge=0, le=1)] = Field(
        description="A sample leaves here when its confidence is at least this."
    )

    @property
    def name(self) -> str:
        """What `answered_by` says: the entries joined by "+"."""
        return "+".join(self.after)


class AuditConfig(_Keys):
    """Samples that left early and are computed in full as well, to see whether the exits still hold."""

    share: Share = Field(default=0.01, description="Share of the samples, chosen by a hash of their ids; 0%: none.")
    on_drift: Literal["warn", "disable"] = Field(
        default="warn",
        description="When the exits surely disagree more often than the calibration promised: say so, or also stop "
        "using them from the next look on.",
    )


class DeliberateConfig(_Keys):
    """A second look, with more input, at samples that the last stage is unsure of."""

    below: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.8, description="Confidence of the last stage under which a sample is looked at again."
    )
    views: Annotated[int, Field(ge=2, le=32)] = Field(
        default=4, description="Views that are weighed, the first look among them; at most."
    )


class FusionConfig(_Keys):
    """Embeddings → decision."""

    head: Annotated[Text, AfterValidator(checked(parse_head))] = Field(
        default="zero_shot", description="`zero_shot`, `linear`, `transformer`, or your own `package.module:Class`."
    )
    checkpoint: Text | None = Field(
        default=None,
        description="Safetensors file of the head and the exits' probes; `linear` and `transformer` need one.",
    )
    options: Mapping[str, JsonValue] = Field(default={}, description="Keyword arguments of your own head.")
    modalities: Mapping[Modality, ModalityConfig] = Field(
        default={}, description="Zero-shot settings of each modality."
    )
    exits: Annotated[tuple[ExitConfig, ...], BeforeValidator(listed)] = Field(
        default=(), description="Early exits, from first to last. The last stage (`all`) always answers."
    )
    confidence: Literal["max_probability", "margin", "entropy"] = Field(
        default="max_probability", description="What a threshold is compared with."
    )
    calibration: Text | None = Field(default=None, description="File from `mmpipe calibrate`: replaces `exits`.")
    on_mismatch: Literal["error", "full"] = Field(
        default="error", description="When the calibration was made for another model: stop, or run without exits."
    )
    audit: AuditConfig | None = Field(
        default=None,
        description="Folder jobs: compute a share of the exited samples in full as well. Null: 1% where there is a "
        "calibration, else none.",
    )
    deliberate: DeliberateConfig | None = Field(
        default=None, description="A second look at unsure samples, with more input; null: none."
    )


class RuntimeConfig(_Keys):
    """How it runs. `auto` is resolved once, when the pipeline is built; `run.json` says to what."""

    device: Annotated[
        Text,
        AfterValidator(checked(parse_device)),
        WithJsonSchema({"type": "string", "pattern": "^(auto|cpu|cuda(:[0-9]+)?)$"}),
    ] = Field(
        default="auto",
        description="`auto`, `cpu`, `cuda` or `cuda:N`. `auto`: a GPU that PyTorch can use, else the CPU.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Number format of the encoders."
    )
    backend: Literal["auto", "eager", "native", "inductor", "openvino", "onnx", "tensorrt"] = Field(
        default="auto",
        description="What a segment of the graph is lowered to. `eager`: PyTorch's operations, one after the other; "
        "`native`: these, with attention, MLPs and norms compiled for this processor (AMX, bfloat16; GCC, once).",
    )
    schedule: Literal["auto", "cascade", "parallel"] = Field(
        default="auto",
        description="`cascade`: stage by stage over a shard (throughput); `parallel`: all branches at once (latency).",
    )
    batch_size: BatchSize = Field(default="auto", description="Rows of a batch: `auto`, or 1 to 512.")
    memory_limit: SizeOrAuto = Field(
        default="auto",
        description="Memory for weights, pool, workspaces and decoding: `auto` (80% of what is free), or `4GB`.",
    )
    cache: Annotated[
        Literal["auto", "on", "off"],
        BeforeValidator(switch_word),
        WithJsonSchema({"enum": ["auto", "on", "off", True, False]}),
    ] = Field(
        default="auto",
        description="Keep embeddings between runs: what was encoded before is not decoded or encoded again. `auto`: "
        "for batches and folders, not for single calls. `MMPIPE_CACHE` names the folder (`off`: none).",
    )
    processes: Processes = Field(
        default="auto",
        description="Processes that do a job side by side on the processor, each with one core and the same models in "
        "memory: `auto` (one for each core, where the samples are so many that each has enough to do), or 1 to 512.",
    )
    decoding: Literal["auto", "threads", "processes"] = Field(
        default="auto",
        description="Where media are decoded. `processes`: for many cores, where threads would wait for Python's lock; "
        "each takes some 0.4 GB and seconds to start. `auto`: for long jobs on six cores and more.",
    )
    cache_limit: Size = Field(
        default=10_000_000_000,
        json_schema_extra={"default": "10GB"},
        description="Disk space of the cache: what was not used for longest goes first.",
    )


class LimitsConfig(_Keys):
    """Media beyond these is not opened; its row says why."""

    image_megapixels: Annotated[float, Field(gt=0)] = Field(
        default=100.0, description="Largest picture, in millions of pixels."
    )
    file_megabytes: Annotated[float, Field(gt=0)] = Field(
        default=512.0, description="Largest file, in millions of bytes."
    )
    text_kilobytes: Annotated[float, Field(gt=0)] = Field(
        default=1024.0, description="Longest text, in thousands of bytes."
    )
    audio_minutes: Annotated[float, Field(gt=0)] = Field(default=240.0, description="Longest sound, in minutes.")


class InputConfig(_Keys):
    """Where the samples come from. Not needed from Python."""

    folder: Text | None = Field(default=None, description="Folder of media, relative to the YAML.")
    pair_by: Literal["stem", "folder"] | None = Field(
        default=None, description="`stem`: a/1.jpg and a/1.txt are one item; `folder`: all of a/1/ is. Null: `stem`."
    )
    pattern: Mapping[Modality, Text] = Field(
        default={},
        description="Replaces `pair_by`: for each modality a path with one `{id}` and wildcards: `{id}/photo*.jpg`.",
    )
    manifest: Text | None = Field(
        default=None,
        description="Table of the samples instead of a folder: .csv, .jsonl or .parquet, relative to the YAML.",
    )
    columns: Mapping[Column, Text] = Field(
        default={},
        description="The manifest's column for `id`, `image`, `text`, `audio`. Default: columns of these names.",
    )
    keep: Texts = Field(default=(), description="Columns of the manifest that are copied to the output.")
    multiple: Literal["error", "first"] = Field(
        default="error", description="Several files of one modality for one item: stop, or take the first by name."
    )
    max_failed: Share = Field(
        default=0.05, description="Share of failed items above which a run ends with exit code 3."
    )
    decode: Literal["exact", "fast"] = Field(
        default="exact", description="`fast` decodes pictures at reduced size; it differs a little."
    )
    limits: LimitsConfig = Field(
        default_factory=LimitsConfig, description="Media beyond these is not opened; its row says why."
    )


class OutputConfig(_Keys):
    """What is written, and where."""

    folder: Text | None = Field(
        default=None,
        description="Output folder, relative to the current directory. Packaged configurations: `out/NAME`.",
    )
    top_k: Annotated[int, Field(ge=1, le=100)] = Field(default=3, description="Labels kept for each row; at most all.")
    probabilities: bool = Field(default=False, description="Write the probability of every label.")
    embeddings: bool = Field(default=False, description="Write the embeddings.")
    thumbnails: bool = Field(default=True, description="Show media in the report.")
    shard_rows: Annotated[int, Field(ge=1, le=65536)] = Field(default=1024, description="Rows of one output file.")


class Config(_Keys):
    """A whole configuration, checked, and where it came from. Made by `load`."""

    task: Literal["classify", "embed"] = Field(
        default="classify", description="`classify`: one label a sample; `embed`: its embeddings."
    )
    labels: Annotated[tuple[Text, ...], Field(min_length=2), BeforeValidator(listed)] | None = Field(
        default=None, description="The labels, at least two. `classify` needs this or `labels_file`."
    )
    labels_file: Text | None = Field(
        default=None, description="The labels from a file, relative to the YAML: one a line, or a JSON or YAML list."
    )
    encoders: Annotated[Mapping[Modality, EncoderConfig], Field(min_length=1)] = Field(
        description="One encoder for each modality: `image`, `text`, `audio`; at least one. Their order is kept."
    )
    fusion: FusionConfig = Field(default_factory=FusionConfig, description="Embeddings → decision.")
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig, description="How it runs.")
    input: InputConfig = Field(default_factory=InputConfig, description="Where the samples come from.")
    output: OutputConfig = Field(default_factory=OutputConfig, description="What is written, and where.")

    _source: Source = PrivateAttr(default_factory=Source)
    _labels: tuple[str, ...] = PrivateAttr(default=())

    @property
    def source(self) -> Source:
        return self._source

    @property
    def all_labels(self) -> tuple[str, ...]:
        """The labels, wherever they stand; empty for `embed`."""
        return self._labels

    @property
    def modalities(self) -> tuple[str, ...]:
        """The encoders' modalities, in their order."""
        return tuple(self.encoders)

    @property
    def output_folder(self) -> Path | None:
        """`output.folder`; a packaged configuration's default is out/NAME. Relative to the current directory."""
        if self.output.folder is not None:
            return expand(self.output.folder)
        return Path("out", self._source.name) if self._source.packaged else None

    def resolve(self, path: str) -> Path:
        """A path as a key has it → one that can be opened."""
        return self._source.folder / expand(path)

    def error(self, path: str, message: str, hint: str = "") -> ConfigError:
        """A ConfigError for a check made later: knows the file and line of the dotted key `path`."""
        return self._source.error([Problem(path, message, hint)])


# Keys whose value is a path in a file; given by --set they are relative to the current directory.
PATH_KEYS = (
    "labels_file",
    "encoders.*.weights",
    "fusion.checkpoint",
    "fusion.calibration",
    "input.folder",
    "input.manifest",
)


def packaged_names() -> list[str]:
    """Names that `load` knows without a path."""
    return sorted(path.stem for path in _packaged_folder().glob("*.yaml"))


def _packaged_folder() -> Path:
    return Path(str(resources.files("mmpipe.configs")))


def load(source: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = (), training: bool = False) -> Config:
    """A packaged name ("quickstart"), the path of a YAML file, or a mapping → Config, checked without loading a model.

    overrides: "KEY=VALUE", dotted keys, YAML values, applied in order: `runtime.batch_size=8`,
    `fusion.exits.0.threshold=0.9`. Paths in them and in a mapping are relative to the current directory, paths in a
    file to the file. training: the head's weights, the exits' probes and the labels may be missing. Raises
    ConfigError: file and line, the key, its value, and the nearest that would do; it lists up to five problems.

        config = load("shop.yaml", overrides=["runtime.batch_size=8"])
    """
    document, origin = _read(source)
    for override in overrides:
        key = apply_override(document, override)
        anchor_paths(document.data, key, PATH_KEYS)
    origin = Source(origin.file, origin.folder, origin.name, origin.packaged, document.places, document.raw)
    try:
        config = Config.model_validate(document.data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise origin.error(translate(details, origin, json_schema())) from None
    config._source = origin
    labels, problems = labels_of(config)
    config._labels = labels
    problems += problems_of(config, training=training)
    if problems:
        raise origin.error(problems)
    return config


def _read(source: str | Path | Mapping[str, Any]) -> tuple[Document, Source]:
    if isinstance(source, Mapping):
        return Document(plain(source), {}, {}), Source()
    path, name, packaged = expand(str(source)), str(source), False
    if isinstance(source, str) and not os.path.isfile(path) and path.suffix not in (".yaml", ".yml"):
        names = packaged_names()
        if source in names:
            path, name, packaged = _packaged_folder() / f"{source}.yaml", f"{source}.yaml", True
        elif not os.path.exists(path):
            near = nearest(source, names)
            hint = f"packaged: {', '.join(names)}; or the path of a .yaml file"
            raise ConfigError(
                f"no file and no packaged configuration is called {source!r}",
                hint=f"did you mean {near}? {hint}" if near else hint,
            )
    document = parse_yaml(read_text(path, name), name)
    if document.data is None:
        raise ConfigError("is empty", where=name, hint="it needs at least task, labels and encoders")
    if not isinstance(document.data, dict):
        raise ConfigError(
            f"holds {shown(document.data)}, not keys with values", where=f"{name}:1", hint="begin with task: classify"
        )
    path = path.absolute()
    return document, Source(path, path.parent, path.stem, packaged)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a configuration file: what `mmpipe schema` prints, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
