"""The solver on spectra like those of real layers: it captures what a dense float64 solver captures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import oracle_solve
from solving import damp_input, solve_lora_da, solve_lora_ga, solve_lora_one
from spectra import doubled, orthonormal, realistic, share

from lora_da.config import PRESETS
from lora_da.methods.common import MAX_FLOAT32_CONDITION
from lora_da.methods.method import Preset
from lora_da.statistics import LayerStatistics

pytestmark = pytest.mark.once

CAPTURED = 1e-4  # of the bias: what no training run can tell
POPULATION = 1e5


def numbers(preset: Preset) -> dict:
    names = ("variance_weight", "damping", "relative_damping", "gamma", "normalize_step")
    return {"population": POPULATION, **{name: getattr(preset, name) for name in names}}


def lost(statistics: LayerStatistics, rank: int, preset: Preset) -> float:
    """How much less of the bias is captured than the oracle captures; what is reported is what is captured."""
    ours = solve_lora_da(statistics, rank, **numbers(preset))
    oracle = oracle_solve(*doubled(statistics), rank, **numbers(preset))
    captured = share(ours.lora_A, oracle.direction)
    assert ours.bias_captured == pytest.approx(captured, abs=CAPTURED)
    return share(oracle.subspace.T, oracle.direction) - captured


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("damping", [0.1, 0.01])
@pytest.mark.parametrize("condition", [1e4, 1e6, 1e8])
@pytest.mark.parametrize(("o", "i", "decay"), [(576, 576, 0.5), (1536, 576, 1.0), (192, 640, 1.5)])
def test_it_captures_what_a_dense_solver_does(
    o: int, i: int, decay: float, condition: float, damping: float, rank: int
) -> None:
    statistics = realistic(o, i, condition, decay)
    assert abs(lost(statistics, rank, replace(PRESETS["default"], damping=damping))) <= CAPTURED


@pytest.mark.slow
def test_so_it_does_in_a_wide_layer() -> None:
    assert abs(lost(realistic(576, 1536, 1e8, 0.5), 8, PRESETS["default"])) <= CAPTURED


@pytest.mark.parametrize("preset", ["paper", "reference"])
@pytest.mark.parametrize("condition", [1e4, 1e8])
def test_nor_is_anything_lost_in_float64(preset: str, condition: float) -> None:
    assert abs(lost(realistic(384, 384, condition, 0.5), 8, PRESETS[preset])) <= CAPTURED


@pytest.mark.parametrize("condition", [1e4, 1e5, 4e5, 1e6, 1e7, 1e8])
def test_float32_is_used_as_far_as_it_suffices(condition: float) -> None:
    """The worst case: one direction has all of the energy, and the damping is what is left for the others."""
    o, i = 96, 384
    g = torch.Generator().manual_seed(0)
    values = 1e-10 * torch.rand(i, generator=g, dtype=torch.float64)
    values[0] = 1.0
    root = orthonormal(i, i, g) * values.sqrt()
    falling = torch.arange(1, o + 1, dtype=torch.float64) ** -0.7
    grad = (orthonormal(o, o, g) * falling) @ (root @ torch.randn(i, o, generator=g, dtype=torch.float64)).T
    fisher = torch.exp(torch.randn(o, generator=g))
    statistics = LayerStatistics(grad.float(), (root @ root.T).float(), fisher, 100)
    preset = replace(PRESETS["default"], damping=1 / condition, relative_damping=False)
    factor = damp_input(statistics.input_cov, preset.damping, False).factor
    assert factor.dtype == (torch.float32 if condition <= MAX_FLOAT32_CONDITION else torch.float64)
    assert abs(lost(statistics, 8, preset)) <= CAPTURED


@pytest.mark.parametrize("condition", [1e4, 1e6, 1e8])
@pytest.mark.parametrize(("o", "i"), [(160, 300), (300, 160), (96, 640)])
def test_gradients_in_float32_give_what_float64_does(o: int, i: int, condition: float) -> None:
    """Singular values over many decades, below one that is a hundred times as large as the next."""
    g, k, rank = torch.Generator().manual_seed(0), min(o, i), 8
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), k, dtype=torch.float64)
    values[0] = 100.0
    grad = ((orthonormal(o, k, g) * values) @ orthonormal(i, k, g).T).float()
    truth = torch.linalg.svd(grad.double(), full_matrices=False)
    ga = solve_lora_ga(LayerStatistics(grad, None, None, 1), rank, gamma=16.0)
    one = solve_lora_one(LayerStatistics(grad, None, None, 1), rank, gamma=128.0)
    rest = (truth.U[:, 1:] * truth.S[1:]) @ truth.Vh[1:]  # where the largest cannot hide what is lost
    best = (truth.S[1:rank].square().sum() / truth.S[1:].square().sum()).item()
    for rows in (ga.lora_A, one.lora_A):
        assert share(rows, rest.T) == pytest.approx(best, abs=CAPTURED)
    step = -(truth.U[:, :rank] * truth.S[:rank]) @ truth.Vh[:rank] / truth.S[0] / 128.0
    assert torch.linalg.norm(one.lora_B @ one.lora_A - step) <= CAPTURED * torch.linalg.norm(step)
