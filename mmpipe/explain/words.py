"""Numbers of the page that are too small, or too large, for the report's words."""

from __future__ import annotations

from mmpipe.graphs.draw import size
from mmpipe.jobs import markup

__all__ = ["duration", "rate", "size"]


def duration(seconds: float) -> str:
    """0.0000123 → 12.3 µs; 0.00042 → 420 µs; 0.0123 → 12.3 ms; 0.2 → 200 ms; from a second on as in the report."""
    if seconds <= 0:
        return "0"
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        value = seconds * factor
        if value < 999.5:
            return f"{value:.3g} {unit}" if value < 99.5 else f"{value:.0f} {unit}"
    return markup.seconds(seconds)


def rate(gflops_per_second: float) -> str:
    """3.2 → 3.2 GFLOP/s; 4100 → 4.1 TFLOP/s; nothing to count → –."""
    if not gflops_per_second > 0:
        return "–"
    if gflops_per_second >= 999.5:
        return f"{gflops_per_second / 1e3:.1f} TFLOP/s"
    return f"{gflops_per_second:.3g} GFLOP/s"
