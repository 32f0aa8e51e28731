"""open_clip models: both towers, their weights from a tag, a hub folder, or a local file or folder."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmpipe.encoders.base import BuiltEncoder, EncoderError, MissingPackage, output_dim
from mmpipe.encoders.hf import read_tensors, refuse
from mmpipe.encoders.hub import fetch
from mmpipe.encoders.image import Normalised, ResizeCrop, grey
from mmpipe.encoders.text import EXAMPLE, Prompts, as_far_as_read

CONFIG = "open_clip_config.json"
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)


_MOST_WORDS = 100_000  # that open_clip's tokeniser remembers: for ever, if nobody forgets them


@dataclass(frozen=True)
class _Found:
    """Where an open_clip model comes from. `name` is what open_clip itself is asked for."""

    model: str
    name: str
    weights: Path
    arguments: dict[str, Any]  # for create_model
    notes: tuple[str, ...] = ()
    folder: Path | None = None  # of its own configuration; None: open_clip's


class ClipText(nn.Module):
    """input_ids [B, T] → [B, dim], not normalised, through the text side of an open_clip model."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.clip.encode_text(input_ids)
        return out


@dataclass(frozen=True)
class ClipTokenise:
    """A str → int64 input_ids [T], by open_clip's tokeniser."""

    tokenizer: Any
    max_tokens: int

    @property
    def is_open_clips(self) -> bool:
        """Its tokeniser comes with open_clip, not from the hub."""
        return type(self.tokenizer).__name__ == "SimpleTokenizer"

    def __call__(self, text: str) -> dict[str, Tensor]:
        if not isinstance(text, str):
            raise EncoderError(f"a text encoder takes a str, not a {type(text).__name__}")
        return {"input_ids": torch.tensor(self._ids(text), dtype=torch.int64)}

    def _ids(self, text: str) -> list[int]:
        tokenizer = self.tokenizer

        def encode(part: str) -> list[int]:
            found: list[int] = tokenizer([part], context_length=self.max_tokens)[0].tolist()
            return found

        if not self.is_open_clips or tokenizer.reduction_fn is not None:
            return encode(text)
        if len(tokenizer.cache) > _MOST_WORDS:
            specials = list(tokenizer.cache)[: len(tokenizer.all_special_ids)]
            tokenizer.cache = {special: special for special in specials}
        # Its time goes with the square of a word's length. What mends and unescapes looks at the whole, and once only.
        text, tokenizer = tokenizer.clean_fn(text), copy.copy(tokenizer)
        tokenizer.clean_fn = str
        return as_far_as_read(text, self.max_tokens, encode, lambda ids: ids[-1] == tokenizer.eot_token_id)


def load(
    name: str, modality: str, *, weights: Path | None, max_tokens: int | None, max_seconds: float | None
) -> BuiltEncoder:
    """The factory of `open_clip:` ids, for images and text."""
    try:
        import open_clip
    except ImportError as error:
        raise MissingPackage("open_clip_torch", "open_clip", f"open_clip:{name}") from error
    if modality == "audio":
        raise EncoderError(f"open_clip:{name} has an image and a text tower, none for audio")
    found = _find(name, weights)
    clip = _create(found)
    scale = float(clip.logit_scale.exp())
    try:
        tokenizer = open_clip.get_tokenizer(found.name)
    except Exception as error:  # a tokeniser from the hub: network, cache or its own format
        raise EncoderError(f"{found.model}: its tokeniser can't be loaded: {error}") from error
    visual, clip.visual = clip.visual, None
    text = ClipText(clip).eval()
    configs = dict.fromkeys(folder / CONFIG for folder in (found.weights.parent, found.folder) if folder is not None)
    files = [str(found.weights), *(str(path) for path in configs if path.is_file())]
    if modality == "image":
        return _image(found, visual, Prompts(text, ClipTokenise(tokenizer, int(clip.context_length))), scale, files)
    length = _shorten(clip, max_tokens, found.model)
    prepare = ClipTokenise(tokenizer, length)
    blocks = next(
        (path for path in ("clip.transformer.resblocks", "clip.text.transformer.resblocks") if _has(text, path)), None
    )
    return BuiltEncoder(
        modality="text",
        dim=output_dim(text, prepare(EXAMPLE)),
        module=text,
        prepare=prepare,
        example=EXAMPLE,
        preprocessing={"max_tokens": length, "tokenizer": type(tokenizer).__name__},
        layers=blocks,
        prompts=Prompts(text, prepare),
        logit_scale=scale,
        notes=[*found.notes, f"text is cut or padded to {length} tokens"],
        files=files,
    )


def _image(found: _Found, visual: Any, prompts: Prompts, scale: float, files: list[str]) -> BuiltEncoder:
    config = visual.preprocess_cfg
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    filter_ = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    resize = ResizeCrop(height, width, config["resize_mode"], None, filter_, config["fill_color"])
    mean, std = list(config["mean"]), list(config["std"])
    module = Normalised(visual, mean, std)
    example = grey(height, width)
    return BuiltEncoder(
        modality="image",
        dim=output_dim(module, resize(example)),
        module=module,
        prepare=resize,
        smallest_side=resize.smallest_side,
        prepare_fast=resize.fast,
        example=example,
        preprocessing=asdict(resize) | {"mean": mean, "std": std},
        layers="visual.transformer.resblocks" if _has(module, "visual.transformer.resblocks") else None,
        prompts=prompts,
        logit_scale=scale,
        notes=found.notes,
        files=files,
    )


def _find(name: str, weights: Path | None) -> _Found:
    import open_clip

    model = f"open_clip:{name}"
    if name.startswith("hf-hub:"):
        model = name if weights is None else f"{name} ({weights})"
        if weights is not None and weights.is_dir():
            return _in_folder(model, weights)
        return _in_folder(model, fetch(model, *_revision(name.removeprefix("hf-hub:"))), weights)
    if weights is not None and (weights / CONFIG).is_file():
        return _in_folder(model, weights)
    if Path(name).is_absolute() and (Path(name) / CONFIG).is_file():
        return _in_folder(model, Path(name), weights)
    architecture, _, tag = name.partition("/")
    if open_clip.get_model_config(architecture) is None:
        close = difflib.get_close_matches(architecture, open_clip.list_models(), n=4)
        raise EncoderError(
            f"{model}: open_clip has no architecture '{architecture}'"
            + (f"; near it: {', '.join(close)}" if close else "; and no such local folder exists")
        )
    config = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    arguments: dict[str, Any] = {}
    notes: list[str] = []
    if config:
        arguments["force_preprocess_cfg"] = {
            key: config[key] for key in ("mean", "std", "interpolation", "resize_mode") if config.get(key) is not None
        }
        if config.get("quick_gelu") and not open_clip.get_model_config(architecture).get("quick_gelu"):
            arguments["force_quick_gelu"] = True
            notes.append(f"'{tag}' was trained with QuickGELU, so it is used here")
    elif weights is not None:
        notes.append("no tag in the model id: pictures are prepared as open_clip's default says")
    if weights is not None:
        return _Found(model, architecture, _file_in(model, weights), arguments, tuple(notes))
    if not config:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        said = f"'{tag}' is neither a tag nor a local file" if tag else "no weights are named"
        raise EncoderError(
            f"{model}: {said}, and random weights are never used. Write open_clip:{architecture}/TAG "
            f"(tags: {known}), or set weights to a local file or folder"
        )
    try:
        path = Path(open_clip.download_pretrained(config))
    except Exception as error:  # the hub's, urllib's and open_clip's own
        lines = str(error).splitlines() or [type(error).__name__]
        raise EncoderError(
            f"{model}: the weights '{tag}' are not in the local cache and can't be downloaded. "
            "Fetch them once with network (mmpipe pull CONFIG), copy the cache (HF_HOME), or set weights to a local "
            "file. The download said: "
            f"{lines[0]}"
        ) from error
    return _Found(model, architecture, path, arguments, tuple(notes))


def _in_folder(model: str, folder: Path, weights: Path | None = None) -> _Found:
    if not (folder / CONFIG).is_file():
        raise EncoderError(f"{model}: {folder} has no {CONFIG}")
    return _Found(model, f"local-dir:{folder}", _file_in(model, weights or folder), {}, folder=folder)


def _file_in(model: str, weights: Path) -> Path:
    if weights.is_file():
        return weights
    for file in WEIGHT_FILES:
        if (weights / file).is_file():
            return weights / file
    raise EncoderError(f"{model}: {weights} holds none of {', '.join(WEIGHT_FILES)}")


def _create(found: _Found) -> Any:
    """The model with found's weights. open_clip would stretch position embeddings that don't fit: refused here."""
    import open_clip

    try:
        strict = found.weights.suffix not in (".npz", ".npy")
        with _Unfilled() if strict else contextlib.nullcontext():  # the weights come next, strictly all of them
            clip = open_clip.create_model(
                found.name, load_weights=False, pretrained_image=False, pretrained_text=False, **found.arguments
            )
        own = clip.state_dict()
        if strict:
            wrong = [
                key
                for key, value in read_tensors(found.weights, found.model).items()
                if key in own and own[key].shape != value.shape and own[key].numel() > 1
            ]
            refuse(found.model, found.weights, missing=[], stray=[], wrong_shape=wrong)
        # the file's own tensors, which are mapped into memory, in place of copies of them
        clip.load_state_dict = functools.partial(clip.load_state_dict, assign=True)
        open_clip.load_checkpoint(clip, str(found.weights), strict=True, weights_only=True)
        del clip.load_state_dict
    except EncoderError:
        raise
    except Exception as error:  # a wrong architecture, a strict load's report, a file that is no checkpoint
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        raise EncoderError(
            f"{found.model}: {found.weights} can't be loaded: {' '.join(lines[:3])[:400]}. "
            "Use the weights of exactly this model"
        ) from error
    return clip.eval().float()


class _Unfilled(TorchFunctionMode):
    """Inside, new parameters are not filled with random numbers: half of the time that CLIP takes to load."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


# nn.init's own too: what they call inside is out of this mode's sight
_RANDOM = frozenset(
    {
        *(Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.trunc_normal_),
        *(nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.xavier_normal_),
    }
)


def _shorten(clip: Any, max_tokens: int | None, model: str) -> int:
    """Cuts the text tower to max_tokens positions; returns the length in use."""
    longest = int(clip.context_length)
    if max_tokens is None or max_tokens == longest:
        return longest
    tower = getattr(clip, "text", clip)
    if not (3 <= max_tokens < longest) or not isinstance(getattr(tower, "positional_embedding", None), nn.Parameter):
        raise EncoderError(
            f"{model}: max_tokens is {max_tokens}; this text tower takes 3 to {longest}, or only {longest}",
            "max_tokens",
        )
    if getattr(tower, "cls_emb", None) is not None or getattr(tower, "text_pool_type", "argmax") == "last":
        raise EncoderError(
            f"{model}: this text tower reads its last position, so max_tokens can't be changed", "max_tokens"
        )
    tower.positional_embedding = nn.Parameter(tower.positional_embedding[:max_tokens].clone(), requires_grad=False)
    if tower.attn_mask is not None:
        tower.attn_mask = tower.attn_mask[:max_tokens, :max_tokens].clone()
    return max_tokens


def _has(module: nn.Module, path: str) -> bool:
    try:
        return isinstance(module.get_submodule(path), nn.ModuleList)
    except AttributeError:
        return False


def _revision(name: str) -> tuple[str, str | None]:
    repository, _, revision = name.partition("@")
    return repository, revision or None
