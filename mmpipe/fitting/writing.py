"""What was fitted → head.safetensors, and a configuration that runs it.

The configuration is the source's, less what was replaced; every path in it is relative to its own folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmpipe.config import Config, parse_model
from mmpipe.config.check import values_at
from mmpipe.config.keys import PATH_KEYS
from mmpipe.fitting.training import MAX_DISAGREEMENT, Fitted
from mmpipe.fusion.checkpoint import save_checkpoint

_KEPT = ("options", "confidence", "audit", "deliberate", "on_mismatch")  # of fusion: the rest is about another head
CHECKPOINT, CONFIG, REPORT = "head.safetensors", "config.yaml", "fit.html"


def write_head(folder: Path, fitted: Fitted, labels: Sequence[str], dims: Mapping[str, int]) -> None:
    """The head and the probes of those exits that were kept. Raises OSError."""
    probes = {}
    for exit_, threshold in zip(fitted.exits, fitted.thresholds, strict=True):
        if threshold is not None and exit_.name in fitted.probes:
            probes[f"{exit_.name}.weight"] = fitted.probes[exit_.name].weight_LF
            probes[f"{exit_.name}.bias"] = fitted.probes[exit_.name].bias_L
    options = fitted.options if fitted.kind in ("linear", "transformer") else {}
    save_checkpoint(
        folder / CHECKPOINT, fitted.head, kind=fitted.kind, labels=labels, dims=dims, options=options, probes=probes
    )


def write_config(folder: Path, config: Config, fitted: Fitted, labels: Sequence[str], told: str) -> None:
    """DIR/config.yaml. `told`: what the head is worth, for a comment. Raises OSError."""
    data = _plain(config)
    for pattern in PATH_KEYS:
        for path, written in list(values_at(data, pattern)):
            if isinstance(written, str):
                _set(data, path, _relative(config.resolve(written), folder))
    for settings in data["encoders"].values():
        model = parse_model(settings["model"])
        if model.path is not None:
            settings["model"] = settings["model"].removesuffix(model.path) + _relative(
                config.resolve(model.path), folder
            )
        elif ":" in settings["model"]:
            _bring(config, settings["model"], folder)
    _bring(config, fitted.kind, folder)
    kept = [
        {"after": list(exit_.after) if len(exit_.after) > 1 else exit_.after[0], "threshold": _rounded(threshold)}
        for exit_, threshold in zip(fitted.exits, fitted.thresholds, strict=True)
        if threshold is not None
    ]
    fusion = {key: value for key, value in data.get("fusion", {}).items() if key in _KEPT}
    output = {"folder": f"out/{folder.resolve().name}", **data.get("output", {})}
    sections: list[tuple[str, dict[str, Any]]] = [
        ("", {"task": "classify", "labels": list(labels)}),
        ("", {"encoders": data["encoders"]}),
        (_exits_comment(fitted), {"fusion": {"head": fitted.kind, "checkpoint": CHECKPOINT, **fusion, "exits": kept}}),
        *(("", {key: data[key]}) for key in ("runtime", "input") if data.get(key)),
        ("relative to where mmpipe is run; or --output DIR", {"output": output}),
    ]
    text = _comment(
        f"Written by `mmpipe fit`. The head in {CHECKPOINT} was trained for these encoders and labels.\n{told}\n\n"
        f"    mmpipe run {folder.name}/{CONFIG} --input FOLDER\n\n"
        f"{REPORT} shows how it was trained and measured; every key is in docs/configuration.md."
    )
    for comment, section in sections:
        dumped = yaml.safe_dump(section, sort_keys=False, allow_unicode=True, width=110)
        text += "\n" + (_comment(comment) if comment else "") + dumped
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _plain(config: Config) -> dict[str, Any]:
    """What was written in the source, as YAML holds it."""
    data: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    return data


def _set(data: dict[str, Any], path: str, value: str) -> None:
    *around, last = path.split(".")
    for part in around:
        data = data[part]
    data[last] = value


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path.absolute(), folder.resolve())).as_posix()
    except ValueError:  # another drive
        return str(path.absolute())


def _bring(config: Config, name: str, folder: Path) -> None:
    """Copy the module of a user's own class that lies beside the source: it is looked up beside the configuration."""
    module = name.partition(":")[0].partition(".")[0]
    file, package = config.source.folder / f"{module}.py", config.source.folder / module
    if ":" not in name or (folder / file.name).exists() or (folder / module).exists():
        return
    if file.is_file():
        shutil.copyfile(file, folder / file.name)
    elif (package / "__init__.py").is_file():
        shutil.copytree(package, folder / module, ignore=shutil.ignore_patterns("__pycache__"))


def _rounded(threshold: float) -> float:
    """Down, to five digits: whoever left still leaves."""
    return int(threshold * 1e5) / 1e5


def _exits_comment(fitted: Fitted) -> str:
    if not fitted.exits:
        return ""
    lost = [exit_.name for exit_, threshold in zip(fitted.exits, fitted.thresholds, strict=True) if threshold is None]
    told = (
        f"Thresholds: on the validation part, which the head had not seen then, the exits together differ from the\n"
        f"full pipeline on at most {MAX_DISAGREEMENT:.0%} of the samples. That promises nothing of other samples: "
        "`mmpipe calibrate` does."
    )
    return told + (f"\nLeft out, as no threshold kept that bound: {', '.join(lost)}." if lost else "")


def _comment(text: str) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in text.splitlines())
