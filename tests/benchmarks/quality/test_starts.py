"""A control changes of a start what it says, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from letters import sweep

from benchmarks.errors import BenchmarkError
from benchmarks.quality.corpora import split_rows
from benchmarks.quality.starts import CONTROLS, control, digest, matches_rate
from lora_da.adapter import find_adapter
from lora_da.rate import MOST_TIMES

pytestmark = [pytest.mark.once, pytest.mark.slow]


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_control_keeps_what_it_says(data, runner, base, kind):
    cell = dataclasses.replace(sweep(data).cells[0], method="lora_da")
    rows = split_rows(sweep(data).corpora["letters"], base[1], "development", 20, 4, 10, seed=0)
    adapted, _ = runner._start(rows, cell)()
    try:
        chosen = {layer.name: layer.lora_A.detach().clone() for layer in find_adapter(adapted).layers}
        stepped = {layer.name: layer.lora_B.detach().clone() for layer in find_adapter(adapted).layers}
        assert all(b.any() for b in stepped.values())
        control(adapted, kind, seed=0)
        for layer in find_adapter(adapted).layers:
            a, before = layer.lora_A.detach(), chosen[layer.name]
            assert torch.equal(layer.lora_B, stepped[layer.name] * (0.5 if kind == "half_B" else 0.0))
            direction = torch.nn.functional.cosine_similarity(a.flatten(), before.flatten(), dim=0)
            assert (direction > 0.999) == (kind != "random_A")
            expected = before.norm() if kind != "plain_scale" else (layer.plain_variance * a.numel()) ** 0.5
            assert a.norm().item() == pytest.approx(float(expected), rel=1e-5)
    finally:
        adapted.unload()


def test_plain_lora_is_scaled(data, runner, base):
    rows, found = split_rows(sweep(data).corpora["letters"], base[1], "development", 20, 4, 10, seed=0), []
    for settings in ({}, {"A_times": 4.0}):
        torch.manual_seed(1)
        adapted, _ = runner._start(rows, dataclasses.replace(sweep(data).cells[0], settings=settings))()
        found.append([layer.lora_A.detach().clone() for layer in find_adapter(adapted).layers])
        assert not any(layer.lora_B.any() for layer in find_adapter(adapted).layers)
        adapted.unload()
    assert all(torch.equal(4 * once, scaled) for once, scaled in zip(*found, strict=True))


def test_a_start_is_scaled_and_its_step_stays(data, runner, base):
    rows, found = split_rows(sweep(data).corpora["letters"], base[1], "development", 20, 4, 10, seed=0), []
    ours = next(cell for cell in sweep(data).cells if cell.method == "lora_da")
    for settings in (ours.settings, {**ours.settings, "A_times": 4.0}):
        adapted, _ = runner._start(rows, dataclasses.replace(ours, settings=settings))()
        found.append([(layer.lora_A.detach().clone(), layer.lora_B.detach()) for layer in find_adapter(adapted).layers])
        adapted.unload()
    assert digest(ours.method, {**ours.settings, "A_times": 4.0}) == ours.numbers
    for (a, b), (scaled_a, scaled_b) in zip(*found, strict=True):
        assert b.any() and torch.equal(4 * a, scaled_a) and torch.equal(b, 4 * scaled_b)


def test_a_start_is_matched_to_the_rate_of_its_cell(data, runner, base):
    rows = split_rows(sweep(data).corpora["letters"], base[1], "development", 20, 4, 10, seed=0)
    ours = dataclasses.replace(next(cell for cell in sweep(data).cells if cell.method == "lora_da"), init_samples=6)
    found = {}
    for rate, settings in ((1e-9, {}), (10.0, {}), (1e-9, {"match_rate": False})):
        cell = dataclasses.replace(ours, rate=rate, settings=settings)
        assert matches_rate(cell) == (not settings)
        adapted, _ = runner._start(rows, cell)()
        found[rate, len(settings)] = [layer.lora_A.detach().clone() for layer in find_adapter(adapted).layers]
        adapted.unload()
    for small, large, left in zip(*found.values(), strict=True):
        assert torch.equal(small, MOST_TIMES * large) and torch.equal(large, left)
    assert digest("lora_da", {}) != digest("lora_da", {"match_rate": False})


@pytest.mark.parametrize(("method", "setting"), [("plain", "gamma"), ("eva", "A_times")])
def test_settings_that_nothing_reads_are_refused(method, setting):
    assert digest("plain", {"A_times": 2.0}) == ""
    with pytest.raises(BenchmarkError, match=f"{method} has no setting '{setting}'"):
        digest(method, {setting: 2.0})
