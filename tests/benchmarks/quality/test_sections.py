"""Which tasks stand together, and the means over them."""

from __future__ import annotations

import pytest
from quality_results import grid, result

from benchmarks.quality.analysis import compare
from benchmarks.quality.pairs import own_difference
from benchmarks.quality.sections import sections

pytestmark = pytest.mark.once


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


def test_shorter_runs_stand_beside_whole_ones_unless_plain_is_among_them() -> None:
    shorter = [result("eva", steps=70), result("eva", steps=60)]
    assert [s.conditions.steps for s in sections(compare([result(), *shorter]))] == [60, 100]  # 60 is nobody's
    assert [s.conditions.steps for s in sections(compare([result(), *shorter, result(steps=70)]))] == [60, 70, 100]


def test_runs_that_differ_in_adapters_or_scaling_are_told_apart() -> None:
    found = sections(compare([result(), result(adapters="float32"), result(alpha_over_r=0.5)]))
    assert len({section.title for section in found}) == len(found) == 3


def test_the_test_comes_first() -> None:
    found = sections(compare([result(), result(rank=32, split="test"), result(split="test")]))
    assert [(s.conditions.split, s.conditions.rank) for s in found] == [("test", 8), ("test", 32), ("development", 8)]
