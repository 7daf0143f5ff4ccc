"""Intervals are those of Student's t."""

from __future__ import annotations

import math

import pytest

from benchmarks.quality.intervals import interval, t_quantile

pytestmark = pytest.mark.once

NAN, INF = math.nan, math.inf


# From printed tables of Student's t, two-sided 95 %.
@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (7, 2.365), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_t_quantiles_are_the_tabulated_ones(freedom: int, t: float) -> None:
    assert t_quantile(freedom, 0.95) == pytest.approx(t, abs=5e-4)


def test_a_quantile_holds_its_probability() -> None:
    """Oracle: for whole degrees a finite sum, Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even)."""

    def central_probability(t: float, freedom: int) -> float:
        angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
        term = math.cos(angle) if odd else 1.0
        total = 0.0
        for k in range(2 + odd, freedom + 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (k - 1) / k
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    for freedom in range(1, 60):
        for confidence in (0.5, 0.95, 0.999):
            found = central_probability(t_quantile(freedom, confidence), freedom)
            assert 1 - found == pytest.approx(1 - confidence, rel=1e-10)


def test_an_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0])  # standard deviation √(5/3), t of 3 degrees 3.18245
    assert found is not None
    assert found.mean == 2.5
    assert found.half == pytest.approx(3.18245 * math.sqrt(5 / 3) / 2, rel=1e-5)
    assert (found.low, found.high) == (2.5 - found.half, 2.5 + found.half)
    one = interval([2.0])
    assert one is not None and (one.mean, one.low, one.high) == (2.0, -INF, INF)
    broken = interval([1.0, NAN, INF])
    assert broken is not None and math.isnan(broken.mean) and math.isnan(broken.high)
    assert interval([]) is None
