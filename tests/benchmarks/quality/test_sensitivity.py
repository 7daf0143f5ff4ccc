"""Which starts differ in one setting only."""

from __future__ import annotations

import math

import pytest
from quality_results import grid, result

from benchmarks.quality import sensitivity
from benchmarks.quality.analysis import compare

pytestmark = pytest.mark.once

NAN = math.nan


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
