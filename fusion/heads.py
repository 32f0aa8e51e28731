"""Heads: embeddings and presence → logits.

A head is an `nn.Module` built as `Head(dims, labels, **options)` and called as

    forward(embeddings: dict[modality, Tensor [batch, dim]], presence_BM: bool [batch, modality]) -> [batch, label]

`presence_BM` has its columns in the order of `dims`. An absent modality's embedding may hold anything finite: a head
must look at it only through presence. A head with several depths also has `all_depths(…) -> list[logits]`, first to
last, the last being what `forward` returns; those are the exits `head.layer1`, `head.layer2`, …

Shapes: B batch, M modality, L label, T token, W width, H attention head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from mmpipe.fusion.direct import FourierFeatures, Pool

DEFAULT_LOGIT_SCALE = 20.0  # for encoders that bring none of their own


class HeadError(ValueError):
    """A head can't be built, or a checkpoint doesn't fit. The message says what to do."""


@runtime_checkable
class DepthHead(Protocol):
    """A head that can answer after each of its layers."""

    def all_depths(self, embeddings: Mapping[str, Tensor], presence_BM: Tensor) -> list[Tensor]: ...


class ZeroShotHead(nn.Module):
    """Compare with prompts: weighted mean over present modalities of log_softmax(scale · cos(embedding, prototype)).

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


def _drawn(*shape: int) -> nn.Parameter:
    """Small normal values; none on the meta device, where drawing them would import PyTorch's compiler: a second."""
    values = nn.Parameter(torch.empty(shape))
    if not values.is_meta:
        nn.init.normal_(values, std=0.02)
    return values


class TransformerHead(nn.Module):
    """A small transformer over one token per modality and an answer token; every depth can answer.

    `direct`: each present modality's normalised embedding also adds a linear answer of its own, at every depth, and the
    layers answer what is left. `fourier`: how many random Fourier features the linear answers of some modalities have
    beside the embedding. `floors`: these answers are joined by a `Pool` instead of a plain sum.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        labels: Sequence[str],
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        direct: bool = False,
        fourier: Mapping[str, int] | None = None,
        floors: bool = False,
    ) -> None:
        super().__init__()
        fourier = fourier or {}
        if (fourier or floors) and not direct:
            raise HeadError("transformer head: fourier and floors are of direct answers, and direct is off")
        if unknown := sorted(set(fourier) - set(dims)):
            raise HeadError(f"transformer head: fourier names {', '.join(unknown)}: no such modality")
        if width % heads:
            raise HeadError(f"transformer head: width {width} is no multiple of heads {heads}")
        self.modalities = list(dims)
        self.projections = nn.ModuleDict(
            {m: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, width)) for m, d in dims.items()}
        )
        self.kind_MW, self.answer_1W = _drawn(len(dims), width), _drawn(1, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(depth))
        self.answers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(labels))) for _ in range(depth)
        )
        self.fourier = nn.ModuleDict({m: FourierFeatures(dims[m], count) for m, count in fourier.items()})
        self.direct = (
            nn.ModuleDict({m: nn.Linear(d + fourier.get(m, 0), len(labels)) for m, d in dims.items()})
            if direct
            else None
        )
        self.pool = Pool(len(dims)) if floors else None

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
        if self.direct is None:
            return logits
        direct_BL = torch.zeros_like(logits[0])
        for column, name in enumerate(self.modalities):
            unit_BD = nn.functional.normalize(embeddings[name].to(torch.float32), dim=-1)
            if name in self.fourier:
                unit_BD = torch.cat([unit_BD, self.fourier[name](unit_BD)], dim=-1)
            own_BL = self.direct[name](unit_BD)
            if self.pool is not None:
                own_BL = self.pool(own_BL, column)
            direct_BL = direct_BL + torch.where(presence_BM[:, column : column + 1], own_BL, torch.zeros_like(own_BL))
        return [logits_BL + direct_BL for logits_BL in logits]

    def forward(self, embeddings: Mapping[str, Tensor], presence_BM: Tensor) -> Tensor:
        return self.all_depths(embeddings, presence_BM)[-1]

    @torch.no_grad()
    def standardise(self, embeddings: Mapping[str, Tensor], presence_BM: Tensor) -> None:
        """Before training: let each feature come with mean 0 and deviation 1 over these samples.

        Encoders that were trained for something else give embeddings that have much in common and differ by little;
        from there a head would learn slowly, if at all. The scales go into the norms that the head has anyway.
        """
        for column, name in enumerate(self.modalities):
            norm = cast(nn.LayerNorm, cast(nn.Sequential, self.projections[name])[0])
            present_BD = embeddings[name][presence_BM[:, column]].to(torch.float32)
            if len(present_BD) > 1:
                normed_BD = nn.functional.layer_norm(present_BD, norm.normalized_shape, eps=norm.eps)
                deviation_D = normed_BD.std(0, correction=0).clamp_min(1e-3)
                norm.weight.copy_(1 / deviation_D)
                norm.bias.copy_(-normed_BD.mean(0) / deviation_D)


def prompt_prototypes(embeddings_PLD: Tensor) -> Tensor:
    """[prompt, label, dim] → [label, dim]: the normalised mean of the normalised prompts of each label."""
    unit_PLD = nn.functional.normalize(embeddings_PLD.float(), dim=-1)
    return nn.functional.normalize(unit_PLD.mean(dim=0), dim=-1)
