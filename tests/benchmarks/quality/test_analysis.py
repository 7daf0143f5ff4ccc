"""The learning rate a start is judged at, and the name it has, against what was worked out by hand."""

from __future__ import annotations

import math

import pytest
from quality_results import compared, grid, result

from benchmarks.quality.analysis import compare, labels
from benchmarks.quality.pairs import own_difference

pytestmark = pytest.mark.once

NAN, INF = math.nan, math.inf


def test_the_best_rate_is_of_the_lowest_mean_and_the_grids_end_is_flagged() -> None:
    comparison = compared(
        [
            *grid("plain", {1e-4: [1.2, 1.2], 3e-4: [0.9, 1.1], 1e-3: [1.1, 1.0], 3e-3: [0.5, NAN]}),
            *grid("eva", {1e-4: [0.9, 0.9], 3e-4: [1.0, 1.0]}),
            *grid("ga", {1e-4: [1.0, 1.0], 3e-4: [0.9, 0.9]}),
            *grid("one", {1e-4: [NAN, 1.0], 3e-4: [INF, 0.9]}),
        ]
    )
    assert list(comparison.starts) == ["plain", "eva", "ga", "one"]
    found = {label: (chosen.rate, chosen.points, chosen.at_edge) for label, chosen in comparison.chosen.items()}
    assert found == {
        "plain": (3e-4, 4, False),  # 3e-3 is lower and a seed of it no number
        "eva": (1e-4, 2, True),
        "ga": (3e-4, 2, True),
        "one": (None, 2, False),
    }


def test_an_unfinished_grid_is_judged_on_the_seeds_that_all_rates_have() -> None:
    losses = {1e-4: [1.0], 3e-4: [0.9, 1.3]}  # over what is there 1.0 against 1.1; on seed 0, 1.0 against 0.9
    assert compared(grid("plain", losses)).rate("plain") == 3e-4
    apart = [result(rate=1e-4, seed=0, final=1.0), result(rate=3e-4, seed=1, final=1.1)]
    assert compared(apart).rate("plain") == 1e-4


def test_development_chooses_the_rates_of_the_test() -> None:
    found = compare(
        [
            *grid("plain", {1e-4: [1.2], 3e-4: [1.0], 1e-3: [1.1]}),
            *grid("eva", {1e-4: [1.2], 3e-4: [1.1], 1e-3: [1.0]}),
            *grid("plain", {3e-4: [0.9], 1e-3: [0.8]}, split="test", heldout_rows=1000),
            *grid("eva", {3e-4: [0.7], 1e-3: [0.8]}, split="test", heldout_rows=1000),
            *grid("ga", {3e-4: [0.7], 1e-3: [0.8]}, split="test", heldout_rows=1000),
            *grid("plain", {1e-4: [0.5]}, rank=32),  # another rank chooses for itself
        ]
    )
    (test,) = [comparison for comparison in found if comparison.conditions.split == "test"]
    found_rates = {label: (chosen.rate, chosen.split, chosen.points) for label, chosen in test.chosen.items()}
    assert found_rates == {
        "plain": (3e-4, "development", 3),
        "eva": (1e-3, "development", 3),
        "ga": (3e-4, "test", 2),
    }
    assert own_difference(test, "eva") == pytest.approx({0: 0.8 / 0.9 - 1})


@pytest.mark.parametrize(("lengths", "chosen"), [([64], (64, 1e-3)), ([64, 128], (128, 3e-4))])
def test_rates_may_be_chosen_on_rows_of_another_length(lengths: list[int], chosen: tuple[int, float]) -> None:
    """The test's rows have up to 128 tokens: development rows of the same length come first."""
    best = {64: {3e-4: [1.1], 1e-3: [1.0]}, 128: {3e-4: [0.9], 1e-3: [1.0]}}
    development = [run for length in lengths for run in grid("plain", best[length], length=length)]
    found = compare([*development, *grid("plain", {3e-4: [0.9], 1e-3: [0.8]}, split="test", length=128)])
    (test,) = [comparison for comparison in found if comparison.conditions.split == "test"]
    assert (test.chosen["plain"].length, test.chosen["plain"].rate) == chosen


def test_starts_of_one_name_are_told_apart_by_what_differs() -> None:
    named = [
        result("plain", init_samples=16),
        result("plain", seed=1, init_samples=64),
        result("eva", init_samples=16),
        result("default", settings={"gamma": 8, "top": 1}),
        result("default", settings={"gamma": 9, "top": 1}),
        result("other", settings={"gamma": 8}),
        result("other"),
    ]
    found = labels(one.cell for one in named)
    assert [found[one.cell] for one in named] == [
        *("plain", "plain", "eva", "default (gamma 8)", "default (gamma 9)", "other (gamma 8)", "other (as preset)")
    ]
