"""What the quality benchmark reads from its results, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from quality_results import grid, result

from benchmarks.quality import sensitivity
from benchmarks.quality.analysis import Comparison, compare, labels
from benchmarks.quality.goals import AVERAGE, Verdict, verdicts
from benchmarks.quality.intervals import interval, t_quantile
from benchmarks.quality.pairs import (
    diverged,
    diverged_alone,
    first_step_at,
    own_difference,
    same_rate_difference,
    share_of_steps,
)
from benchmarks.quality.results import Result
from benchmarks.quality.sections import sections

pytestmark = pytest.mark.once

NAN, INF = math.nan, math.inf
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def compared(results: Sequence[Result]) -> Comparison:
    (comparison,) = compare(results)
    return comparison


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


def test_the_mean_over_tasks_is_taken_by_seed() -> None:
    (section,) = sections(
        compare(
            [
                *grid("plain", {1e-3: [1.0, 1.0, 1.0]}),
                *grid("eva", {1e-3: [0.9, 0.8, 0.7]}),
                *grid("plain", {1e-2: [2.0, 2.0]}, task="arc", length=64),
                *grid("eva", {1e-2: [2.2, 2.0]}, task="arc", length=64),
                *grid("ga", {1e-2: [2.2, 2.0]}, task="arc", length=64),
            ]
        )
    )
    assert section.tasks == ["arc", "gsm8k"]
    assert section.average(own_difference, "eva") == pytest.approx({0: 0.0, 1: -0.1})
    assert section.average(own_difference, "ga") == {}
    assert section.average_share("ga") is None


def test_a_task_counts_once_in_a_mean() -> None:
    tasks = {"gsm8k": {}, "arc": {}, "gsm8k again": {"task": "gsm8k", "heldout_rows": 64}}
    found = sections(compare([result(**{"task": name, **changes}) for name, changes in tasks.items()]))
    assert sorted(sorted(section.tasks) for section in found) == [["arc", "gsm8k"], ["gsm8k"]]
    assert len({section.title for section in found}) == 2


def test_what_differs_in_its_data_or_its_curve_only_stands_alone() -> None:
    for same_task in ([{"data": "other"}], [{"curve_rows": 64}], [{"data": "other"}, {"curve_rows": 64}]):
        found = sections(compare([result(task="arc"), result(), *(result(**changes) for changes in same_task)]))
        assert all(len(section.tasks) == 1 for section in found)
        assert len({section.title for section in found}) == len(found) == 2 + len(same_task)


def test_the_test_comes_first() -> None:
    found = sections(compare([result(), result(rank=32, split="test"), result(split="test")]))
    assert [(s.conditions.split, s.conditions.rank) for s in found] == [("test", 8), ("test", 32), ("development", 8)]


def test_sensitivity_takes_what_differs_in_one_setting_only() -> None:
    results = [
        *grid("plain", {1e-3: [1.0]}),
        *grid("default", {1e-3: [0.9]}),
        *grid("default", {1e-3: [0.8]}, init_samples=256),
        *grid("default", {1e-3: [0.7]}, settings={"damping": 1e-3}),
        *grid("default", {1e-3: [0.6]}, settings={"damping": 1e-3, "gamma": 8}),
        *grid("default", {1e-3: [1.1]}, rank=32),
        *grid("plain", {1e-3: [1.0]}, rank=32),
    ]
    found = {}
    for line in sensitivity.lines(compare(results)):
        found[line.knob, line.start.split(" ")[0]] = [(point.value, point.finals[0]) for point in line.points]
    assert found == {
        ("rank", "plain"): [(8, 1.0), (32, 1.0)],
        ("rank", "default"): [(8, 0.9), (32, 1.1)],
        ("init_samples", "default"): [(64, 0.9), (256, 0.8)],
        ("damping", "default"): [(1e-3, 0.7), ("preset's", 0.9)],
        ("gamma", "default"): [(8, 0.6), ("preset's", 0.7)],
    }


def test_a_setting_is_judged_on_the_seeds_that_all_its_values_have() -> None:
    results = [
        *(
            result("default", seed=seed, final=final, settings={"damping": 1e-3})
            for seed, final in ((0, 0.9), (1, 0.8))
        ),
        *(
            result("default", seed=seed, final=final, settings={"damping": 1e-2})
            for seed, final in ((1, 0.7), (2, 0.6))
        ),
        *(result("default", seed=seed, final=NAN, settings={"damping": 1e-1}) for seed in (0, 1)),
    ]
    (line,) = sensitivity.lines(compare(results))
    assert [(point.value, point.finals) for point in line.points] == [(1e-3, {1: 0.8}), (1e-2, {1: 0.7}), (1e-1, {})]
    assert sensitivity.lines(compare([results[0], results[3]])) == []  # no seed in common
    assert sensitivity.lines(compare(grid("default", {1e-3: [NAN]}) + grid("default", {1e-3: [NAN]}, rank=32))) == []


ENDS = {"plain": (1.0, 1.2), "default": (0.95, 0.97), "eva": (0.98, 0.99), "lora_one": (0.99, 1.1)}
ENDS["lora_ga"] = (0.99, 1.1)
RIVALS = {(5, "eva"), (5, "lora_one"), (5, "lora_ga")}


def race(changed: dict[str, tuple[float, float]], at_the_end: dict[str, float]) -> list[Result]:
    """Two tasks, two seeds, five rates, 1e-3 the best of them; `default` ahead of all in everything.

    By start, the loss at the end and half way, of seed 0; seed 1 ends 0.01 higher. `changed` replaces these on gsm8k,
    `at_the_end` is the loss at the highest rate there.
    """
    results = []
    for task in ("arc", "gsm8k"):
        ends, last = (ENDS, {}) if task == "arc" else (ENDS | changed, at_the_end)
        for start, (final, half_way) in ends.items():
            for seed in range(2):
                curve = [(0, 1.5), (50, half_way)]
                results.append(result(start, 1e-3, seed, final + 0.01 * seed, curve, task=task))
                others = {rate: 1.3 for rate in RATES if rate != 1e-3} | {RATES[-1]: last.get(start, 1.3)}
                results += [result(start, rate, seed, loss, task=task) for rate, loss in others.items()]
    return results


def judged(results: Sequence[Result], label: str = "default") -> list[Verdict]:
    (section,) = sections(compare(results))
    return verdicts(section, label)


def test_a_start_that_reaches_all_goals_is_said_to() -> None:
    found = judged(race({}, {}))
    assert [(verdict.goal, verdict.of) for verdict in found] == [
        *((1, "arc"), (1, "gsm8k"), (1, "mean over tasks"), (2, "mean over tasks"), (3, "arc"), (3, "gsm8k")),
        *((4, "arc"), (4, "gsm8k"), (5, "eva"), (5, "lora_one"), (5, "lora_ga")),
    ]
    assert all(verdict.met is True for verdict in found)


@pytest.mark.parametrize(
    ("changed", "at_the_end", "missed"),
    [
        # 2 % above plain LoRA on one task, 5 % below on the other; 4 % above EVA on one, 3 % below on the other.
        ({"default": (1.02, 0.97)}, {}, {(1, "gsm8k"), (5, "eva")}),
        ({"default": (0.95, 1.2)}, {}, {(3, "gsm8k"), (5, "eva")}),  # at 1.005 after 89 steps
        ({}, {"default": NAN}, {(4, "gsm8k"), (5, "eva"), (5, "lora_one"), (5, "lora_ga")}),
        ({}, {"default": 1.6, "plain": 1.6}, set()),
        ({"eva": (0.5, 0.99)}, {}, {(5, "eva")}),
        ({"eva": (0.98, 0.5)}, {}, {(5, "eva")}),
        ({"default": (1.2, 1.2)}, {}, {(1, "gsm8k"), (1, AVERAGE), (2, AVERAGE), (3, "gsm8k"), *RIVALS}),
    ],
    ids=["worse on one", "slow", "diverges", "plain diverges too", "a rival is better", "a rival is faster", "worse"],
)
def test_each_goal_can_be_missed(
    changed: dict[str, tuple[float, float]], at_the_end: dict[str, float], missed: set[tuple[int, str]]
) -> None:
    found = judged(race(changed, at_the_end))
    assert {(verdict.goal, verdict.of) for verdict in found if verdict.met is False} == missed
    assert all(verdict.met is not None for verdict in found)


def test_what_was_not_run_is_undecided() -> None:
    kept = [one for one in race({}, {}) if one.cell.seed == 0 and (one.cell.start, one.cell.task) != ("default", "arc")]
    kept = [
        one for one in kept if one.cell.start != "lora_one" and (one.cell.start, one.cell.rate) != ("default", 1e-2)
    ]
    found = {(v.goal, v.of): (v.met, v.value) for v in judged(kept)}
    met = {key: met for key, (met, _) in found.items()}
    assert set(met.values()) == {None}
    assert found[1, "gsm8k"][1] == "-5.00%, one seed"
    assert found[4, "gsm8k"][1] == "none; run at 4 of 5 such rates"
    assert found[5, "lora_one"][1] == "not run"
