"""A second run of the same thing starts from the first one's solution, and nothing else does."""

from __future__ import annotations

import json
import math

import pytest
import torch
from caching import ROWS, adapted_llama, filled_by, identical, lasting, start
from faults import poison
from logs import warnings_of
from mixtures import mixture
from models import (
    LAYERS,
    LENGTHS,
    QUANTISED,
    adapter_weights,
    batches,
    documents,
    pad,
    tiny_llama,
    tiny_quantized,
    with_lora,
)
from picture import differences, picture
from settings import as_solved
from torch.utils.data import DataLoader


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def filled(folder):
    return filled_by(adapted_llama(), folder)


@pytest.mark.compat("cache")
@pytest.mark.parametrize("kind", ["unquantised", *QUANTISED])
def test_a_second_run_writes_the_same_bits_without_a_pass(tmp_path, folder, kind, capsys):
    if kind != "unquantised":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def fresh(seed):
        base = tiny_llama() if kind == "unquantised" else tiny_quantized(tmp_path / "base", **QUANTISED[kind])
        return with_lora(base, seed)

    without, first, second = fresh(0), fresh(1), fresh(2)
    start(without, None)
    stored, forwards = start(first, folder)
    assert forwards > 0 and not stored.from_cache
    capsys.readouterr()
    found, forwards = start(second, folder, show_progress=True)
    assert forwards == 0 and found.from_cache
    assert identical(adapter_weights(without), adapter_weights(first)) and identical(
        adapter_weights(first), adapter_weights(second)
    )
    assert lasting(stored) == lasting(found) and found.initialized == 14 and len(found.layers) == 14
    line = capsys.readouterr().out.strip()
    assert line.startswith("LoRA-DA: initialised 14 of 14 layers from 8 samples")
    assert line.endswith("; from the cache")
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_come_back_in_their_dtype(folder, dtype):
    models = []
    for seed in range(2):
        model = adapted_llama(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        models.append(model)
    reports = [start(model, folder)[0] for model in models]
    assert [report.from_cache for report in reports] == [False, True]
    assert identical(adapter_weights(models[0]), adapter_weights(models[1]))


def test_only_the_factors_change(folder, filled):
    model = adapted_llama()
    before = picture(model)
    report, forwards = start(model, folder)
    assert forwards == 0
    expected = [f"{layer}.lora_{factor}.default.weight: bits" for layer in report.layers for factor in "AB"]
    assert differences(before, picture(model)) == sorted(expected)


def test_the_report_says_what_was_set_in_this_call(folder, filled):
    report, _ = start(adapted_llama(), folder, memory_budget=1.0)
    assert report.from_cache and report.settings["memory_budget"] == 1.0
    assert report.settings["cache_dir"] == str(folder)


def test_layers_that_keep_their_init_come_back_with_their_reasons(folder, caplog):
    """Failed ones and ones of another kind keep PEFT's init, and are warned of again."""
    seen, starts = [], []
    for seed in range(2):
        model = with_lora(tiny_llama(num_hidden_layers=3), seed)  # 21 layers: one of them is below 5 %
        layer = f"{LAYERS}.0.self_attn.q_proj"
        poison(model, layer, math.nan)
        before = adapter_weights(model)
        report, forwards = start(model, folder)
        assert (forwards == 0) == report.from_cache == (seed == 1)
        after = adapter_weights(model)
        assert all(torch.equal(after[n], before[n]) for n in after if n.startswith(layer))
        assert list(report.failed) == [layer] and report.initialized == 20
        starts.append({n: w for n, w in after.items() if not n.startswith(layer)})
        seen.append((lasting(report), warnings_of(caplog)))
        caplog.clear()
    assert identical(*starts)
    assert seen[0] == seen[1] and len(seen[0][1]) == 1


def test_an_expert_that_no_sample_reached_comes_back(folder, caplog):
    seen = []
    for seed in range(2):
        data = [pad(documents(LENGTHS))]
        report, forwards = start(with_lora(mixture(closed=2), seed), folder, data, population_size=100)
        assert (forwards == 0) == (seed == 1)
        assert report.left and all(".experts.2." in name for name in report.left)
        seen.append((lasting(report), warnings_of(caplog)))
        caplog.clear()
    assert seen[0] == seen[1] and "experts.2." in seen[0][1][-1]


def test_a_trained_adapter_is_left_alone(folder, filled):
    model = adapted_llama()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = 1.0
    before = adapter_weights(model)
    report, _ = start(model, folder)
    assert report.skipped and not report.from_cache and identical(before, adapter_weights(model))


@pytest.mark.parametrize(
    "change", [{"r": 3}, {"lora_alpha": 3}, {"target_modules": ["q_proj"]}, {"init_lora_weights": "gaussian"}]
)
def test_another_adapter_is_solved_anew(folder, filled, change):
    report, forwards = start(adapted_llama(**change), folder)
    assert forwards and not report.from_cache and len(list(folder.iterdir())) == 2


@pytest.mark.compat("cache")
def test_other_data_or_settings_are_solved_anew(folder, filled):
    for data, settings in (
        (DataLoader(documents(12, seed=1), 4, collate_fn=pad), {}),
        (DataLoader(documents(12, prompt=3), 4, collate_fn=pad), {}),
        (batches(ROWS, 4), {"population_size": 13}),
        (None, {"damping": 0.2}),
    ):
        report, forwards = start(adapted_llama(), folder, data, **settings)
        assert forwards and not report.from_cache
    assert len(list(folder.iterdir())) == 5


@pytest.mark.compat("cache")
def test_in_a_trainer_the_second_run_starts_at_once(tmp_path, folder, capsys):
    trainers = pytest.importorskip("trainers", reason="TRL is not installed")
    from lora_da.callback import LoraDACallback

    seen, callbacks = [], []
    for seed in range(2):
        first = trainers.FirstStep()
        callback = LoraDACallback(as_solved(samples=8, cache_dir=str(folder)))
        trainers.plain(adapted_llama(seed), ROWS, tmp_path / f"run-{seed}", callback, first).train()
        seen.append(first.adapter)
        callbacks.append(callback)
    assert trainers.same_bits(*seen)
    saved = [json.loads((tmp_path / f"run-{n}" / "lora_da_report.json").read_text()) for n in range(2)]
    assert [report["from_cache"] for report in saved] == [False, True]
    assert saved[0]["layers"] == saved[1]["layers"]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("LoRA-DA")]
    assert len(said) == 2 and said[1].endswith("; from the cache") and not said[0].endswith("from the cache")
