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


@pytest.mark.parametrize("change", [{"step": 5}, {"split": "train"}])
def test_a_sweep_that_nothing_reads_is_refused(folder, change):
    with pytest.raises(BenchmarkError, match="too many|split is 'train'"):
        sweep(folder, **change)


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
