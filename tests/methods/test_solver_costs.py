"""What a layer's solve takes: decompositions over a whole run, and memory beside the statistics."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from decompositions import Decompositions
from live_bytes import most_live_bytes
from models import batches, documents, tiny_llama, with_lora
from solving import solve_lora_one, spec
from spectra import realistic

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.collect.plan import in_segments
from lora_da.config import PRESETS
from lora_da.methods import METHODS, orthonormal
from lora_da.methods.lora_da import damp_input, float32_up_to, lora_da
from lora_da.methods.method import Preset
from lora_da.statistics import LayerStatistics

pytestmark = pytest.mark.once

BLOCKS = 3
POPULATION = 100_000  # of a training run: where it is tiny, the variance term decides and takes more
PER_LAYER = 12  # decompositions on average, those of Z among them


def decompositions_per_layer(method: str, rank: int) -> float:
    """Counted over a run in segments of one block of a model wide enough for its layers to be iterated on."""
    base = tiny_llama(hidden_size=192, intermediate_size=288, num_hidden_layers=BLOCKS)
    population = {"population_size": POPULATION} if METHODS[method].population else {}
    model, settings = with_lora(base, r=rank), LoraDAConfig(samples=24, method=method, **population)
    with Decompositions() as counted:
        report = initialize_lora_da_weights(
            model, batches(documents(24), 4), settings, show_progress=False, plan=in_segments(BLOCKS)
        )
    assert report.plan.startswith(f"streamed: {BLOCKS} segments") and report.initialized == 7 * BLOCKS
    return counted.total / report.initialized


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("method", ["lora_da", "lora_ga"])
def test_a_layer_takes_few_decompositions(method: str, rank: int) -> None:
    assert 1 < decompositions_per_layer(method, rank) <= PER_LAYER


def test_a_solver_that_takes_more_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deliberate mistake: no block is ever good enough for its Cholesky factor."""
    never = dict.fromkeys(orthonormal.MIN_DISTANCE, math.inf)
    monkeypatch.setattr(orthonormal, "MIN_DISTANCE", never)
    assert decompositions_per_layer("lora_da", 8) > PER_LAYER


def test_live_bytes_are_counted() -> None:
    """At most two of these are alive at once, and what was there before does not count."""
    before = torch.ones(2**20)
    most = most_live_bytes(lambda: ((before + 1) * 2 + 3).sum())
    assert 2 * before.nbytes <= most < 2.1 * before.nbytes


@pytest.mark.parametrize("damping", [0.1, 1e-6])
@pytest.mark.parametrize(("o", "i"), [(576, 1024), (1024, 576)])
def test_solving_stays_within_its_forecast(o: int, i: int, damping: float) -> None:
    numbers = replace(PRESETS["default"], damping=damping)
    statistics = realistic(o, i, 1e6, 1.0)
    taken = METHODS["lora_da"].needs_with(numbers).solving_bytes(i, o)
    assert (taken == METHODS["lora_da"].needs.solving(i, o)) == (i <= float32_up_to(numbers))
    assert most_live_bytes(lambda: solved(statistics, numbers)) <= taken


@pytest.mark.parametrize("o", [256, 1024])
def test_a_full_fisher_stays_within_its_forecast(o: int) -> None:
    numbers, diagonal = PRESETS["paper"], realistic(o, 256, 1e6, 1.0)
    statistics = replace(diagonal, output_fisher=torch.diag(diagonal.output_fisher))
    taken = METHODS["lora_da"].needs_with(numbers).solving_bytes(256, o)
    peak = most_live_bytes(lambda: solved(statistics, numbers))
    assert peak <= taken and peak > METHODS["lora_da"].needs_with(PRESETS["default"]).solving_bytes(256, o)


def test_a_gradient_method_stays_within_its_forecast() -> None:
    o, i = 576, 1024
    statistics = LayerStatistics(realistic(o, i, 1e6, 1.0).grad, None, None, 100)
    assert most_live_bytes(lambda: solve_lora_one(statistics, 8, 128.0)) <= METHODS["lora_one"].needs.solving(i, o)


def test_a_preset_that_needs_float64_is_forecast_with_twice_the_bytes() -> None:
    default, paper = (METHODS["lora_da"].needs_with(PRESETS[name]) for name in ("default", "paper"))
    wide = int(PRESETS["paper"].full_fisher_up_to) + 1
    assert paper.solving_bytes(4096, wide) == 2 * default.solving_bytes(4096, wide)
    slight = METHODS["lora_da"].needs_with(replace(PRESETS["default"], damping=0.01))
    assert slight.solving_bytes(4096, 512) == default.solving_bytes(4096, 512)
    assert slight.solving_bytes(14336, 512) == 2 * default.solving_bytes(14336, 512)


def solved(statistics: LayerStatistics, numbers: Preset) -> object:
    prepared = damp_input(statistics.input_cov, numbers)
    return lora_da(statistics, spec(8, 1e-3, 1e5, prepared=prepared), numbers)
