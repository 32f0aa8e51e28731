"""Deliberation: what the last stage is unsure of is looked at again with more input, and the views are weighed.

outcome ─► unsure rows ─► views of each (Samples whose media are `media.View`s) ─► the same plan, no exits ─► weigh

A view of a sample takes of each modality that could be used one of its parts: another crop of the picture, another
window of the sound, another part of the text. The runtime knows nothing of it: views are samples like others, so a
row's bytes depend on its own sample alone here too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mmpipe.answers import Weighed
from mmpipe.build import Built, Preparation
from mmpipe.calibrated import no_second_look
from mmpipe.config import Config, DeliberateConfig
from mmpipe.errors import MediaError
from mmpipe.fusion import gate
from mmpipe.fusion.views import weigh
from mmpipe.media import Limits, load, picture_size, sound_seconds, views
from mmpipe.runtime.ledger import Outcome
from mmpipe.types import Sample

_FEW_CHARACTERS = 256  # how much of a text is tried first; doubled until the encoder reads no further


@dataclass(frozen=True)
class Deliberation:
    """How a pipeline deliberates. `confidence`: the kind that `below` is compared with."""

    settings: DeliberateConfig
    preparations: Mapping[str, Preparation]
    limits: Limits
    confidence: str
    chunk: int  # views that run at once: bounds what is kept of them

    @classmethod
    def configured(cls, config: Config, built: Built, limits: Limits) -> Self | None:
        """As the configuration says; None: not at all."""
        if config.fusion.deliberate is None or no_second_look(config, built.calibration):
            return None
        settings, chunk = config.fusion.deliberate, config.output.shard_rows
        return cls(settings, built.preparations, limits, built.confidence, chunk)

    def of(
        self, samples: Sequence[Sample], outcome: Outcome, last_exit: int, run: Callable[[Sequence[Sample]], Outcome]
    ) -> dict[int, Weighed]:
        """Row → its weighed answer, for the rows that there was more to see of.

        run: computes samples in full. A view that can't be used is left out, never the sample. The seconds it took are
        added to the outcome's, as "deliberating" and to the segments' own.
        """
        began = time.perf_counter()
        weighed: dict[int, Weighed] = {}
        chunk: list[tuple[int, list[Sample]]] = []
        for row in self._unsure(outcome, last_exit):
            found = self._views(samples[row], outcome, row)
            if not found:
                continue
            if chunk and sum(len(others) for _, others in chunk) + len(found) > self.chunk:
                weighed |= self._weighed(outcome, chunk, run)
                chunk = []
            chunk.append((row, found))
        if chunk:
            weighed |= self._weighed(outcome, chunk, run)
        outcome.seconds["deliberating"] = time.perf_counter() - began
        return weighed

    def _unsure(self, outcome: Outcome, last_exit: int) -> list[int]:
        """Rows that the last stage answered with less confidence than wanted."""
        unsure_N = (outcome.exit_N == last_exit) & (outcome.confidence_N < self.settings.below)
        return [int(row) for row in unsure_N.nonzero().squeeze(1)]

    def _views(self, sample: Sample, outcome: Outcome, row: int) -> list[Sample]:
        """More views of a sample than the first, which has been seen; all distinct."""
        failed = outcome.failures.get(row, {})
        parts = {
            name: self._parts(name, sample.media[name])
            for name in self.preparations
            if sample.media.get(name) is not None and name not in failed
        }
        number = max((len(found) for found in parts.values()), default=1)
        return [
            Sample(sample.id, {name: found[view % len(found)] for name, found in parts.items()})
            for view in range(1, number)
        ]

    def _parts(self, modality: str, source: Any) -> list[Any]:
        """What there is to see of one medium, the first look first; that alone where nothing tells of more."""
        count, preparation = self.settings.views, self.preparations[modality]
        if modality == "image":
            return views.of_picture(source, count, picture_size(source, self.limits))
        if modality == "audio":
            seconds = sound_seconds(source, self.limits)
            return views.of_sound(source, count, seconds, preparation.max_seconds)
        try:
            text = load("text", source, limits=self.limits)
            return views.of_text(source, text, count, lambda given: characters_read(preparation, given))
        except MediaError:
            return [source]
        except Exception:  # noqa: BLE001 - a user's own prepare() may raise anything; the first look stands
            return [source]

    def _weighed(
        self,
        outcome: Outcome,
        chunk: Sequence[tuple[int, Sequence[Sample]]],
        run: Callable[[Sequence[Sample]], Outcome],
    ) -> Iterator[tuple[int, Weighed]]:
        seen = run([view for _, found in chunk for view in found])
        for name, seconds in seen.seconds.items():
            outcome.seconds[name] = outcome.seconds.get(name, 0.0) + seconds
        outcome.notes += seen.notes
        start = 0
        for row, found in chunk:
            rows = [view for view in range(start, start + len(found)) if _is_whole(seen, view)]
            start += len(found)
            if rows:
                yield row, self._answer(outcome, row, seen, rows)

    def _answer(self, outcome: Outcome, row: int, seen: Outcome, rows: Sequence[int]) -> Weighed:
        assert outcome.probabilities_NL is not None
        assert seen.probabilities_NL is not None
        p_VL: Tensor = torch.cat([outcome.probabilities_NL[row][None], seen.probabilities_NL[rows]])
        sure_V = torch.cat([outcome.confidence_N[row][None], seen.confidence_N[rows]])
        p_L = weigh(p_VL, sure_V)
        return Weighed(p_L, float(gate.confidence(p_L[None], self.confidence)))


def _is_whole(seen: Outcome, view: int) -> bool:
    """Whether a view was answered, with all of its media."""
    return int(seen.exit_N[view]) >= 0 and view not in seen.failures


def characters_read(preparation: Preparation, text: str) -> int:
    """How much of a text an encoder reads, found by asking it: cut there, the text prepares to the same tensors.

    Knows no tokenizer, and prepares no more than a few times what is read. Raises what prepare() raises.
    """

    def same(one: str, other: str) -> bool:
        with torch.inference_mode():
            left, right = preparation.prepare(one), preparation.prepare(other)
        return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

    longer = _FEW_CHARACTERS
    while longer < len(text) and not same(text[:longer], text[: 2 * longer]):
        longer *= 2
    seen, short, enough = text[: 2 * longer], 0, min(longer, len(text))
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if same(text[:middle], seen) else (middle, enough)
    return enough
