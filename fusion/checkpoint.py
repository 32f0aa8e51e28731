"""Heads on disk: safetensors with what they were trained for, and heads of a user's own.

The file's metadata `mmpipe.head` is JSON: {"head": kind, "labels": […], "modalities": {name: dim}, "options": {…}}.
Tensors named `exits.PLACE.weight` and `.bias` are probes of exits inside encoders; all others are the head's.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpipe.fusion.heads import HeadError, LinearHead, TransformerHead


@dataclass(frozen=True)
class Checkpoint:
    """A head's safetensors: the head's weights, the probes of exits inside encoders, and what it was trained for."""

    path: Path
    meta: dict[str, Any]  # the JSON under `mmpipe.head`: head, labels, modalities {name: dim}, options
    weights: dict[str, Tensor]
    probes: dict[str, Tensor]  # "image.layer4.weight" [label, dim], "image.layer4.bias" [label]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and split a head's safetensors file; raises HeadError when it isn't one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise HeadError(f"{path.name} can't be read as safetensors: {error}") from error
    if "mmpipe.head" not in metadata:
        raise HeadError(f"{path.name} has no 'mmpipe.head' metadata: it is not a head made for mmpipe")
    try:
        meta = json.loads(metadata["mmpipe.head"])
    except json.JSONDecodeError as error:
        raise HeadError(f"{path.name}: its 'mmpipe.head' metadata is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise HeadError(f"{path.name}: its 'mmpipe.head' metadata must be a JSON object")
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("exits.")}
    probes = {name.removeprefix("exits."): tensor for name, tensor in tensors.items() if name.startswith("exits.")}
    return Checkpoint(path, meta, weights, probes)


def save_checkpoint(
    path: Path,
    head: nn.Module,
    *,
    kind: str,
    labels: Sequence[str],
    dims: Mapping[str, int],
    options: Mapping[str, Any] | None = None,
    probes: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what `read_checkpoint` and `load_head` read."""
    from safetensors.torch import save_file

    meta = {"head": kind, "labels": list(labels), "modalities": dict(dims), "options": dict(options or {})}
    tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
    tensors |= {f"exits.{name}": tensor.contiguous() for name, tensor in (probes or {}).items()}
    save_file(tensors, str(path), metadata={"mmpipe.head": json.dumps(meta)})


TRAINED_HEADS: dict[str, Any] = {"linear": LinearHead, "transformer": TransformerHead}


def load_head(
    kind: str,
    dims: Mapping[str, int],
    labels: Sequence[str],
    *,
    checkpoint: Checkpoint | None,
    options: Mapping[str, Any] | None = None,
    base: Path | None = None,
) -> nn.Module:
    """Build the head named `kind` (linear, transformer or package.module:Class) with its weights.

    `dims`: embedding size of each modality, in column order. `base`: folder in which a user's module is looked up
    first. Raises HeadError, also for linear and transformer without a checkpoint: random weights are no answer.
    """
    if kind in TRAINED_HEADS:
        if checkpoint is None:
            raise HeadError(f"the {kind} head needs a checkpoint: it would answer at random without one")
        _check_meta(checkpoint, kind, dims, labels)
        head = _trained_head(kind, dims, labels, checkpoint)
    else:
        head = _own_head(kind, dims, labels, options or {}, base)
    if checkpoint is not None:
        if kind not in TRAINED_HEADS:
            _check_meta(checkpoint, kind, dims, labels)
        _load_weights(head, checkpoint)
    return head.eval().requires_grad_(False)


def _trained_head(kind: str, dims: Mapping[str, int], labels: Sequence[str], checkpoint: Checkpoint) -> nn.Module:
    """As the checkpoint says; only where its weights fit is memory taken for them."""
    options, name = checkpoint.meta.get("options", {}), checkpoint.path.name
    try:
        _check_sizes(options, checkpoint.weights)
        with torch.device("meta"):
            planned = TRAINED_HEADS[kind](dims, labels, **options)
    except HeadError as error:
        raise HeadError(f"{name}: {error}") from error
    except Exception as error:
        raise HeadError(f"{name} has options that no {kind} head takes: {error}") from error
    _check_weights(planned, checkpoint)
    head: nn.Module = TRAINED_HEADS[kind](dims, labels, **options)
    return head


def _check_sizes(options: Any, weights: Mapping[str, Tensor], key: str = "options") -> None:
    """No option is larger than what is there: layers than tensors, widths than numbers."""
    if isinstance(options, Mapping):
        for name, value in options.items():
            _check_sizes(value, weights, str(name))
    elif isinstance(options, (int, float)):
        most = len(weights) if key == "depth" else sum(tensor.numel() for tensor in weights.values())
        if not 0 <= options <= most:
            raise HeadError(f"{key} {options} does not fit its {len(weights)} tensors")


def _check_meta(checkpoint: Checkpoint, kind: str, dims: Mapping[str, int], labels: Sequence[str]) -> None:
    meta, name = checkpoint.meta, checkpoint.path.name
    if meta.get("head", kind) != kind:
        raise HeadError(f"{name} holds a {meta['head']} head, the configuration asks for {kind}")
    if meta.get("labels") != list(labels):
        known = meta.get("labels") or []
        odd = [label for label in labels if label not in known] or ["(their order)"]
        raise HeadError(
            f"{name} was trained for other labels: {', '.join(map(str, known))}; not for {', '.join(odd[:5])}. "
            "Use its labels in its order, or train a head for yours"
        )
    trained = meta.get("modalities")
    if not isinstance(trained, dict) or list(trained.items()) != list(dims.items()):
        raise HeadError(
            f"{name} was trained for the encoders {trained}, the configuration has {dict(dims)} "
            "(names, order and embedding sizes must be the same)"
        )


def _load_weights(head: nn.Module, checkpoint: Checkpoint) -> None:
    _check_weights(head, checkpoint)
    head.load_state_dict(checkpoint.weights)


def _check_weights(head: nn.Module, checkpoint: Checkpoint) -> None:
    wanted = head.state_dict()
    missing = sorted(set(wanted) - set(checkpoint.weights))
    extra = sorted(set(checkpoint.weights) - set(wanted))
    shapes = [n for n in wanted if n in checkpoint.weights and wanted[n].shape != checkpoint.weights[n].shape]
    if missing or extra or shapes:
        what = [f"{word} {', '.join(names[:3])}" for word, names in
                (("missing", missing), ("unexpected", extra), ("wrong shape", shapes)) if names]  # fmt: skip
        raise HeadError(f"{checkpoint.path.name} does not fit the head: {'; '.join(what)}")


def probe(checkpoint: Checkpoint | None, place: str, labels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Weight [label, dim] and bias [label] of the exit at `place` ("image.layer4"); HeadError when there is none."""
    names = (f"{place}.weight", f"{place}.bias")
    if checkpoint is None or any(name not in checkpoint.probes for name in names):
        known = sorted({n.rsplit(".", 1)[0] for n in checkpoint.probes}) if checkpoint else []
        has = f"it has {', '.join(known)}" if known else "it has none" if checkpoint else "there is no checkpoint"
        raise HeadError(
            f"an exit after {place} needs its probe, exits.{place}.weight and .bias, in the checkpoint; {has}"
        )
    weight_LD, bias_L = (checkpoint.probes[name] for name in names)
    if weight_LD.ndim != 2 or weight_LD.shape[0] != len(labels) or bias_L.shape != (len(labels),):
        raise HeadError(
            f"exits.{place}: weight {tuple(weight_LD.shape)} and bias {tuple(bias_L.shape)} don't fit "
            f"{len(labels)} labels"
        )
    return weight_LD.float(), bias_L.float()


@contextmanager
def _importable(base: Path | None) -> Iterator[None]:
    """Let imports look beside the configuration, for the time of one import."""
    if base is None:
        yield
        return
    sys.path.insert(0, str(base))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(base))


def _own_head(
    kind: str, dims: Mapping[str, int], labels: Sequence[str], options: Mapping[str, Any], base: Path | None
) -> nn.Module:
    module_name, _, class_name = kind.partition(":")
    try:
        with _importable(base):
            head = getattr(importlib.import_module(module_name), class_name)(dict(dims), list(labels), **options)
    except Exception as error:
        raise HeadError(f"head {kind}: {type(error).__name__}: {error}") from error
    if not isinstance(head, nn.Module):
        raise HeadError(f"head {kind} makes a {type(head).__name__}, not a torch.nn.Module")
    return head
