"""Exact binomial statistics: p-values, confidence limits, how many items a promise needs. Pure numbers.

k errors among n items drawn at random; a rate is the share of errors in all there is. Source: Clopper, Pearson, "The
use of confidence or fiducial limits illustrated in the case of the binomial" (1934).
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_STEPS = 60  # of bisection: past the last bit of a double


@lru_cache(maxsize=64)
def cdf_table(n: int, rate: float) -> Floats:
    """P(at most k errors) for k = 0 … n, when errors have this rate. [n + 1], rising to 1."""
    if n < 0 or not 0.0 <= rate <= 1.0:
        raise ValueError(f"no binomial distribution of {n} items at a rate of {rate}")
    if rate in (0.0, 1.0):
        table = np.full(n + 1, 1.0 - rate)
        table[n] = 1.0
    else:
        k = np.arange(n + 1)
        factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
        log_chance = factorials[n] - factorials - factorials[::-1] + k * math.log(rate) + (n - k) * math.log1p(-rate)
        table = np.minimum(np.cumsum(np.exp(log_chance)), 1.0)
        table[n] = 1.0
    table.flags.writeable = False
    return table


def p_value(errors: int, n: int, limit: float) -> float:
    """P(at most `errors` of n) where the rate is `limit`: how surprising so few would be, were the rate that or more.

    Rejecting "the rate exceeds limit" where this is at most α errs with a probability of at most α.
    """
    return float(cdf_table(n, limit)[errors])


def most_errors(n: int, limit: float, level: float) -> int:
    """The most errors among n with a p-value of at most `level`; -1: not even none would do."""
    return int(np.searchsorted(cdf_table(n, limit), level, side="right")) - 1


def least_items(limit: float, level: float) -> int:
    """How many items without any error it takes for a p-value of at most `level`: 299 for 1% at 5%."""
    n = max(1, math.floor(math.log(level) / math.log1p(-limit)) - 1)
    while (1.0 - limit) ** n > level:
        n += 1
    return n


def items_for(rate: float, limit: float, level: float, most: int = 10_000_000) -> int | None:
    """How many items it takes until errors at `rate`, as many as are expected, pass. None: more than `most`, or never.

    About half of all draws of that size pass.
    """
    if rate >= limit:
        return None

    def passes(n: int) -> bool:
        # the normal approximation beyond what is worth a table; it only names a size
        errors = math.ceil(rate * n)
        if n <= 200_000:
            return p_value(errors, n, limit) <= level
        return (errors + 0.5 - n * limit) / math.sqrt(n * limit * (1 - limit)) <= NormalDist().inv_cdf(level)

    low = least_items(limit, level)
    high = low
    while not passes(high):
        high *= 2
        if high > most:
            return None
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def upper_limit(errors: int, n: int, level: float) -> float:
    """The one-sided upper confidence limit of the rate: it is exceeded with a probability of at most `level`."""
    if errors >= n:
        return 1.0
    low, high = errors / n, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _below(errors, n, middle) > level else (low, middle)
    return high


def lower_limit(errors: int, n: int, level: float) -> float:
    """The one-sided lower confidence limit of the rate."""
    return 1.0 - upper_limit(n - errors, n, level) if n else 0.0


def _below(errors: int, n: int, rate: float) -> float:
    """P(at most `errors`): a sum of few terms, not kept."""
    k = np.arange(errors + 1)
    logs = np.log(np.arange(1, n + 1))
    factorials = np.concatenate([[0.0], np.cumsum(logs)])
    with np.errstate(divide="ignore"):
        terms = factorials[n] - factorials[k] - factorials[n - k] + k * np.log(rate) + (n - k) * np.log1p(-rate)
    return float(min(np.exp(terms).sum(), 1.0))
