"""Model ids: what they mean, where their files are looked for, which function builds them.

open_clip:NAME[/PRETRAINED]      an open_clip model; PRETRAINED is a tag or a local file or folder
open_clip:hf-hub:ORG/NAME        (or just hf-hub:ORG/NAME) an open_clip model folder on the hub
hf:ORG/NAME[@REVISION]           a transformers or sentence-transformers model; a bare ORG/NAME means this
tiny:NAME                        the small models that come with the package
package.module:Class             your own class

A local path that exists wins over a name of the same spelling. Local paths are relative to `base`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpipe.encoders.base import BuiltEncoder, Encoder, EncoderError, MissingPackage

MODALITIES = ("image", "text", "audio")
FOLDER_CONFIGS = {"open_clip_config.json": "open_clip", "modules.json": "hf", "config.json": "hf"}
OWN_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")

# Small files first, then safetensors; pickles only where a folder has nothing else.
CONFIG_PATTERNS = ["*.json", "*.txt", "*.model", "*/model.safetensors", "*/pytorch_model.bin"]
SAFE_PATTERNS = ["model.safetensors", "model-*.safetensors", "open_clip_model.safetensors"]
PICKLE_PATTERNS = ["pytorch_model.bin", "pytorch_model-*.bin", "open_clip_pytorch_model.bin"]
OTHER_RUNTIMES = ["onnx/*", "openvino/*", "coreml/*", "*.onnx", "*.msgpack", "*.h5"]

OWN = "own"  # the kind of a class of the user's
TINY = "tiny"  # the kind of the models that ship with the package
_LIBRARIES = ("timm", "torchvision", "torchaudio")  # of models: "timm:resnet50" is no class of anybody's

_factories: dict[str, str] = {}


def register(kind: str, factory: str) -> None:
    """Adds a kind of model id. `factory` is "module:function", imported when first used.

    The function is called as function(name, modality, *, weights, max_tokens, max_seconds) → BuiltEncoder.
    """
    if kind in _factories:
        raise EncoderError(f"the kind '{kind}' is already registered, for {_factories[kind]}")
    _factories[kind] = factory


register("open_clip", "mmpipe.encoders.clip:load")
register("hf", "mmpipe.encoders.hf:load")
register(TINY, "mmpipe.encoders.tiny:load")


@dataclass(frozen=True)
class Asked:
    """A model id and what is asked of it, checked and looked up: nothing is loaded yet."""

    kind: str
    name: str  # within the kind
    modality: str
    place: Path | None  # a local file or folder for the weights
    from_hub: bool  # the id is no local path: the hub may have other files by now
    max_tokens: int | None
    max_seconds: float | None

    @property
    def revision(self) -> str | None:
        return self.name.partition("@")[2] or None


def load(
    model: str,
    modality: str,
    *,
    weights: str | Path | None = None,
    max_tokens: int | None = None,
    max_seconds: float | None = None,
    options: Mapping[str, Any] | None = None,
    base: Path | None = None,
) -> Encoder:
    """Builds the encoder that `model` names, for one of "image", "text", "audio".

    `weights`: a local file or folder to use for the weights. `max_tokens`: the fixed length [tokens] that text is cut
    or padded to. `max_seconds`: sound beyond this is ignored. `options`: arguments for a class of your own. `base`: the
    folder that relative paths, and modules of your own, are found in; default: the current directory.

    Raises EncoderError; MissingPackage where a package isn't installed.
    """
    base = Path.cwd() if base is None else Path(base)
    what = asked(model, modality, weights=weights, max_tokens=max_tokens, max_seconds=max_seconds, base=base)
    if what.kind == OWN:
        if weights is not None or max_tokens is not None or max_seconds is not None:
            raise EncoderError(f"{model}: weights, max_tokens and max_seconds are for built-in kinds; use options")
        from mmpipe.encoders.own import load_own

        return load_own(what.name, modality, dict(options or {}), base)
    if options:
        raise EncoderError(
            f"{model}: options ({', '.join(options)}) are for a class of your own (package.module:Class)"
        )
    function = _factory(what.kind)
    # those that ship use no model library, and keeping one quiet would import it: longer than all that they load
    with nullcontext() if what.kind == TINY else quiet():
        return function(
            what.name, modality, weights=what.place, max_tokens=what.max_tokens, max_seconds=what.max_seconds
        )


def asked(
    model: str,
    modality: str,
    *,
    weights: str | Path | None = None,
    max_tokens: int | None = None,
    max_seconds: float | None = None,
    base: Path,
) -> Asked:
    """What `load` would load. Raises EncoderError."""
    if modality not in MODALITIES:
        raise EncoderError(f"no modality '{modality}'; there are {', '.join(MODALITIES)}")
    if max_tokens is not None and max_tokens < 1:
        raise EncoderError(f"max_tokens is {max_tokens}; it must be at least 1", "max_tokens")
    if max_seconds is not None and not max_seconds > 0:
        raise EncoderError(f"max_seconds is {max_seconds}; it must be above 0", "max_seconds")
    path = None if weights is None else _local(str(weights), base)
    if weights is not None and path is None:
        raise EncoderError(f"{model}: weights '{weights}': no such file or folder in {base}", "weights")
    kind, name, found = parse(model, base)
    if path is not None and found is not None:
        name = str(found)  # the folder still gives the configuration; its weights are replaced
    from_hub = found is None and kind not in (TINY, OWN)
    return Asked(kind, name, modality, path or found, from_hub, max_tokens, max_seconds)


def pull(
    model: str,
    modality: str,
    *,
    weights: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    base: Path | None = None,
) -> list[str]:
    """Fetches what `model` needs and checks that it loads. Returns the files it was loaded from, weights first."""
    encoder = load(model, modality, weights=weights, options=options, base=base)
    return list(encoder.files) if isinstance(encoder, BuiltEncoder) else []


def parse(model: str, base: Path) -> tuple[str, str, Path | None]:
    """(kind, name within the kind, a local file or folder for the weights or None)."""
    if not model.strip():
        raise EncoderError("the model id is empty; write one such as hf:ORG/NAME or open_clip:NAME/PRETRAINED")
    if model.startswith("hf-hub:"):
        return "open_clip", model, None
    kind, colon, rest = model.partition(":")
    if colon and kind in _factories:
        if not rest:
            raise EncoderError(f"'{model}' names no model; write {kind}:NAME")
        if kind == TINY:  # a folder of photos, called photo, is no model
            return kind, rest, None
        found = _local(rest, base)
        if found is None and kind == "open_clip" and not rest.startswith("hf-hub:"):
            architecture, _, pretrained = rest.partition("/")
            found = _local(pretrained, base) if pretrained else None
            return kind, architecture if found else rest, found
        return kind, rest, found
    if OWN_CLASS.fullmatch(model) and ("." in kind or _is_own_module(kind, base)):
        return OWN, model, None
    if (folder := _local(model, base)) is not None:
        for config, of_kind in FOLDER_CONFIGS.items():
            if (folder / config).is_file():
                return of_kind, model, folder
        raise EncoderError(f"{folder} holds none of {', '.join(FOLDER_CONFIGS)}: write the kind, as in open_clip:NAME")
    if not colon and HUB_ID.fullmatch(model) and "/" in model:
        return "hf", model, None
    raise EncoderError(
        f"can't read the model id '{model}': known kinds are {', '.join(f'{known}:' for known in sorted(_factories))}; "
        f"else a hub id (ORG/NAME), a local folder, or your own package.module:Class (looked for in {base} too)"
    )


def _is_own_module(name: str, base: Path) -> bool:
    """Beside the configuration, or installed; the packages whose name is a kind of model are nobody's own."""
    if (base / f"{name}.py").is_file() or (base / name).is_dir():
        return True
    try:
        return name not in _LIBRARIES and importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # ValueError: a module such as __main__, without a spec
        return False


def _local(text: str, base: Path) -> Path | None:
    path = base / Path(text).expanduser()
    return path.resolve() if path.exists() else None


def _factory(kind: str) -> Callable[..., BuiltEncoder]:
    module, _, function = _factories[kind].partition(":")
    found: Callable[..., BuiltEncoder] = getattr(importlib.import_module(module), function)
    return found


def fetch(model: str, repository: str, revision: str | None = None) -> Path:
    """The local snapshot folder of a hub repository: from the cache, else downloaded. Errors name `model`."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingPackage("huggingface_hub", "hf", model) from error

    def download(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=OTHER_RUNTIMES)
        )

    try:
        folder = download(CONFIG_PATTERNS + SAFE_PATTERNS)
        if not any(folder.glob("*.safetensors")):
            folder = download(CONFIG_PATTERNS + PICKLE_PATTERNS)
    except LocalEntryNotFoundError as error:
        raise EncoderError(
            f"{model}: '{repository}' is not in the local cache and can't be downloaded (offline, or no such "
            "repository). Fetch it once with network (mmpipe pull CONFIG), copy the cache (HF_HOME), or set weights to "
            "a local folder"
        ) from error
    except HFValidationError as error:
        raise EncoderError(f"{model}: '{repository}' is no hub id, and no folder of that name exists") from error
    except (HfHubHTTPError, OSError) as error:
        raise EncoderError(
            f"{model}: downloading '{repository}' failed: {str(error).splitlines()[0]}. Check the id and the "
            "network; gated or private models need HF_TOKEN"
        ) from error
    return folder


def snapshot_of(path: Path) -> Path | None:
    """The folder of the hub repository's local snapshot that a file is in."""
    for folder in path.parents:
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder
    return None


def is_newest(path: Path, revision: str | None) -> bool:
    """Whether a file of a local snapshot is what the hub has under `revision` now, as far as it can be asked. True of a
    file that is in no snapshot."""
    folder = snapshot_of(path)
    if folder is None:
        return True
    repository = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, path.relative_to(folder).as_posix(), revision=revision)) == path
    except (ImportError, OSError, ValueError):  # the hub's own errors are of these: loading will tell
        return False


def read_json(path: Path, model: str) -> dict[str, Any]:
    """A JSON object from a model folder; EncoderError where it's missing or broken."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise EncoderError(f"{model}: {path} is missing: this is not a complete model folder") from error
    except (OSError, ValueError) as error:
        raise EncoderError(f"{model}: {path} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise EncoderError(f"{model}: {path} holds no JSON object")
    return value


@contextmanager
def quiet() -> Iterator[None]:
    """Model libraries write reports, progress bars and warnings while loading; errors still reach the caller."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    bars = _progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for disable, _ in bars:
                disable()
            yield
    finally:
        logging.disable(before)
        for _, enable in bars:
            enable()


def _progress_bars() -> list[tuple[Callable[[], None], Callable[[], None]]]:
    """(disable, enable) of each library whose bars are on now."""
    bars: list[tuple[Callable[[], None], Callable[[], None]]] = []
    try:
        hub: Any = importlib.import_module("huggingface_hub.utils")
        if not hub.are_progress_bars_disabled():
            bars.append((hub.disable_progress_bars, hub.enable_progress_bars))
        transformers: Any = importlib.import_module("transformers.utils.logging")
        if transformers.is_progress_bar_enabled():
            bars.append((transformers.disable_progress_bar, transformers.enable_progress_bar))
    except ImportError:
        pass  # not installed: nothing to keep quiet
    return bars
