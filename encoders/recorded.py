"""An encoder as bytes: what a later start needs of it, so that it imports no model library and builds no model.

Weights stay in the files that they came from, and are named by file and key. What no file has (filter banks, tables of
positions) is in the bytes, as are the preparation's settings and the tokeniser. There is no code in them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from mmpipe.encoders.audio import Window, tone
from mmpipe.encoders.base import BuiltEncoder, EncoderError
from mmpipe.encoders.clip import ClipTokenise
from mmpipe.encoders.hf import read_tensors
from mmpipe.encoders.hub import Asked, is_newest, snapshot_of
from mmpipe.encoders.image import ResizeCrop, grey
from mmpipe.encoders.text import EXAMPLE, Prompts, Tokenise, Tokens

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_OWN_BYTES = 32 << 20  # of tensors that no file has
_MOST_FILES = 1000  # of a model's folder
_FIELDS = (
    *("modality", "dim", "preprocessing", "layers", "mask", "logit_scale", "max_seconds", "margin_seconds"),
    *("smallest_side", "grey", "notes", "files"),
)
_PLAIN: Mapping[str, type[ResizeCrop] | type[Window]] = {"ResizeCrop": ResizeCrop, "Window": Window}

_RECORD = "record"  # its place in the bytes

Whole = Callable[[], BuiltEncoder]


class Unrecordable(EncoderError):
    """A part of the encoder can't be told in plain data, or its weights are in no file that is known."""


class Changing(EncoderError):
    """A file of the model was written since it began to load: nobody knows which of the two was read."""


class RecordedModule(nn.Module):
    """An encoder's tensors under their names, without its computation. `about` is what was written with it."""

    def __init__(self, about: Any, whole: Whole) -> None:
        super().__init__()
        self.about, self._whole = about, whole

    def whole(self) -> nn.Module:
        """The module itself, loaded now. EncoderError as loading raises it."""
        return self._whole().module


@dataclass(frozen=True)
class _Source:
    """Where a tensor is read from; where two names share memory, the second's is the first's."""

    name: str
    parameter: bool
    persistent: bool
    file: int | None = None  # of the weight files; None: in the bytes, under its own name
    key: str = ""
    cast: bool = False  # the file has it in another number type
    same_as: str = ""


def written(encoder: BuiltEncoder, asked: Asked, about: Any, began_ns: int) -> bytes:
    """`encoder` as bytes, with what the caller wants to know of it (JSON). It is what is `asked` for, and began to load
    at `began_ns` (of `time.time_ns`). Raises Unrecordable, Changing.
    """
    files = [Path(name) for name in encoder.files]
    state = _state(files, asked)
    if state is None:
        raise Unrecordable(f"its folder holds more than {_MOST_FILES} files")
    if any(written_ns >= began_ns for _, written_ns, _ in state.values()):
        raise Changing("a file was written while the model was loaded")
    weights = [path for path in files if path.suffix in _WEIGHTS]
    try:
        prepare, found = _prepare(encoder), [read_tensors(path, str(path)) for path in weights]
    except EncoderError as error:
        raise Unrecordable(str(error)) from error
    sources, own = _sources(encoder.module, found)
    record = {
        "fields": {name: getattr(encoder, name) for name in _FIELDS},
        "has_prompts": encoder.prompts is not None,
        "prepare": prepare,
        "module": type(encoder.module).__qualname__,
        "weights": list(map(str, weights)),
        "tensors": [asdict(source) for source in sources],
        "state": state,
        "about": about,
    }
    return save(own, {_RECORD: json.dumps(record)})


def read(content: bytes, asked: Asked, whole: Whole) -> BuiltEncoder | None:
    """What `written` made of what is `asked` for; None: its files are not the same any more.

    `whole` loads the encoder itself: for texts to compare with, and for a module that computes.
    """
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]  # as safetensors lays it out
    record = json.loads(json.loads(header)["__metadata__"][_RECORD])
    files = [Path(name) for name in record["fields"]["files"]]
    if record["state"] != _state(files, asked):
        return None
    if asked.from_hub and not all(is_newest(path, asked.revision) for path in {f.parent: f for f in files}.values()):
        return None
    try:
        found = [read_tensors(Path(path), path) for path in record["weights"]]
    except EncoderError:
        return None
    return _built(record, load(content), found, whole)


def _built(
    record: Mapping[str, Any], own: Mapping[str, Tensor], files: Sequence[Mapping[str, Tensor]], whole: Whole
) -> BuiltEncoder:
    # a class of the same name, which counts in what is told of the module
    kind = type(record["module"].rpartition(".")[2], (RecordedModule,), {"__qualname__": record["module"]})
    module, tensors = kind(record["about"], whole), dict[str, Tensor]()
    for entry in record["tensors"]:
        source = _Source(**entry)
        if source.same_as:
            tensor = tensors[source.same_as]
        else:
            tensor = own[source.name] if source.file is None else files[source.file][source.key]
            tensor = tensor.float() if source.cast else tensor
            tensor = nn.Parameter(tensor, requires_grad=False) if source.parameter else tensor
        tensors[source.name] = tensor
        _put(module, source, tensor)
    prepare, example = _prepared_by(record["prepare"])
    return BuiltEncoder(
        module=module,
        prepare=prepare,
        prepare_fast=prepare.fast if isinstance(prepare, ResizeCrop) else None,
        example=example,
        prompts=(lambda texts: _prompts(whole(), texts)) if record["has_prompts"] else None,
        **record["fields"],
    )


def _prompts(encoder: BuiltEncoder, texts: Sequence[str]) -> Tensor:
    assert encoder.prompts is not None
    return encoder.prompts(texts)


def _put(root: nn.Module, source: _Source, tensor: Tensor) -> None:
    *path, last = source.name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part] or root
    if source.parameter:
        assert isinstance(tensor, nn.Parameter)
        root.register_parameter(last, tensor)
    else:
        root.register_buffer(last, tensor, persistent=source.persistent)


def _sources(module: nn.Module, files: Sequence[Mapping[str, Tensor]]) -> tuple[list[_Source], dict[str, Tensor]]:
    """Of each tensor of the module, in its order; and those that no file has. Raises Unrecordable."""
    by_shape: dict[tuple[int, ...], list[tuple[int, str]]] = {}
    for number, tensors in enumerate(files):
        for key, tensor in tensors.items():
            by_shape.setdefault(tuple(tensor.shape), []).append((number, key))
    persistent, first = {*module.state_dict()}, dict[int, str]()
    sources, own, own_bytes = [], dict[str, Tensor](), 0
    for name, tensor in _tensors(module):
        source = _Source(name, isinstance(tensor, nn.Parameter), name in persistent)
        if id(tensor) in first:
            sources.append(replace(source, same_as=first[id(tensor)]))
            continue
        first[id(tensor)] = name
        # names end alike, whatever a library puts before them
        near = sorted(by_shape.get(tuple(tensor.shape), ()), key=lambda place: -_alike(place[1], name))
        place = next(((n, key) for n, key in near if _is(tensor.detach(), files[n][key])), None)
        if place is None:
            own_bytes += tensor.numel() * tensor.element_size()
            if own_bytes > _OWN_BYTES:
                raise Unrecordable("its weights are not those of its files")
            own[name] = tensor.detach().contiguous().clone()
        else:
            number, key = place
            cast = files[number][key].dtype != tensor.dtype
            source = replace(source, file=number, key=key, cast=cast)
        sources.append(source)
    return sources, own


def _is(tensor: Tensor, there: Tensor) -> bool:
    """Whether `tensor` is what a file has, if in float32 for another number type."""
    if there.dtype != tensor.dtype and not (tensor.dtype == torch.float32 and there.is_floating_point()):
        return False
    return torch.equal(there.to(tensor.dtype), tensor)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Part by part, as a module tells of them; those too that stand twice or that no checkpoint holds."""
    for path, part in module.named_modules(remove_duplicate=False):
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor


def _alike(one: str, other: str) -> int:
    """How many of their last parts are the same."""
    count = 0
    for a, b in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count


def _prepare(encoder: BuiltEncoder) -> dict[str, Any]:
    prepare, prompts = encoder.host, encoder.prompts
    texts = prompts.prepare if isinstance(prompts, Prompts) else None
    if isinstance(texts, ClipTokenise) and not texts.is_open_clips:
        raise Unrecordable("its labels are split by a tokeniser of another repository")
    if isinstance(prepare, Tokenise) and isinstance(prepare.tokens, Tokens):
        settings = {field.name: getattr(prepare, field.name) for field in fields(prepare) if field.name != "tokens"}
        return {"kind": "Tokenise", "settings": settings, "tokens": prepare.tokens.written()}
    kind = type(prepare)
    if kind not in _PLAIN.values():
        raise Unrecordable(f"its preparation is a {kind.__name__}")
    assert isinstance(prepare, ResizeCrop | Window)
    return {"kind": kind.__name__, "settings": asdict(prepare)}


def _prepared_by(record: Mapping[str, Any]) -> tuple[Any, Any]:
    """(prepare, an example for it)."""
    if record["kind"] == "Tokenise":
        return Tokenise(Tokens.read(record["tokens"]), **record["settings"]), EXAMPLE
    prepare = _PLAIN[record["kind"]](**record["settings"])
    example = grey(prepare.height, prepare.width) if isinstance(prepare, ResizeCrop) else tone(prepare.rate_hz)
    return prepare, example


def _state(files: Sequence[Path], asked: Asked) -> dict[str, list[int]] | None:
    """What tells whether a model's files are still those that were read: size, time and place of them, and of all in
    the folders that were looked at. None: too many."""
    folders = {path.parent for path in files if path.suffix not in _WEIGHTS}
    folders |= {folder for path in files if (folder := snapshot_of(path)) is not None}
    folders |= {path for path in (asked.place, Path(asked.name)) if path is not None and path.is_dir()}
    found, seen = {*files}, 0
    for folder in folders:
        for place, _, names in os.walk(folder, followlinks=True):
            found |= {Path(place, name) for name in names}
            seen += 1 + len(names)
            if seen > _MOST_FILES:  # or links that lead in a circle
                return None
    state = {}
    for path in sorted(found):
        try:
            about = path.stat()
        except OSError:  # a link to nowhere, or gone meanwhile
            continue
        state[str(path)] = [about.st_size, about.st_mtime_ns, about.st_ino]
    return state
