"""Differences, steps and divergences of paired runs, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from quality_results import compared, grid, result

from benchmarks.quality.pairs import (
    diverged,
    diverged_alone,
    first_step_at,
    own_difference,
    same_rate_difference,
    share_of_steps,
)

pytestmark = pytest.mark.once

NAN, INF = math.nan, math.inf


def test_differences_pair_the_shared_seeds_at_either_rate() -> None:
    comparison = compared(
        [
            *grid("plain", {1e-3: [1.0, 0.8, 1.25], 3e-3: [1.1, 1.1, 1.1]}),
            *(result("eva", 1e-3, seed, final) for seed, final in ((1, 1.0), (2, 1.0), (3, 0.1))),
            *(result("eva", 3e-3, seed, final) for seed, final in ((1, 0.6), (2, 1.1), (3, 0.1))),
        ]
    )
    assert (comparison.rate("plain"), comparison.rate("eva")) == (1e-3, 3e-3)
    assert same_rate_difference(comparison, "eva") == pytest.approx({1: 0.25, 2: -0.2})
    assert own_difference(comparison, "eva") == pytest.approx({1: -0.25, 2: -0.12})
    assert own_difference(comparison, "plain", "eva") == pytest.approx({1: 1 / 3, 2: 1.25 / 1.1 - 1})
    assert own_difference(comparison, "never run") == {}


def test_a_start_on_its_own_base_is_not_paired() -> None:
    comparison = compared([*grid("plain", {1e-3: [1.0, 0.9]}), *grid("pissa", {1e-3: [0.9, 0.8]}, own_base=True)])
    assert own_difference(comparison, "pissa") == same_rate_difference(comparison, "pissa") == {}
    assert comparison.finals("pissa", 1e-3) == {0: 0.9, 1: 0.8}


def test_a_curve_is_interpolated() -> None:
    curve = [(0, 2.0), (50, 1.1), (100, 0.8)]
    assert first_step_at(curve, 1.0) == pytest.approx(50 + 50 / 3)
    assert first_step_at(curve, 1.1) == 50
    assert first_step_at(curve, 0.7) is None
    assert first_step_at(curve, 2.5) == 0
    assert first_step_at([(0, 2.0), (20, 0.9), (40, 1.2), (60, 0.7)], 1.0) == pytest.approx(20 / 1.1)  # the first time
    assert first_step_at([(0, 2.0), (20, NAN), (40, 0.9)], 1.0) == 40


def test_steps_to_plains_loss_are_of_the_mean_curve_at_each_ones_best_rate() -> None:
    comparison = compared(
        [
            *(result("plain", 1e-3, seed, final) for seed, final in ((0, 1.05), (1, 0.95), (2, 0.2))),
            result("plain", 1e-2, 0, 1.4),
            result("eva", 3e-3, 0, 0.8, [(0, 2.0), (50, 1.2)]),
            result("eva", 3e-3, 1, 0.8, [(0, 2.0), (50, 1.0)]),
            result("eva", 1e-3, 0, 0.9, [(0, 2.0), (10, 0.9)]),
            result("ga", 1e-3, 0, 1.2),
            result("ga", 1e-3, 1, 1.2),
            result("one", 1e-3, 7, 0.1),
        ]
    )
    # Seeds 0 and 1: plain LoRA ends at 1.0; the mean curve is 2.0, 1.1, 0.8 and so there at 50 + 50/3 of 100.
    assert share_of_steps(comparison, "eva") == pytest.approx(2 / 3)
    assert share_of_steps(comparison, "ga") == INF
    assert share_of_steps(comparison, "one") is None
    assert share_of_steps(comparison, "plain") == 1


def test_divergence_is_held_against_a_start_only_where_plain_stands() -> None:
    comparison = compared(
        [
            *grid("plain", {1e-4: [1.0, 1.0], 1e-3: [1.0, 1.0], 1e-2: [1.0, 1.6]}),
            *grid("eva", {1e-4: [1.0, 1.0], 1e-3: [1.0, NAN], 1e-2: [1.6, 1.6], 1e-1: [NAN]}),
        ]
    )
    assert diverged(comparison, "plain") == [1e-2]
    assert diverged(comparison, "eva") == [1e-3, 1e-2, 1e-1]
    assert diverged_alone(comparison, "eva") == [1e-3]
