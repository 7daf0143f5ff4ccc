"""How numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable

from benchmarks.quality.intervals import Interval, mean, spread

NOTHING = "–"


def learning_rate(rate: float | None) -> str:
    return NOTHING if rate is None else f"{rate:.3g}"


def loss(values: Iterable[float]) -> str:
    """Write mean ± standard deviation (number of seeds); a dash without any."""
    numbers = list(values)
    if not numbers:
        return NOTHING
    if math.isnan(mean(numbers)):
        return f"NaN ({len(numbers)})"
    return f"{mean(numbers):.4f}{f' ± {spread(numbers):.4f}' if len(numbers) > 1 else ''} ({len(numbers)})"


def percent(found: Interval | None) -> str:
    """Write a relative difference with its interval; what one seed says has none."""
    if found is None:
        return NOTHING
    if math.isnan(found.mean):
        return "NaN"
    if found.n == 1:
        return f"{found.mean:+.2%}, one seed"
    return f"{found.mean:+.2%} [{found.low:+.2%}, {found.high:+.2%}]"


def share(found: float | None) -> str:
    """Write steps over plain LoRA's steps."""
    if found is None:
        return NOTHING
    return "never" if math.isinf(found) else f"{found:.2f} ×"


def average(values: Iterable[float], digits: int) -> str:
    numbers = list(values)
    return f"{mean(numbers):.{digits}f}" if numbers else NOTHING
