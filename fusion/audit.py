"""How often exits disagree with the full pipeline, from a sample: an interval that may be looked at at any time.

A confidence sequence for the mean p of yes-or-no observations: with probability at least 1 - alpha, *all* of its
intervals, after 1, 2, 3, … observations, hold p at once. So an alarm "the lower bound is above the promise" is false
with probability at most alpha over a whole job, however often it is tested. An ordinary interval, looked at again and
again, would miss p sooner or later with certainty.

The beta-binomial mixture: under p, the ratio of the mixture's likelihood to p's own,

    M_n(p) = B(a + k, b + n - k) / B(a, b) / (p^k (1 - p)^(n - k))        k of n observations were yes

is a martingale of mean 1, so by Ville's inequality it ever reaches 1 / alpha with probability at most alpha; the
interval is {p: M_n(p) < 1 / alpha}. Source: H. Robbins, "Statistical methods related to the law of the iterated
logarithm" (1970); S. Howard, A. Ramdas, J. McAuliffe, J. Sekhon, "Time-uniform, nonparametric, nonasymptotic
confidence sequences" (2021), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Where the mixture looks: rates are small, a few per cent when something is wrong. Any values are valid; these are
# narrow there.
PRIOR_YES, PRIOR_NO = 0.5, 10.0
_STEPS = 80  # of bisection: below the last bit of a double


@dataclass(frozen=True)
class Observed:
    """Observations so far: `yes` of `count`, in whatever order they came."""

    count: int = 0
    yes: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.yes <= self.count:
            raise ValueError(f"{self.yes} of {self.count} is no count")

    def plus(self, yes: bool) -> Observed:
        return Observed(self.count + 1, self.yes + yes)

    @property
    def estimate(self) -> float | None:
        """The share of yes; None before the first observation."""
        return self.yes / self.count if self.count else None

    def evidence(self, p: float) -> float:
        """log M_n(p): how much more likely the observations are under the mixture than under p. 0 < p < 1."""
        yes, no = self.yes, self.count - self.yes
        mixture = _log_beta(PRIOR_YES + yes, PRIOR_NO + no) - _log_beta(PRIOR_YES, PRIOR_NO)
        return mixture - yes * math.log(p) - no * math.log1p(-p)

    def interval(self, certainty: float = 0.95) -> tuple[float, float]:
        """The bounds of p, valid at every look at once with this probability. ValueError: certainty not in (0, 1)."""
        if not 0 < certainty < 1:
            raise ValueError(f"certainty is {certainty}: between 0 and 1")
        if not self.count:
            return 0.0, 1.0
        limit, centre = -math.log1p(-certainty), self.yes / self.count
        # the evidence is convex in p and lowest at the observed share, where it is below the limit
        low = self._crossing(0.0, centre, limit) if self.yes else 0.0
        high = self._crossing(1.0, centre, limit) if self.yes < self.count else 1.0
        return low, high

    def _crossing(self, outside: float, inside: float, limit: float) -> float:
        """Where the evidence passes the limit; the point on the outer side, so that rounding only widens."""
        for _ in range(_STEPS):
            middle = (outside + inside) / 2
            if middle in (0.0, 1.0) or self.evidence(middle) >= limit:
                outside = middle
            else:
                inside = middle
        return outside


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def share_of(digest: bytes) -> float:
    """The first eight bytes of a hash as a number in [0, 1): what is below a share is chosen."""
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53
