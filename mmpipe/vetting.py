"""What an encoder or a head of the user's own must keep to, looked at when it is captured, not at the first sample."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmpipe.encoders import EncoderError
from mmpipe.fusion.heads import HeadError
from mmpipe.graphs.capture import Captured
from mmpipe.graphs.plan import Mark

_AGAIN = 4  # chance may leave a few numbers as they were once
_ALIKE = 1e-3  # of the largest number: two batches of one size differ by nothing where rows stay apart


def vet_encoder(captured: Captured, dim: int) -> None:
    """Raises EncoderError where what its module returns is not an embedding of `dim` numbers for each row."""
    results = captured.results()
    if len(results) != 1 or not _numbers(results[0], dim):
        raise EncoderError(f"its module returns {_told(results)}; with dim = {dim} it must return float [batch, {dim}]")


def vet_head(captured: Captured, labels: int) -> None:
    """Raises HeadError where it does not return one number for each label, at each of its depths."""
    results = captured.results()
    wrong = [mark for mark in results if not _numbers(mark, labels)]
    if wrong or not results:
        raise HeadError(f"it returns {_told(wrong)}; for {labels} labels it must return float logits [batch, {labels}]")


def vet_encoder_rows(module: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Raises EncoderError where a row's embedding depends on its neighbours, or on chance."""
    other = {name: row.flatten().roll(1).reshape(row.shape) + _nudge(row) for name, row in rows.items()}
    if why := _depends(module, rows, other):
        raise EncoderError(f"its module {why}")


def vet_head_rows(head: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Raises HeadError where a row's logits depend on its neighbours, or on chance."""
    random = torch.Generator().manual_seed(0)
    first, other = (
        {n: torch.randn(row.shape, generator=random) if row.is_floating_point() else row for n, row in rows.items()}
        for _ in range(2)
    )
    if why := _depends(head, first, other):
        raise HeadError(f"it {why}")


def _numbers(mark: Mark, width: int) -> bool:
    return mark.shape == ("B", width) and mark.dtype is not None and mark.dtype.is_floating_point


def _told(results: list[Mark]) -> str:
    """What was returned, as a person writes shapes."""
    if len(results) != 1:
        return f"{len(results)} tensors"
    shape, dtype = results[0].shape, str(results[0].dtype).removeprefix("torch.")
    return "no tensor" if shape is None else f"{dtype} [{', '.join(map(str, shape)).replace('B', 'batch')}]"


def _nudge(row: Tensor) -> Tensor:
    """Numbers that are all alike stay alike when they change places: a grey picture's pixels, silence."""
    if row.is_floating_point():
        return torch.linspace(0, 0.1, row.numel()).reshape(row.shape).to(row.dtype)
    if row.dtype == torch.uint8:
        return (torch.arange(row.numel()) % 97).reshape(row.shape).to(torch.uint8)
    return torch.zeros_like(row)  # whole numbers may be tokens, of which there is a last one


@torch.no_grad()
def _depends(module: nn.Module, row: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """On what else than itself a row's result depends; empty: on nothing that two small batches show."""

    def both(second: Mapping[str, Tensor]) -> list[Tensor]:
        result = module(**{name: torch.stack([row[name], second[name]]) for name in row})
        return [tensor.double() for tensor in ((result,) if isinstance(result, Tensor) else result)]

    try:
        alone, *again = (both(row) for _ in range(1 + _AGAIN))
        beside = both(other)
    except Exception:  # noqa: BLE001 - an example that it can't compute says nothing of its rows
        return ""
    if not all(_alike(alone, one) for one in again):
        return "gives the same row other results each time: no dropout or other chance may be left in it"
    if not _alike([tensor[0] for tensor in alone], [tensor[0] for tensor in beside]):
        return "mixes the rows of a batch: what it returns for a sample changes with the samples beside it"
    return ""


def _alike(some: list[Tensor], others: list[Tensor]) -> bool:
    for one, other in zip(some, others, strict=True):
        finite = one.isfinite() & other.isfinite()
        most = one[finite].abs().amax() if finite.any() else 0
        if bool(((one - other)[finite].abs() > _ALIKE * most).any()):
            return False
    return True
