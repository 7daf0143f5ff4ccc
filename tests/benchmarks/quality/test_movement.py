"""What is told of an adapter that moves is so: against products that are formed."""

from __future__ import annotations

import math

import pytest
import torch
from models import tiny_llama, with_lora

from benchmarks.quality.movement import FIGURES, Movement, effective_rank
from lora_da.adapter import AdapterLayer, find_adapter

pytestmark = pytest.mark.once

KINDS = ("q_proj", "down_proj")
ROUNDED = 1e-3  # figures have four digits


def move(layers: list[AdapterLayer], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            layer.lora_A.add_(0.1 * torch.randn(layer.lora_A.shape, generator=generator))
            layer.lora_B.add_(torch.randn(layer.lora_B.shape, generator=generator))


def dense(layer: AdapterLayer) -> torch.Tensor:
    return (layer.scaling * layer.lora_B @ layer.lora_A).detach().double()


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_the_products(kind: str) -> None:
    model = with_lora(tiny_llama(num_hidden_layers=1), target_modules=list(KINDS))
    layers = find_adapter(model).layers
    move(layers, 0)
    layer = next(layer for layer in layers if layer.name.endswith(kind))
    movement, start, a0 = Movement(model), dense(layer), layer.lora_A.detach().double().clone()
    move(layers, 1)
    found = {figure: values[kind] for figure, values in movement.figures().items()}
    norm = layer.base.weight.double().norm()
    values = torch.linalg.svdvals(dense(layer))[: layer.rank]
    shares = values / values.sum()
    a = layer.lora_A.detach().double()
    inside = a @ torch.linalg.pinv(a0) @ a0
    expected = {
        "step": dense(layer).norm() / norm,
        "travelled": (dense(layer) - start).norm() / norm,
        "effective_rank": torch.exp(-(shares * shares.log()).sum()),
        "turned": (a - inside).square().sum() / a.square().sum(),
        "growth": a.norm() / a0.norm(),
    }
    assert set(found) == set(FIGURES)
    for figure, value in expected.items():
        assert found[figure] == pytest.approx(float(value), rel=ROUNDED), figure


def test_an_adapter_that_stands_has_not_moved() -> None:
    model = with_lora(tiny_llama(num_hidden_layers=1))
    figures = Movement(model).figures()
    for figure, value in (("step", 0), ("travelled", 0), ("effective_rank", 0), ("turned", 0), ("growth", 1)):
        assert list(figures[figure].values()) == pytest.approx([value] * len(figures[figure]), abs=1e-12)


def test_the_effective_rank_counts_equal_values() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([1.0, 3.0])) == pytest.approx(
        math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    )
