"""What a run computed → one Prediction per sample. Whatever a user gets is a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpipe.runtime.ledger import Outcome
from mmpipe.types import Prediction, Sample

FULL = "all"  # the exit of the last stage, and of a pipeline that only embeds


@dataclass(frozen=True)
class Weighed:
    """The answer of several views of one sample: float32 probabilities [L], and how sure they are."""

    probabilities_L: Tensor
    confidence: float


@dataclass(frozen=True)
class Answers:
    """How outcomes are told: which labels, which exits, how much of it."""

    labels: tuple[str, ...]
    dims: Mapping[str, int]  # modality → embedding size, in column order
    exits: tuple[str, ...]  # empty for a pipeline that only embeds
    top_k: int
    probabilities: bool
    embeddings: bool

    def of(
        self, samples: Sequence[Sample], outcome: Outcome, weighed: Mapping[int, Weighed] | None = None
    ) -> list[Prediction]:
        """One Prediction per row of the outcome, in order. `weighed`: rows whose answer comes from several views."""
        again = weighed or {}
        unit = {
            name: torch.nn.functional.normalize(table.to(torch.float32), dim=-1).numpy()
            for name, table in (outcome.embeddings.items() if self.embeddings else ())
        }
        return [self._one(row, sample, outcome, unit, again.get(row)) for row, sample in enumerate(samples)]

    def _one(
        self, row: int, sample: Sample, outcome: Outcome, unit: Mapping[str, Any], weighed: Weighed | None
    ) -> Prediction:
        failures = outcome.failures.get(row, {})
        present = tuple(name for name in self.dims if sample.media.get(name) is not None)
        opened = outcome.opened_NM[row].tolist()
        used = tuple(name for name, flag in zip(self.dims, opened, strict=True) if flag and name not in failures)
        exit_index = int(outcome.exit_N[row])
        answered = exit_index >= 0
        errors = [str(failures[name]) for name in self.dims if name in failures]
        if not answered and used:
            errors.append("head:not_finite: the model's output is not a number")
        if not present:
            errors.append(f"sample:no_media: has none of {', '.join(self.dims)}")
        fields: dict[str, Any] = {}
        if answered:
            fields["answered_by"] = self.exits[exit_index] if self.exits else FULL
            fields |= self._vectors(row, outcome, unit, set(present) - set(failures))
            if weighed is None and outcome.probabilities_NL is not None:
                fields |= self._label(Weighed(outcome.probabilities_NL[row], float(outcome.confidence_N[row])))
            elif weighed is not None:
                fields |= {**self._label(weighed), "deliberated": True}
        return Prediction(
            id=sample.id,
            status="failed" if not answered else "partial" if failures else "ok",
            error="; ".join(errors) or None,
            present=present,
            used=used,
            skipped=tuple(name for name in present if name not in used and name not in failures),
            failed=tuple(name for name in self.dims if name in failures),
            keep=sample.keep,
            **fields,
        )

    def _label(self, answer: Weighed) -> dict[str, Any]:
        p_L = answer.probabilities_L.numpy()
        best = np.argsort(-p_L, kind="stable")[: self.top_k]
        return {
            "label": self.labels[best[0]],
            "confidence": answer.confidence,
            "top_k": tuple((self.labels[index], float(p_L[index])) for index in best),
            "probabilities": tuple(p_L.tolist()) if self.probabilities else None,
        }

    def _vectors(self, row: int, outcome: Outcome, unit: Mapping[str, Any], usable: set[str]) -> dict[str, Any]:
        """Embeddings that were computed; side by side only where none is missing because of an early exit."""
        if not self.embeddings:
            return {}
        has = [name for name, flag in zip(self.dims, outcome.embedded_NM[row].tolist(), strict=True) if flag]
        found: dict[str, Any] = {"embeddings": {name: unit[name][row].copy() for name in has}}
        if usable <= set(has):
            blank = {name: np.zeros(dim, dtype=np.float32) for name, dim in self.dims.items()}
            found["embedding"] = np.concatenate([unit[name][row] if name in has else blank[name] for name in self.dims])
        return found
