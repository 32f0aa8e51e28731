"""Which samples are trained on, which choose, and which only measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VALIDATION_SHARE, TEST_SHARE = 0.15, 0.2


@dataclass(frozen=True)
class Split:
    """Row numbers, int64. No row is in two parts; what is told of a head was seen by the test part alone."""

    training: Tensor
    validation: Tensor
    test: Tensor


def stratified(labels_N: Tensor, seed: int) -> Split:
    """At random within each label, so that every part has each label's share; a label of three has one in each."""
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for label in range(int(labels_N.max()) + 1):
        rows = torch.nonzero(labels_N == label).squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        if len(rows) == 0:
            continue
        test = max(1, round(TEST_SHARE * len(rows)))
        held = max(1, round(VALIDATION_SHARE * len(rows)))
        for part, chosen in zip(parts, (rows[test + held :], rows[test : test + held], rows[:test]), strict=True):
            part.append(chosen)
    training, validation, test_rows = (torch.cat(part).sort().values for part in parts)
    return Split(training, validation, test_rows)
