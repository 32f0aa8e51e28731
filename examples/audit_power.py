"""How soon an audit sees that exits have drifted, and how often it cries wolf.

    python examples/audit_power.py

Simulated jobs of 10,000 chosen samples each, tested after every one. A promise: at most 1% of all samples disagree with
the full pipeline. At exactly 1% an alarm is false; above it, the table says after how many chosen samples it comes. The
last two lines drift after 2,000 samples that kept to half of what was promised: what came before has to be outweighed.
"""

from __future__ import annotations

import argparse
import math

import torch

from mmpipe.fusion.audit import PRIOR_NO, PRIOR_YES
from mmpipe.jobs.auditing import CERTAINTY

LOOKS, BEFORE = 10_000, 2_000


def alarms(rate_N: torch.Tensor, promised: float, runs: int, seed: int) -> torch.Tensor:
    """For each run: after how many samples the lower bound passes the promise; LOOKS + 1: never."""
    draw = torch.rand(runs, len(rate_N), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    yes = (draw < rate_N).cumsum(dim=1).double()
    count = torch.arange(1, len(rate_N) + 1, dtype=torch.float64)
    a, b = PRIOR_YES, PRIOR_NO
    mixture = torch.lgamma(a + yes) + torch.lgamma(b + count - yes) - torch.lgamma(a + b + count)
    mixture -= math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    evidence = mixture - yes * math.log(promised) - (count - yes) * math.log1p(-promised)
    over = (evidence >= -math.log(1 - CERTAINTY)) & (yes / count > promised)
    return torch.where(over.any(dim=1), over.double().argmax(dim=1) + 1, len(rate_N) + 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--promised", type=float, default=0.01)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print("| disagree | jobs with an alarm | after chosen samples: median | 90% of jobs |")
    print("|---|---|---|---|")
    cases = [(f"{rate:.1%}", torch.full((LOOKS,), rate)) for rate in (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.10)]
    for rate in (0.03, 0.05):
        later = torch.full((LOOKS,), rate)
        later[:BEFORE] = options.promised / 2
        cases.append((f"{options.promised / 2:.1%}, then {rate:.1%}", later))
    for name, rate_N in cases:
        first = alarms(rate_N, options.promised, options.runs, options.seed).double()
        seen = float((first <= LOOKS).double().mean())
        told = [float(first.quantile(share)) for share in (0.5, 0.9)]
        words = [f"{value:,.0f}" if value <= LOOKS else "–" for value in told]
        print(f"| {name} | {seen:.1%} | {words[0]} | {words[1]} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
