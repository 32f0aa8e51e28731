"""Models in transformers' own format: finding the folder, and loading weights so that none is ever left random."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpipe.encoders.base import BuiltEncoder, EncoderError, MissingPackage
from mmpipe.encoders.hub import fetch, read_json

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
DERIVED = re.compile(r"(^|\.)(position_ids|token_type_ids|num_batches_tracked)$")  # not learned


@dataclass(frozen=True)
class Source:
    """Where a model is read from: `folder` has its configuration, `weights_file` replaces the weights beside it."""

    model: str  # the id, for messages
    folder: Path
    weights_file: Path | None = None

    def within(self, part: str) -> Source:
        return replace(self, folder=self.folder / part)

    def config(self) -> dict[str, Any]:
        """config.json; one that asks for code from the hub is refused."""
        config = read_json(self.folder / "config.json", self.model)
        if "auto_map" in config:
            raise EncoderError(
                f"{self.model}: {self.folder / 'config.json'} has auto_map: this model runs Python code from its "
                "repository, which is never done here. Wrap it in a class of your own (package.module:Class)"
            )
        return config

    def optional(self, *names: str) -> dict[str, Any]:
        """The first of these JSON files that exists, else {}."""
        found = next((self.folder / name for name in names if (self.folder / name).is_file()), None)
        return {} if found is None else read_json(found, self.model)

    def files(self) -> list[str]:
        """What was read, weights first."""
        weights = self.weights_file or next(
            (self.folder / name for name in WEIGHT_FILES if (self.folder / name).is_file()), None
        )
        shards = sorted(weights.parent.glob(weights.name.split(".")[0] + "-*")) if weights is not None else []
        configs = sorted(path for path in self.folder.iterdir() if path.suffix in (".json", ".txt", ".model"))
        found = ([weights] if weights is not None else []) + shards + [path for path in configs if path != weights]
        return [str(path) for path in found]


def load(
    name: str, modality: str, *, weights: Path | None, max_tokens: int | None, max_seconds: float | None
) -> BuiltEncoder:
    """The factory of `hf:` ids. `weights`: a model folder used instead of the hub's, or a file of weights alone."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingPackage("transformers", "hf", f"hf:{name}") from error
    source = find(name, weights)
    if modality == "text":
        from mmpipe.encoders.text import load_text

        return load_text(source, max_tokens)
    if modality == "image":
        from mmpipe.encoders.image import load_image

        return load_image(source)
    from mmpipe.encoders.audio import load_audio

    return load_audio(source, max_seconds)


def find(name: str, weights: Path | None) -> Source:
    """The folder of `name`: `weights` where that is one, else the hub's (cached or downloaded)."""
    model = f"hf:{name}"
    if weights is not None and weights.is_dir():
        return Source(model, weights)
    if Path(name).is_absolute() and Path(name).is_dir():
        return Source(model, Path(name), weights)
    if name.startswith((".", "/", "~")):
        raise EncoderError(f"{model}: no such folder")
    repository, _, revision = name.partition("@")
    return Source(model, fetch(model, repository, revision or None), weights)


def pretrained(cls: Any, source: Source, **arguments: Any) -> Any:
    """cls.from_pretrained in float32, with every tensor of the model read from the checkpoint, or EncoderError.

    Tensors beyond the model are fine where they belong to a part that isn't used (a language-model head), and an
    error inside the parts that are used: then the configuration and the weights are of different models.
    """
    # scaled_dot_product_attention where the architecture can; CLAP's windows and MPNet's relative biases can't.
    attention = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"
    arguments |= {"dtype": torch.float32, "attn_implementation": attention, "output_loading_info": True}
    arguments["ignore_mismatched_sizes"] = True  # so that they are reported here, by name, and refused below
    try:
        if source.weights_file is not None:
            state = read_tensors(source.weights_file, source.model)
            config = cls.config_class.from_pretrained(source.folder)
            model, report = cls.from_pretrained(None, config=config, state_dict=state, **arguments)
        else:
            if not any((source.folder / name).is_file() for name in WEIGHT_FILES):
                raise EncoderError(
                    f"{source.model}: {source.folder} holds no weights ({', '.join(WEIGHT_FILES)}); "
                    "fetch the model again, or set weights to a file"
                )
            model, report = cls.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=False, weights_only=True, **arguments
            )
    except EncoderError:
        raise
    except Exception as error:  # transformers raises RuntimeError, OSError, ValueError, safetensors' and pickle's own
        where = source.weights_file or source.folder
        raise EncoderError(
            f"{source.model}: {where} can't be loaded as {cls.__name__}: {_first_line(error)}"
        ) from error
    prefix = f"{model.base_model_prefix}."
    parts = {key.partition(".")[0] for key in model.state_dict()}
    stray = [
        key
        for key in report["unexpected_keys"]
        if key.removeprefix(prefix).partition(".")[0] in parts and not DERIVED.search(key)
    ]
    missing = [key for key in report["missing_keys"] if not DERIVED.search(key)]
    wrong = [str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]]
    refuse(source.model, source.weights_file or source.folder, missing=missing, stray=stray, wrong_shape=wrong)
    return model.eval()


def refuse(model: str, where: Path, *, missing: list[str], stray: list[str], wrong_shape: list[str]) -> None:
    """EncoderError if a checkpoint and a model don't fit each other: nothing is ever filled with random numbers."""
    said = [
        f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', …' if len(keys) > 3 else ''})"
        for keys, what in ((missing, "missing"), (wrong_shape, "of another shape"), (stray, "not in the model"))
        if keys
    ]
    if said:
        raise EncoderError(
            f"{model}: the weights in {where} don't fit the model's configuration; tensors: {'; '.join(said)}. "
            "Use the weights and configuration of one model"
        )


def read_tensors(path: Path, model: str) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, or from a pickle that is allowed to hold nothing but tensors."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # what PyTorch wrote before 1.6 is no zip file
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # safetensors, zip and pickle each raise their own
        raise EncoderError(f"{model}: {path} can't be read as weights: {_first_line(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise EncoderError(f"{model}: {path} is not a dictionary of tensors")
    return state


def load_strictly(module: nn.Module, path: Path, model: str) -> None:
    """Fills `module` from one file whose names and shapes must be exactly the module's own."""
    state, own = read_tensors(path, model), module.state_dict()
    wrong = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    refuse(
        model, path, missing=list(own.keys() - state.keys()), stray=list(state.keys() - own.keys()), wrong_shape=wrong
    )
    module.load_state_dict(state)


def tokenizer_of(source: Source) -> Any:
    """The folder's tokeniser, padding on the right."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever its backend raises
        raise EncoderError(f"{source.model}: {source.folder} has no usable tokeniser: {_first_line(error)}") from error
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
