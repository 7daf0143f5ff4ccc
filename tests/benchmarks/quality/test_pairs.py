"""Differences, steps and divergences of paired runs, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from quality_results import compared, grid, result

from benchmarks.quality.analysis import compare
from benchmarks.quality.pairs import (
    diverged,
    diverged_alone,
    first_step_at,
    init_steps,
    own_difference,
    same_rate_difference,
    share_at,
    share_of_steps,
    shorter_difference,
    wall_share_at,
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


def test_at_one_rate_both_are_compared_there() -> None:
    comparison = compared(
        [
            *grid("plain", {1e-3: [1.0], 1e-2: [0.5]}),
            result("eva", 1e-3, 0, 0.8, [(0, 2.0), (50, 1.2)]),
            result("eva", 1e-2, 0, 0.4, [(0, 2.0), (20, 0.5)]),
        ]
    )
    assert share_at(comparison, "eva", 1e-3) == pytest.approx(0.75)
    assert share_at(comparison, "eva", 1e-2) == pytest.approx(0.2)
    assert share_at(comparison, "eva", 1e-1) is None


@pytest.mark.parametrize(
    ("curve", "full", "expected"),
    [
        ([(0, 2.0), (60, 0.1)], [(50, 1.2), (80, 0.9), (100, 0.6)], 0.7),  # crossed between two looks at all rows
        ([(0, 2.0), (20, 0.6)], [(50, 0.8), (100, 0.6)], 0.13 / 0.7),  # before that on the curve's: plain's end is 0.7
        ([(0, 2.0), (60, 0.9)], [(50, 0.8), (100, 0.6)], 0.5),  # by then at the latest
        ([(0, 2.0), (90, 0.1)], [(50, 1.2), (100, 1.1)], INF),
        ([(0, 2.0), (20, 0.7)], [(100, 1.1)], 0.2),  # all rows at the end only
    ],
)
def test_a_crossing_is_looked_for_on_all_rows(
    curve: list[tuple[int, float]], full: list[tuple[int, float]], expected: float
) -> None:
    plain = replace(result("plain", 1e-3), heldout=[(0, 2.0), (100, 0.7)], full=[(100, 1.0)])
    own = replace(result("eva", 1e-3), heldout=[*curve, (100, 0.5)], full=full)
    assert share_at(compared([plain, own]), "eva", 1e-3) == pytest.approx(expected)


def test_wall_time_has_the_initialisation_in_it() -> None:
    """Plain LoRA's start takes the time of 5 of its 100 steps, eva's that of 10 or 15 of its own; one from the cache
    and one whose steps nobody timed do not count."""
    timed = {"init_seconds": 10.0, "step_seconds": 2.0}
    comparison = compared(
        [
            result("plain", 1e-3, 0, 1.0, **timed),
            result("eva", 1e-3, 0, 0.8, [(0, 2.0), (50, 1.0)], init_seconds=40.0, step_seconds=4.0),
            result("eva", 1e-2, 0, 0.8, init_seconds=60.0, step_seconds=4.0),
            result("eva", 1e-2, 1, 0.8, init_seconds=4e9, step_seconds=4.0, from_cache=True),
            result("eva", 1e-2, 2, 0.8, init_seconds=4e9),
            result("old", 1e-3, 0, 0.8),
        ]
    )
    assert init_steps(comparison, "eva") == pytest.approx(12.5)
    assert wall_share_at(comparison, "eva", 1e-3) == pytest.approx((50 + 12.5) / 105)
    assert wall_share_at(comparison, "plain", 1e-3) == pytest.approx(1.0)
    assert wall_share_at(comparison, "old", 1e-3) is None


@pytest.mark.parametrize(
    ("settings", "steps"), [({"match_rate": False}, 8.0), ({"A_times": 8.0}, 8.0), ({"damping": 1.0}, None)]
)
def test_a_start_from_the_cache_takes_what_it_was_solved_in(settings: dict[str, Any], steps: float | None) -> None:
    """By a run that differs in the scale of lora_A alone."""
    once = result("once", init_seconds=16.0, step_seconds=2.0, method="lora_da", settings=settings)
    again = result("again", init_seconds=0.1, step_seconds=2.0, method="lora_da", from_cache=True)
    assert init_steps(compared([result("plain"), once, again]), "again") == steps


def test_a_shorter_run_is_held_against_plains_whole_one() -> None:
    whole = [*grid("plain", {1e-3: [1.0, 0.8], 1e-2: [0.5]}), *grid("eva", {1e-3: [0.9, 0.7]})]
    shorter = [replace(one, cell=replace(one.cell, steps=70)) for one in grid("eva", {1e-3: [0.95, 0.88]})]
    others = [replace(one, cell=replace(one.cell, steps=70, rank=32)) for one in grid("eva", {1e-3: [0.1]})]
    comparison = next(c for c in compare([*whole, *shorter, *others]) if c.conditions.steps == 100)
    assert shorter_difference(comparison, "eva", 1e-3) == pytest.approx({0: -0.05, 1: 0.1})
    assert shorter_difference(comparison, "eva", 1e-2) == {}
    assert shorter_difference(comparison, "plain", 1e-3) == {}
    assert shorter_difference(compared(whole), "eva", 1e-3) == {}


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
