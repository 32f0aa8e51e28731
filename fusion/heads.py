"""Heads: embeddings and presence → logits.

A head is an `nn.Module` built as `Head(dims, labels, **options)` and called as

    forward(embeddings: dict[modality, Tensor [batch, dim]], presence_BM: bool [batch, modality]) -> logits [batch, label]

`presence_BM` has its columns in the order of `dims`. An absent modality's embedding may hold anything finite: a head
must look at it only through presence. A head with several depths also has `all_depths(…) -> list[logits]`, first to
last, the last being what `forward` returns; those are the exits `head.layer1`, `head.layer2`, …

Shapes: B batch, M modality, L label, T token, W width, H attention head.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

DEFAULT_LOGIT_SCALE = 20.0  # for encoders that bring none of their own


class HeadError(ValueError):
    """A head can't be built, or a checkpoint doesn't fit. The message says what to do."""


@runtime_checkable
class DepthHead(Protocol):
    """A head that can answer after each of its layers."""

    def all_depths(self, embeddings: Mapping[str, Tensor], presence_BM: Tensor) -> list[Tensor]: ...


class ZeroShotHead(nn.Module):
    """Compare with prompts: the weighted mean over present modalities of log_softmax(scale · cos(embedding, prototype)).

    Its confidence is uncalibrated: cosine scales are the model's, not a probability that was checked.
    """

    def __init__(
        self,
        prototypes: Mapping[str, Tensor],
        *,
        scales: Mapping[str, float | None] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """`prototypes[m]`: [label, dim] as `prompt_prototypes` makes them; `scales[m]`: None means the default."""
        super().__init__()
        self.modalities = list(prototypes)
        scales, weights = scales or {}, weights or {}
        for name, prototype_LD in prototypes.items():
            scale = scales.get(name)
            self.register_buffer(
                f"prototype_{name}", prototype_LD.float() * (DEFAULT_LOGIT_SCALE if scale is None else scale)
            )
        self.register_buffer("weight_M", torch.tensor([float(weights.get(m, 1.0)) for m in self.modalities]))

    def forward(self, embeddings: Mapping[str, Tensor], presence_BM: Tensor) -> Tensor:
        weight_BM = presence_BM.to(torch.float32) * self.get_buffer("weight_M")
        total_BL: Tensor | None = None
        for column, name in enumerate(self.modalities):
            unit_BD = nn.functional.normalize(embeddings[name].to(torch.float32), dim=-1)
            log_p_BL = torch.log_softmax(unit_BD @ self.get_buffer(f"prototype_{name}").T, dim=-1)
            # where, not only a product: an absent row may hold anything
            part_BL = torch.where(presence_BM[:, column : column + 1], log_p_BL, torch.zeros_like(log_p_BL))
            part_BL = part_BL * weight_BM[:, column : column + 1]
            total_BL = part_BL if total_BL is None else total_BL + part_BL
        assert total_BL is not None
        return total_BL / weight_BM.sum(dim=1, keepdim=True).clamp_min(1e-12)


class LinearHead(nn.Module):
    """One linear layer over all embeddings side by side, each normalised, absent ones zero, with presence flags."""

    def __init__(self, dims: Mapping[str, int], labels: Sequence[str]) -> None:
        super().__init__()
        self.modalities = list(dims)
        self.linear = nn.Linear(sum(dims.values()) + len(dims), len(labels))

    def forward(self, embeddings: Mapping[str, Tensor], presence_BM: Tensor) -> Tensor:
        parts = []
        for column, name in enumerate(self.modalities):
            unit_BD = nn.functional.normalize(embeddings[name].to(torch.float32), dim=-1)
            parts.append(torch.where(presence_BM[:, column : column + 1], unit_BD, torch.zeros_like(unit_BD)))
        return cast(Tensor, self.linear(torch.cat([*parts, presence_BM.to(torch.float32)], dim=-1)))


class _Layer(nn.Module):
    """Pre-norm self-attention and MLP over the few modality tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTW: Tensor, bias_B11T: Tensor) -> Tensor:
        tokens, width = x_BTW.shape[1], x_BTW.shape[2]
        qkv_BTW = self.qkv(self.norm_attention(x_BTW))
        q, k, v = (
            part.reshape(-1, tokens, self.heads, width // self.heads).transpose(1, 2) for part in qkv_BTW.chunk(3, -1)
        )
        scores_BHTT = q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5 + bias_B11T
        mixed_BTW = (scores_BHTT.softmax(-1) @ v).transpose(1, 2).reshape(-1, tokens, width)
        x_BTW = x_BTW + self.out(mixed_BTW)
        return cast(Tensor, x_BTW + self.mlp(self.norm_mlp(x_BTW)))


class TransformerHead(nn.Module):
    """A small transformer over one token per modality and an answer token; every depth can answer."""

    def __init__(
        self, dims: Mapping[str, int], labels: Sequence[str], width: int = 64, depth: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        if width % heads:
            raise HeadError(f"transformer head: width {width} is no multiple of heads {heads}")
        self.modalities = list(dims)
        self.projections = nn.ModuleDict(
            {m: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, width)) for m, d in dims.items()}
        )
        self.kind_MW = nn.Parameter(torch.randn(len(dims), width) * 0.02)
        self.answer_1W = nn.Parameter(torch.randn(1, width) * 0.02)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(depth))
        self.answers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(labels))) for _ in range(depth)
        )

    def all_depths(self, embeddings: Mapping[str, Tensor], presence_BM: Tensor) -> list[Tensor]:
        batch = presence_BM.shape[0]
        tokens = [self.answer_1W.expand(batch, 1, -1)]
        for column, name in enumerate(self.modalities):
            token_BW = self.projections[name](embeddings[name].to(torch.float32)) + self.kind_MW[column]
            # zero at absent rows, so that whatever stood there can't reach the sums even as NaN
            token_BW = torch.where(presence_BM[:, column : column + 1], token_BW, torch.zeros_like(token_BW))
            tokens.append(token_BW.unsqueeze(1))
        x_BTW = torch.cat(tokens, dim=1)
        seen_BT = torch.cat([torch.ones_like(presence_BM[:, :1]), presence_BM], dim=1)
        bias_B11T = torch.where(seen_BT, 0.0, float("-inf"))[:, None, None, :]
        logits = []
        for layer, answer in zip(self.layers, self.answers, strict=True):
            x_BTW = layer(x_BTW, bias_B11T)
            logits.append(answer(x_BTW[:, 0]))
        return logits

    def forward(self, embeddings: Mapping[str, Tensor], presence_BM: Tensor) -> Tensor:
        return self.all_depths(embeddings, presence_BM)[-1]


def prompt_prototypes(embeddings_PLD: Tensor) -> Tensor:
    """[prompt, label, dim] → [label, dim]: the normalised mean of the normalised prompts of each label."""
    unit_PLD = nn.functional.normalize(embeddings_PLD.float(), dim=-1)
    return nn.functional.normalize(unit_PLD.mean(dim=0), dim=-1)


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
    save_file(tensors, str(path), metadata={"mmpipe.head": json.dumps(meta, sort_keys=True)})


TRAINED_HEADS = {"linear": LinearHead, "transformer": TransformerHead}


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
        head: nn.Module = TRAINED_HEADS[kind](dims, labels, **checkpoint.meta.get("options", {}))
    else:
        head = _own_head(kind, dims, labels, options or {}, base)
    if checkpoint is not None:
        if kind not in TRAINED_HEADS:
            _check_meta(checkpoint, kind, dims, labels)
        _load_weights(head, checkpoint)
    return head.eval().requires_grad_(False)


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
    wanted = head.state_dict()
    missing = sorted(set(wanted) - set(checkpoint.weights))
    extra = sorted(set(checkpoint.weights) - set(wanted))
    shapes = [n for n in wanted if n in checkpoint.weights and wanted[n].shape != checkpoint.weights[n].shape]
    if missing or extra or shapes:
        what = [f"{word} {', '.join(names[:3])}" for word, names in
                (("missing", missing), ("unexpected", extra), ("wrong shape", shapes)) if names]  # fmt: skip
        raise HeadError(f"{checkpoint.path.name} does not fit the head: {'; '.join(what)}")
    head.load_state_dict(checkpoint.weights)


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
            f"exits.{place}: weight {tuple(weight_LD.shape)} and bias {tuple(bias_L.shape)} don't fit {len(labels)} labels"
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
    except Exception as error:  # noqa: BLE001 (a user's code may raise anything)
        raise HeadError(f"head {kind}: {type(error).__name__}: {error}") from error
    if not isinstance(head, nn.Module):
        raise HeadError(f"head {kind} makes a {type(head).__name__}, not a torch.nn.Module")
    return head
