"""Means over seeds and their 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its interval: infinite for a single value, NaN if a value is no number."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def interval(values: Iterable[float]) -> Interval | None:
    """Estimate the mean of independent values with Student's t interval; None without any."""
    numbers = list(values)
    n = len(numbers)
    if not numbers:
        return None
    half = t_quantile(n - 1, CONFIDENCE) * spread(numbers) / math.sqrt(n) if n > 1 else math.inf
    return Interval(mean(numbers), half, n)


def mean(values: Iterable[float]) -> float:
    """Average; NaN if a value is not finite."""
    numbers = list(values)
    return fmean(numbers) if all(map(math.isfinite, numbers)) else math.nan


def spread(values: Iterable[float]) -> float:
    """Take the sample standard deviation; NaN for fewer than two values, or if one is not finite."""
    numbers = list(values)
    return stdev(numbers) if len(numbers) > 1 and all(map(math.isfinite, numbers)) else math.nan


def t_quantile(freedom: int, confidence: float) -> float:
    """Find t with P(|T| ≤ t) = confidence for Student's T of so many degrees of freedom."""
    return float(stats.t.ppf((1 + confidence) / 2, freedom))
