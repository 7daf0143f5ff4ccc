"""Means over seeds and their 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev

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
    """Student's t interval of the mean of independent values; None without any."""
    numbers = list(values)
    n = len(numbers)
    if not numbers:
        return None
    half = t_quantile(n - 1) * spread(numbers) / math.sqrt(n) if n > 1 else math.inf
    return Interval(mean(numbers), half, n)


def mean(values: Iterable[float]) -> float:
    """The mean; NaN if a value is not finite."""
    numbers = list(values)
    return fmean(numbers) if all(map(math.isfinite, numbers)) else math.nan


def spread(values: Iterable[float]) -> float:
    """The sample standard deviation; NaN for fewer than two values, or if one is not finite."""
    numbers = list(values)
    return stdev(numbers) if len(numbers) > 1 and all(map(math.isfinite, numbers)) else math.nan


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """t with P(|T| ≤ t) = confidence for Student's T of so many degrees of freedom, to double precision.

    By bisection of the angle; SciPy is no dependency here, and for whole degrees the probability is a finite sum.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _central_probability(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _central_probability(angle: float, freedom: int) -> float:
    """P(|T| ≤ √freedom · tan angle): Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
