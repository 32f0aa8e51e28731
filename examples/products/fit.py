"""Training of the three encoders, each with a linear classifier on top that is thrown away afterwards.

Shapes: B batch, C channel, H height, W width, T word, K piece, M mel band, F frame.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmpipe.encoders.tiny import DIM

Augment = Callable[[tuple[Tensor, ...], torch.Generator], tuple[Tensor, ...]]


def fit_encoder(
    net: nn.Module,
    forward: Callable[..., Tensor],
    epoch_data: Callable[[int], tuple[Tensor, ...]],
    augment: Augment,
    *,
    classes: int,
    epochs: int,
    lr: float,
    batch_size: int = 128,
    label_smoothing: float = 0.05,
    bf16: bool = False,
    seed: int = 0,
) -> None:
    """Train `net` in place. `epoch_data(epoch)` → (inputs …, labels), all [N, …]; `forward(*inputs)` → [B, 64]."""
    generator = torch.Generator().manual_seed(seed)
    classifier = nn.Linear(DIM, classes)
    parameters = [*net.parameters(), *classifier.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02)
    schedule: torch.optim.lr_scheduler.OneCycleLR | None = None
    net.train().to(memory_format=torch.channels_last)
    for epoch in range(epochs):
        *inputs, labels = epoch_data(epoch)
        batches = torch.split(torch.randperm(len(labels), generator=generator), batch_size)
        schedule = schedule or torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * len(batches))
        total, right = 0.0, 0
        for rows in batches:
            seen = augment(tuple(value[rows] for value in inputs), generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = classifier(forward(*seen)).float()
            loss = nn.functional.cross_entropy(logits, labels[rows], label_smoothing=label_smoothing)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
            right += int((logits.argmax(1) == labels[rows]).sum())
        means = f"loss {total / len(labels):.3f}, accuracy {right / len(labels):.3f}"
        print(f"  epoch {epoch + 1}/{epochs}: {means}", flush=True)
    net.eval().to(memory_format=torch.contiguous_format)


def _gather_shifted(x: Tensor, shift_B: Tensor, dim: int) -> Tensor:
    """Shift each row along `dim` by its own amount; the edge value fills what comes in."""
    size = x.shape[dim]
    index = (torch.arange(size)[None, :] - shift_B[:, None]).clamp(0, size - 1)
    shape = [len(x)] + [1] * (x.ndim - 1)
    shape[dim] = size
    return x.gather(dim, index.reshape(shape).expand_as(x))


def augment_photo(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Mirror, shift by up to 2 pixels, and cover a square of up to 10 pixels."""
    (photo_BCHW,) = inputs
    batch, side = len(photo_BCHW), photo_BCHW.shape[-1]
    mirrored_B = torch.rand(batch, generator=generator) < 0.5
    photo_BCHW = torch.where(mirrored_B[:, None, None, None], photo_BCHW.flip(-1), photo_BCHW)
    for dim in (2, 3):
        photo_BCHW = _gather_shifted(photo_BCHW, torch.randint(-2, 3, (batch,), generator=generator), dim)
    centre_B2 = torch.randint(0, side, (batch, 2), generator=generator)
    radius_B = torch.randint(0, 6, (batch,), generator=generator)
    place = torch.arange(side)
    rows_BH = (place[None] - centre_B2[:, :1]).abs() < radius_B[:, None]
    columns_BW = (place[None] - centre_B2[:, 1:]).abs() < radius_B[:, None]
    covered_BCHW = (rows_BH[:, :, None] & columns_BW[:, None, :])[:, None]
    return (torch.where(covered_BCHW, torch.full_like(photo_BCHW, 255), photo_BCHW),)


def augment_title(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Hide the whole-word id of three words in ten, so that trigrams carry unseen words; forget one word in twenty."""
    pieces_BTK, mask_BT = inputs
    pieces_BTK = pieces_BTK.clone()
    hidden_BT = torch.rand(mask_BT.shape, generator=generator) < 0.3
    pieces_BTK[:, :, 0] *= ~hidden_BT
    kept_BT = torch.rand(mask_BT.shape, generator=generator) >= 0.05
    return pieces_BTK, mask_BT * kept_BT


def augment_note(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Another speaker in another noise: stretch and shift bands and time, talk over it, tilt, hide stretches."""
    log_mel_BMF = _warp(inputs[0].float(), generator)
    batch, bands, frames = log_mel_BMF.shape
    other_BMF = log_mel_BMF[torch.randperm(batch, generator=generator)]
    quieter_B11 = torch.rand(batch, 1, 1, generator=generator) * 0.9 + 0.25  # 1 is half of LOG_RANGE, 30 dB
    mixed_B11 = torch.rand(batch, 1, 1, generator=generator) < 0.35
    log_mel_BMF = torch.where(mixed_B11, torch.maximum(log_mel_BMF, other_BMF - quieter_B11), log_mel_BMF)
    tilt_B11 = torch.rand(batch, 1, 1, generator=generator) * 0.8 - 0.4
    log_mel_BMF = log_mel_BMF + tilt_B11 * torch.linspace(-1, 1, bands)[:, None]
    hidden = torch.zeros(batch, bands, frames, dtype=torch.bool)
    for size, longest, dim in ((bands, 8, 1), (frames, 14, 2)) * 2:
        start_B = torch.randint(0, size, (batch,), generator=generator)
        length_B = torch.randint(0, longest + 1, (batch,), generator=generator)
        place = torch.arange(size)[None]
        inside = (place >= start_B[:, None]) & (place < (start_B + length_B)[:, None])
        hidden |= inside[:, :, None] if dim == 1 else inside[:, None, :]
    level_B11 = log_mel_BMF.mean(dim=(1, 2), keepdim=True)
    return (torch.where(hidden, level_B11, log_mel_BMF),)


def _warp(log_mel_BMF: Tensor, generator: torch.Generator) -> Tensor:
    """Scale the bands (the size of the speaker) by up to 14% and time (the pace) by up to 18%; shift both a little."""
    batch, bands, frames = log_mel_BMF.shape

    def spread(by: float) -> Tensor:
        return (torch.rand(batch, generator=generator) * 2 - 1) * by

    theta_B23 = torch.zeros(batch, 2, 3)
    theta_B23[:, 0, 0], theta_B23[:, 0, 2] = 1 + spread(0.18), spread(30 / frames)
    theta_B23[:, 1, 1], theta_B23[:, 1, 2] = 1 + spread(0.14), spread(6 / bands)
    grid = nn.functional.affine_grid(theta_B23, [batch, 1, bands, frames], align_corners=False)
    warped = nn.functional.grid_sample(log_mel_BMF[:, None], grid, padding_mode="border", align_corners=False)
    return warped[:, 0]
