"""A sweep asks for every cell once, and knows it by its data and by what its settings resolve to."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from letters import SWEEP, TRAIN, sweep
from words import as_lines

from benchmarks.errors import BenchmarkError
from benchmarks.quality.sweep import read_sweep
from lora_da.config import PRESETS

pytestmark = [pytest.mark.once, pytest.mark.slow]


def test_every_cell_is_asked_for_once(folder):
    cells = sweep(folder).cells
    assert len(set(cells)) == len(cells) == 2 * (2 + 1 + 1)
    assert [(c.start, c.rate) for c in cells if c.seed == 3] == [
        ("plain", 0.001),
        ("plain", 0.01),
        ("ours", 0.01),
        ("again", 0.01),
    ]


PROFILES = {"users": {"rate": 2e-4, "alpha_over_r": 0.5}, "best": {"rate": {"letters": 3e-3}, "alpha_over_r": 2}}
IN_PROFILES = {"rates": None, "starts": {"plain": {"method": "plain"}, "ours": {"method": "lora_da"}}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"step": 5}, "too many"),
        ({"split": "train"}, "split is 'train'; set one of development, test"),
        ({"adapters": "fp32"}, "adapters is 'fp32'; set one of float32, bf16"),
        ({"profiles": PROFILES}, "'rates'. too many"),
        ({**IN_PROFILES, "profiles": PROFILES, "alpha_over_r": 1.0}, "alpha_over_r is a profile's"),
        ({**IN_PROFILES, "profiles": {"users": {"rate": 1.0}}}, "sweep.yml: .*alpha_over_r"),
        ({**IN_PROFILES, "profiles": PROFILES | {"none": {"rate": {"e2e": 1.0}, "alpha_over_r": 1}}}, "no 'letters'"),
        ({"rates": None, "profiles": PROFILES}, "sweep.yml: .*'rates'"),  # of a start's own
    ],
)
def test_a_sweep_that_nothing_reads_is_refused(folder, change, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        sweep(folder, **change)


def test_profiles_are_rates_by_task_with_their_scaling(folder):
    other = {**SWEEP["tasks"], "others": SWEEP["tasks"]["letters"]}
    best = {"rate": {"letters": 3e-3, "others": 2e-4}, "alpha_over_r": 0.5}
    profiles = {"users": PROFILES["users"], "best": best}
    cells = sweep(folder, **IN_PROFILES, profiles=profiles, tasks=other, seeds=3).cells
    assert [(c.start, c.task, c.rate, c.alpha_over_r) for c in cells] == [
        (start, task, rate, 0.5)
        for task, rate in (("letters", 2e-4), ("others", 2e-4), ("letters", 3e-3))  # once where profiles meet
        for start in ("plain", "ours")
    ]


def test_a_start_may_have_steps_of_its_own(folder):
    starts = {"plain": {"method": "plain"}, "ours": {"method": "lora_da", "steps": [5, 10]}}
    cells = sweep(folder, steps=10, rates=0.1, seeds=3, starts=starts).cells
    assert [(cell.start, cell.steps) for cell in cells] == [("plain", 10), ("ours", 10), ("ours", 5)]


def test_what_is_asked_for_of_all_is_in_every_cell(folder):
    letters = {**SWEEP["tasks"]["letters"], "exact_match_rows": 3}
    asked = sweep(folder, adapters="float32", full_at=[0.5], alpha_over_r=1.0, tasks={"letters": letters})
    expected = {("float32", (0.5,), 1.0, 3)}
    assert {(c.adapters, c.full_at, c.alpha_over_r, c.exact_match_rows) for c in asked.cells} == expected
    assert asked.prediction and not sweep(folder, prediction=False).prediction
    assert {(c.adapters, c.full_at, c.alpha_over_r) for c in sweep(folder).cells} == {("bf16", (), 2.0)}


def test_a_control_changes_one_thing_of_another_start(folder):
    starts = {
        "plain": {"method": "plain"},
        "twice": {"method": "plain", "settings": {"A_times": 2}},
        "zero": {"method": "lora_da", "settings": {"control": "zero_B"}},
        "ours": {"method": "lora_da", "settings": {"gamma": 16.0}},
    }
    assert sweep(folder, starts=starts, rates=0.1).controls == ["twice", "zero"]


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        ({"method": "lora_da", "settings": {"dampin": 1.0}}, "sweep.yml: .*'dampin'"),
        ({"method": "lora_da", "settings": {"preset": {"base": "best"}}}, "sweep.yml: there is no 'best'"),
        ({"method": "lora_da", "settings": {"preset": "best"}}, "sweep.yml: .*preset"),
        ({"methods": "lora_da"}, "sweep.yml: .*'methods'"),
    ],
)
def test_a_start_that_nobody_knows_is_refused_by_name(folder, start, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        sweep(folder, starts={"plain": {"method": "plain"}, "ours": start})


def test_a_sweep_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BenchmarkError, match="there is no sweep .*nowhere.yml"):
        read_sweep(tmp_path / "nowhere.yml")


def test_other_data_or_other_defaults_are_other_cells(data, monkeypatch):
    before = sweep(data).cells
    with monkeypatch.context() as patch:
        patch.setitem(PRESETS, "default", dataclasses.replace(PRESETS["default"], damping=0.5))
        changed = sweep(data).cells
    assert [a == b for a, b in zip(before, changed, strict=True)] == [cell.start != "ours" for cell in before]
    assert sweep(data).cells == before
    as_lines(data / "other.jsonl", TRAIN[:-1])
    tasks = {"letters": {**SWEEP["tasks"]["letters"], "train": "other.jsonl"}}
    assert not set(before) & set(sweep(data, tasks=tasks).cells)
