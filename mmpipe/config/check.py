"""What one key alone can't tell, and what nothing implements yet."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpipe.config.source import Problem, expand, join, parse_yaml, read_text, shown
from mmpipe.config.values import KINDS, OWN, ExitEntry, nearest, parse_exit_entry, parse_model
from mmpipe.errors import ConfigError

if TYPE_CHECKING:
    from mmpipe.config.keys import Config, ExitConfig

# Dotted key → the values that something implements; others that the types allow are refused by name.
# Who implements one adds it here (or removes the line); docs/configuration.md follows.
IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "encoders.*.model": ("open_clip", "hf", "tiny", OWN),  # kinds
    "runtime.dtype": ("auto", "float32", "bfloat16"),
}
ON_THE_HOST = ("native", "openvino", "onnx")  # backends that read their inputs in the host's memory
ON_A_GPU = ("tensorrt",)


def problems_of(config: Config, *, training: bool = False) -> list[Problem]:
    """All that is wrong with a well-typed configuration, as far as no model is needed.

    `training`: for who brings what a run can't do without: the head's weights, the exits' probes, the labels.
    """
    checks = (_implemented, _labels, _encoders, _fusion, exit_problems, _runtime, _input)
    found = [problem for check in checks for problem in check(config)]
    return [problem for problem in found if not (training and problem.trained)]


def values_at(value: object, pattern: str, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) for each place that a dotted pattern fits; * stands for any key of a mapping."""
    if not pattern:
        yield path, value
        return
    part, _, rest = pattern.partition(".")
    if part == "*":
        for name, item in value.items() if isinstance(value, Mapping) else ():
            yield from values_at(item, rest, join(path, name))
    elif isinstance(value, Mapping):
        if part in value:
            yield from values_at(value[part], rest, join(path, part))
    elif hasattr(type(value), "model_fields"):
        yield from values_at(getattr(value, part), rest, join(path, part))


def anchor_paths(data: Any, key: str, path_keys: Sequence[str]) -> None:
    """Makes paths that `key` or anything below it holds absolute, in place: they came from the command line."""
    for pattern in (*path_keys, "encoders.*.model"):
        for path, value in list(values_at(data, pattern)):
            if not isinstance(value, str) or not (path == key or path.startswith(f"{key}.")):
                continue
            *around, last = path.split(".")
            slot = data
            for part in around:
                slot = slot[part]
            written: str | None = value
            if pattern.endswith("model"):
                try:
                    written = parse_model(value).path
                except ConfigError:  # said with the other problems
                    continue
            if written:
                slot[last] = value.removesuffix(written) + str(Path.cwd() / expand(written))


def _implemented(config: Config) -> Iterator[Problem]:
    for pattern, known in IMPLEMENTED.items():
        for path, value in values_at(config, pattern):
            if pattern.endswith(".model"):
                kind = parse_model(str(value)).kind
                if kind not in known:
                    kinds = ", ".join("package.module:Class" if name == OWN else f"{name}:" for name in known)
                    yield Problem(
                        path, f"{shown(value)}: models of kind {kind} are not implemented yet", f"use {kinds}"
                    )
            elif value not in known:
                name = shown(value) if isinstance(value, (str, float, int)) else path.rpartition(".")[2]
                *others, last = (
                    "null" if item is None else f"{item:g}" if isinstance(item, float) else str(item) for item in known
                )
                choices = f"{', '.join(others)} or {last}" if others else last
                yield Problem(path, f"{name} is not implemented yet", f"use {choices}")


def labels_of(config: Config) -> tuple[tuple[str, ...], list[Problem]]:
    """The labels, from the file where they stand in one."""
    if config.labels_file is None or config.labels is not None or config.task == "embed":
        return config.labels or (), []
    path = config.resolve(config.labels_file)
    try:
        text = read_text(path, config.labels_file)
        if path.suffix == ".json":
            found = json.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            found = parse_yaml(text, config.labels_file).data
        else:
            found = [line.strip() for line in text.splitlines() if line.strip()]
    except ConfigError as error:
        place = "" if error.where == config.labels_file else f" (line {error.where.rpartition(':')[2]})"
        return (), [Problem("labels_file", f"{shown(config.labels_file)}: {error.message}{place}", error.hint)]
    except (ValueError, RecursionError) as error:
        line = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        return (), [Problem("labels_file", f"{config.labels_file} is not JSON{line}", "a JSON list of texts")]
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        odd = next((label for label in found if not isinstance(label, str)), None) if isinstance(found, list) else found
        message = (
            f"{config.labels_file} holds {shown(odd)}, which is not {'text' if isinstance(found, list) else 'a list'}"
        )
        return (), [Problem("labels_file", message, "a list of texts; quote yes, no and numbers")]
    if len(found) < 2:
        return (), [Problem("labels_file", f"{config.labels_file} holds {len(found)} labels", "at least two")]
    return tuple(found), []


def _labels(config: Config) -> Iterator[Problem]:
    if config.task == "embed":
        for key in ("labels", "labels_file"):
            if getattr(config, key) is not None:
                yield Problem(
                    key, f"{key} stands beside task: embed, which has no labels", f"remove {key}, or use task: classify"
                )
        return
    if config.labels is None and config.labels_file is None:
        yield Problem(
            "labels",
            "task: classify needs labels",
            "add labels: [one, other], or labels_file, or use task: embed",
            trained=True,
        )
    if config.labels is not None and config.labels_file is not None:
        yield Problem("labels_file", "labels and labels_file both stand here", "keep one of them")
    seen: dict[str, int] = {}
    for index, label in enumerate(config.all_labels):
        path = f"labels.{index}" if config.labels is not None else "labels_file"
        if not label.strip():
            yield Problem(path, f"{shown(label)} is blank", "a label is text")
        elif not _is_whole(label):
            yield Problem(path, f"{shown(label)} holds half a character (a lone surrogate)", "write it anew")
        elif label in seen:
            yield Problem(
                path, f"the label {shown(label)} stands twice (items {seen[label]} and {index})", "keep one of them"
            )
        seen.setdefault(label, index)


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _encoders(config: Config) -> Iterator[Problem]:
    for modality, encoder in config.encoders.items():
        path, model = f"encoders.{modality}", encoder.id
        if encoder.options and model.kind != OWN:
            hint = "write what it takes beside model: max_tokens, max_seconds, weights"
            yield Problem(
                f"{path}.options", f"options are for your own package.module:Class, not {encoder.model}", hint
            )
        for key, owner in (("max_tokens", "text"), ("max_seconds", "audio")):
            if getattr(encoder, key) is not None and modality != owner:
                yield Problem(f"{path}.{key}", f"{key} is for {owner}, not {modality}", f"remove {key}")
            elif getattr(encoder, key) is not None and model.kind == OWN:
                yield Problem(
                    f"{path}.{key}", f"{encoder.model} gets its arguments from options", f"options: {{{key}: …}}"
                )
        if model.kind == OWN and encoder.weights is not None:
            yield Problem(
                f"{path}.weights", f"{encoder.model} gets its arguments from options", "options: {weights: …}"
            )
        elif encoder.weights is not None:
            yield from _exists(config, f"{path}.weights", encoder.weights)
        elif model.kind == "tiny" or (
            model.kind == "open_clip" and not (model.path or model.revision or model.name.startswith("hf-hub:"))
        ):
            what = "weights: FILE" if model.kind == "tiny" else "/PRETRAINED after the name, or weights: FILE"
            yield Problem(
                f"{path}.model", f"{shown(encoder.model)} names no weights, and random ones are refused", f"add {what}"
            )
        if model.path is not None:
            yield from _exists(config, f"{path}.model", model.path)
        if model.kind == OWN:
            yield from _module(config, f"{path}.model", encoder.model)


def _exists(config: Config, path: str, written: str, *, file: bool = False) -> Iterator[Problem]:
    found = config.resolve(written)
    if not os.path.exists(found):
        yield Problem(path, f"{shown(written)} does not exist", f"looked for {found}")
    elif file and not os.path.isfile(found):
        yield Problem(path, f"{shown(written)} is not a file", "name the file itself")
    elif not os.path.isfile(found) and not os.path.isdir(found):  # opening a pipe would wait for ever
        yield Problem(path, f"{shown(written)} is a pipe, socket or device", "name a file or a folder")


def _module(config: Config, path: str, own_class: str) -> Iterator[Problem]:
    """Is there such a module? Looks, imports nothing."""
    name = own_class.partition(":")[0].partition(".")[0]
    beside = config.source.folder / name
    if os.path.isfile(beside.with_name(f"{name}.py")) or os.path.isdir(beside):
        return
    try:
        known = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # ValueError: a module such as __main__, without a spec
        known = False
    if not known:
        near = nearest(name, KINDS)
        hint = (
            f"did you mean {near}:{own_class.partition(':')[2]}?"
            if near
            else f"add {name}.py to {config.source.folder}"
        )
        yield Problem(
            path, f"{shown(own_class)}: no module {name} beside the configuration, and none is installed", hint
        )


def _fusion(config: Config) -> Iterator[Problem]:
    fusion = config.fusion
    if config.task == "embed":
        for key, field in type(fusion).model_fields.items():
            if getattr(fusion, key) != field.get_default() and key in fusion.model_fields_set:
                yield Problem(f"fusion.{key}", f"{key} stands beside task: embed, which has no head", f"remove {key}")
        return
    own = ":" in fusion.head
    if own:
        yield from _module(config, "fusion.head", fusion.head)
    elif fusion.options:
        yield Problem("fusion.options", f"options are for your own head, not {fusion.head}", "remove options")
    if fusion.checkpoint is not None:
        yield from _exists(config, "fusion.checkpoint", fusion.checkpoint, file=True)
    if fusion.calibration is not None:
        yield from _exists(config, "fusion.calibration", fusion.calibration, file=True)
    probed = [
        f"fusion.exits.{index}.after"
        for index, exit_ in enumerate(fusion.exits)
        if len(exit_.after) == 1 and ".layer" in exit_.name and not exit_.name.startswith("head.")
    ]
    if fusion.head in ("linear", "transformer") and fusion.checkpoint is None:
        hint = "checkpoint: FILE.safetensors (mmpipe fit makes one), or head: zero_shot, which needs none"
        message = f"{fusion.head} without a checkpoint: random weights are refused"
        yield Problem("fusion.head", message, hint, trained=True)
    elif fusion.calibration is not None:
        pass  # its exits replace these: which probes they need is known when it has been read
    elif fusion.head == "zero_shot" and fusion.checkpoint is not None and not probed:
        yield Problem("fusion.checkpoint", "zero_shot has no weights to read from a checkpoint", "remove checkpoint")
    elif fusion.checkpoint is None:
        for path in probed:
            message = "an exit inside an encoder needs its probe, and there is no checkpoint"
            yield Problem(path, message, "add fusion.checkpoint (mmpipe fit makes one)", trained=True)
    for modality, settings in fusion.modalities.items():
        path = f"fusion.modalities.{modality}"
        if fusion.head != "zero_shot":
            message = f"modalities hold settings of zero_shot, and the head is {fusion.head}"
            yield Problem(path, message, "remove modalities", trained=True)
        elif modality not in config.encoders:
            yield Problem(path, f"there is no {modality} encoder", f"encoders: {', '.join(config.encoders)}")
        for index, prompt in enumerate(settings.prompts):
            if prompt.count("{}") != 1 or prompt.replace("{}", "").count("{") or prompt.replace("{}", "").count("}"):
                yield Problem(
                    f"{path}.prompts.{index}",
                    f"{shown(prompt)} needs exactly one {{}}",
                    'for example "a photo of a {}"',
                )


def exit_problems(config: Config) -> Iterator[Problem]:
    """Exits that don't extend one another, or stand where there is nothing to answer from."""
    if config.task == "embed":
        return
    before: ExitConfig | None = None
    seen_before: dict[str, float] = {}
    for index, exit_ in enumerate(config.fusion.exits):
        path = f"fusion.exits.{index}.after"
        entries = [parse_exit_entry(text) for text in exit_.after]
        problem = _entries_problem(config, path, exit_, entries)
        if problem is not None:
            yield problem
            return  # what follows is judged against this one
        seen = _seen(config, entries)
        if before is not None and (
            seen == seen_before or any(seen.get(part, 0) < much for part, much in seen_before.items())
        ):
            if seen == seen_before:
                message, hint = f"the exit {exit_.name} stands twice", "remove one of them"
            else:
                message = f"the exit {exit_.name} does not extend the one before it, {before.name}"
                hint = f"list all that the exit sees, {before.name.replace('+', ', ')} included, or change their order"
            yield Problem(path, message, hint)
            return
        before, seen_before = exit_, seen


def _entries_problem(config: Config, path: str, exit_: ExitConfig, entries: Sequence[ExitEntry]) -> Problem | None:
    parts = [entry.part for entry in entries]
    for entry in entries:
        if entry.part != "head" and entry.part not in config.encoders:
            return Problem(path, f"there is no {entry.part} encoder", f"encoders: {', '.join(config.encoders)}")
    if len(entries) > 1 and any(entry.layer for entry in entries):
        mixed = ", ".join(exit_.after)
        message = f"[{mixed}] is not implemented: an exit inside an encoder or head answers from that layer alone"
        return Problem(path, message, "one layer, or complete modalities")
    if len(set(parts)) < len(parts):
        return Problem(path, f"{exit_.name} lists a modality twice", "list each once")
    if parts == ["head"] and config.fusion.head in ("zero_shot", "linear"):
        return Problem(path, f"the head {config.fusion.head} has no layers", "head: transformer, or remove this exit")
    if not any(entry.layer for entry in entries) and set(parts) == set(config.encoders):
        return Problem(path, f"{exit_.name} is the last stage, which always answers", "remove this exit")
    return None


def _seen(config: Config, entries: Sequence[ExitEntry]) -> dict[str, float]:
    """Part → how much of it an exit sees: a layer, or infinity for all; the head's layers come after all modalities."""
    if entries[0].part == "head":
        return {**dict.fromkeys(config.encoders, float("inf")), "head": float(entries[0].layer or 0)}
    return {entry.part: float(entry.layer or "inf") for entry in entries}


def _runtime(config: Config) -> Iterator[Problem]:
    """A backend that would be handed memory which it can't read."""
    backend, device = config.runtime.backend, config.runtime.device
    if device.startswith("cuda") and backend in ON_THE_HOST:
        message = f"{backend} computes on the CPU, and runtime.device is {device}"
        yield Problem("runtime.backend", message, "backend: eager or tensorrt; or device: cpu")
    elif device == "cpu" and backend in ON_A_GPU:
        message = f"{backend} computes on an NVIDIA GPU, and runtime.device is {device}"
        yield Problem("runtime.backend", message, "device: cuda; or backend: eager, inductor, openvino or onnx")


def _input(config: Config) -> Iterator[Problem]:
    given = config.input
    if given.folder is not None and given.manifest is not None:
        yield Problem(
            "input.manifest", "folder and manifest both stand here", "keep one of them, and set the other to null"
        )
    if given.manifest is not None:
        if not given.manifest.lower().endswith((".csv", ".jsonl", ".parquet")):
            yield Problem(
                "input.manifest", f"{shown(given.manifest)} is no known table", "a .csv, .jsonl or .parquet file"
            )
        for key in ("pattern", "pair_by"):
            if getattr(given, key):
                yield Problem(f"input.{key}", f"{key} is for a folder, and this input is a manifest", f"remove {key}")
    for modality, pattern in given.pattern.items():
        path = f"input.pattern.{modality}"
        if pattern.count("{id}") != 1 or "{" in pattern.replace("{id}", ""):
            yield Problem(path, f"{shown(pattern)} needs exactly one {{id}}", 'for example "{id}/photo*.jpg"')
        elif pattern.startswith(("/", "~")) or ".." in pattern.split("/"):
            yield Problem(path, f"{shown(pattern)} leaves the folder", "a path inside input.folder")
