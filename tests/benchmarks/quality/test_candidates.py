"""What was tried in LoRA-DA's place is what it says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from collecting import distance
from models import LENGTHS, PREFIX, documents, pad, tiny_llama, with_lora
from planning import recorded
from tolerances import REORDERED
from torch import Tensor

pytest.importorskip("trl", reason="TRL is not installed")

from settings import as_solved
from solving import solve_lora_da

from benchmarks.errors import BenchmarkError
from benchmarks.quality.candidates import CANDIDATES
from benchmarks.quality.starts import candidate_of
from lora_da import initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.methods import METHODS
from lora_da.methods.common import LoraFactors
from lora_da.statistics import LayerStatistics

pytestmark = pytest.mark.once

RANK, PLAIN_VARIANCE, DAMPING = 2, 0.02, 0.1
SAMPLING = 0.05  # some four standard errors of a mean over 400 draws, each of 18 half-normal sums
SETTINGS: dict[str, Any] = {
    "population": 1e4,
    "variance_weight": 1.0,
    "damping": DAMPING,
    "relative_damping": True,
    "gamma": 1024.0,
    "normalize_step": True,
    "plain_variance": PLAIN_VARIANCE,
}


def layer(i: int = 7, o: int = 5, cov: Tensor | None = None, fisher: Tensor | None = None) -> LayerStatistics:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, i, generator=generator) * torch.linspace(0.3, 3, i)
    grad = torch.randn(o, i, generator=generator) * 1e-3
    cov = x.T @ x / 40 if cov is None else cov
    return LayerStatistics(grad, cov, torch.rand(o, generator=generator) * 1e-5 if fisher is None else fisher, 40)


def solved(name: str, statistics: LayerStatistics) -> LoraFactors:
    return solve_lora_da(statistics, RANK, solve=CANDIDATES[name].solve, **SETTINGS)


def energy(lora_A: Tensor, statistics: LayerStatistics) -> float:
    return float((lora_A @ statistics.input_cov.double() @ lora_A.T).trace())


def same_span(a: Tensor, b: Tensor) -> bool:
    """Whether the rows of `a` lie in the span of those of `b`."""
    basis = torch.linalg.qr(b.double().T)[0]
    return torch.allclose(a.double() @ basis @ basis.T, a.double(), atol=1e-6 * float(a.abs().max()))


@pytest.mark.parametrize("name", ["half_powers", "gradient", "fisher_metric"])
def test_another_A_starts_at_the_base_with_plain_loras_input_energy(name: str) -> None:
    statistics = layer()
    factors = solved(name, statistics)
    expected = RANK * PLAIN_VARIANCE * statistics.input_cov.trace().item()
    assert energy(factors.lora_A, statistics) == pytest.approx(expected, rel=1e-6)
    assert not factors.lora_B.any()


@pytest.mark.parametrize("name", ["half_powers", "fisher_metric"])
def test_where_the_fisher_says_nothing_all_are_the_gradient(name: str) -> None:
    statistics = layer(cov=torch.eye(7), fisher=torch.full((5,), 1e-5))
    found, default = solved(name, statistics).lora_A, solve_lora_da(statistics, RANK, **SETTINGS).lora_A
    assert same_span(found, solved("gradient", statistics).lora_A)
    assert same_span(found, default)


def test_half_powers_are_half_way() -> None:
    """They make the natural gradient of a gradient that has been through Z^-½ once already."""
    statistics = layer(fisher=torch.full((5,), 1e-5))
    values, vectors = torch.linalg.eigh(statistics.input_cov.double())
    root = vectors @ ((values + DAMPING * values.mean()).rsqrt()[:, None] * vectors.T)
    halved = LayerStatistics(
        statistics.grad.double() @ root, statistics.input_cov, statistics.output_fisher, statistics.n_tokens
    )
    natural = solve_lora_da(statistics, RANK, **(SETTINGS | {"variance_weight": 0.0})).lora_A
    assert same_span(solved("half_powers", halved).lora_A, natural)


def test_the_fisher_metrics_rows_lower_the_quadratic_model_the_most() -> None:
    """Oracle: no other A of this rank, random or the natural gradient's, lowers ⟨G, Δ⟩ + ½ tr(Δᵀ Y Δ Z) as far."""
    statistics = layer()
    cov = statistics.input_cov.double() + DAMPING * statistics.input_cov.double().diagonal().mean() * torch.eye(7)
    fisher = statistics.output_fisher.double()
    fisher = fisher + DAMPING * fisher.mean()

    def decrease(lora_A: Tensor) -> float:
        reduced = statistics.grad.double() @ lora_A.double().T  # (o, r)
        inner = torch.linalg.inv(lora_A.double() @ cov @ lora_A.double().T)
        return float((reduced @ inner * reduced / fisher[:, None]).sum())

    best = decrease(solved("fisher_metric", statistics).lora_A)
    assert best >= decrease(solve_lora_da(statistics, RANK, **SETTINGS).lora_A)
    assert all(best > decrease(torch.randn(RANK, 7, generator=torch.Generator().manual_seed(n))) for n in range(50))


def test_a_random_A_has_the_best_B_in_its_subspace() -> None:
    """No change of lora_B lowers the damped quadratic model, whose Hessian gives the step's length."""
    statistics = layer()
    factors = solved("random_A", statistics)
    cov = statistics.input_cov.double() + DAMPING * statistics.input_cov.double().diagonal().mean() * torch.eye(7)
    fisher = statistics.output_fisher.double()
    fisher = fisher + DAMPING * fisher.mean()
    b = factors.lora_B.clone().requires_grad_()
    delta = b @ factors.lora_A
    curvature = (fisher[:, None] * (delta @ cov) * delta).sum()
    ((statistics.grad.double() * delta).sum() + curvature / 2).backward()
    slope = (statistics.grad.double() @ factors.lora_A.T).abs().max()
    assert float(b.grad.abs().max()) <= 1e-7 * float(slope)
    assert factors.fisher_length == pytest.approx(float(curvature.detach().sqrt()), rel=1e-7)


def test_a_matched_slope_is_plain_loras() -> None:
    """Oracle: the mean of ‖G Aᵀ‖₁ over random A."""
    statistics = layer(i=64, o=9)
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(RANK, 64, generator=generator) * math.sqrt(PLAIN_VARIANCE) for _ in range(400)]
    expected = sum(float((statistics.grad @ a.T).abs().sum()) for a in draws) / len(draws)
    factors = solved("slope_matched", statistics)
    assert float((statistics.grad.double() @ factors.lora_A.T).abs().sum()) == pytest.approx(expected, rel=SAMPLING)
    assert torch.allclose(
        factors.lora_B @ factors.lora_A, step(solve_lora_da(statistics, RANK, **SETTINGS)), atol=1e-12
    )


@pytest.mark.parametrize(("name", "factor"), [("half_scale", 0.5), ("double_scale", 2.0)])
def test_a_scale_changes_how_the_step_is_shared(name: str, factor: float) -> None:
    statistics = layer()
    default, scaled = solve_lora_da(statistics, RANK, **SETTINGS), solved(name, statistics)
    assert torch.allclose(scaled.lora_A, default.lora_A * factor)
    assert torch.allclose(step(scaled), step(default), atol=1e-12)


def test_a_plain_norm_is_that_of_plain_loras_A() -> None:
    statistics = layer()
    default, found = solve_lora_da(statistics, RANK, **SETTINGS), solved("plain_norm", statistics)
    assert float(found.lora_A.norm()) ** 2 == pytest.approx(PLAIN_VARIANCE * RANK * 7, rel=1e-6)
    assert same_span(found.lora_A, default.lora_A)
    assert torch.allclose(step(found), step(default), atol=1e-12)


def test_equal_energies_are_plain_loras_row_by_row() -> None:
    statistics = layer()
    default, found = solve_lora_da(statistics, RANK, **SETTINGS), solved("equal_energies", statistics)
    expected = PLAIN_VARIANCE * statistics.input_cov.double().trace().item()
    for row in found.lora_A:
        assert energy(row[None], statistics) == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(step(found), step(default), atol=1e-12)


def test_half_random_is_the_default_of_half_the_rank_beside_rows_without_a_step() -> None:
    statistics = layer()
    found, half = solved("half_random", statistics), solve_lora_da(statistics, RANK // 2, **SETTINGS)
    assert torch.equal(found.lora_A[: RANK // 2], half.lora_A)
    assert torch.allclose(step(found), step(half), atol=1e-12)
    wide = layer(i=4000)
    drawn = solved("half_random", wide).lora_A[RANK // 2 :]
    assert float(drawn.var()) == pytest.approx(PLAIN_VARIANCE, rel=0.1)  # four and a half standard errors
    assert torch.equal(solved("half_random", wide).lora_A[RANK // 2 :], drawn)


def test_half_principal_has_the_inputs_largest_components_beside_the_default_of_half_the_rank() -> None:
    statistics = layer()
    assert statistics.input_cov is not None
    found, half = solved("half_principal", statistics), solve_lora_da(statistics, RANK // 2, **SETTINGS)
    assert torch.equal(found.lora_A[: RANK // 2], half.lora_A) and torch.allclose(step(found), step(half), atol=1e-12)
    rows = found.lora_A[RANK // 2 :]
    square = PLAIN_VARIANCE * rows.shape[1]
    assert torch.allclose(rows @ rows.T, square * torch.eye(len(rows), dtype=rows.dtype), atol=1e-12)
    largest = torch.linalg.svdvals(statistics.input_cov)[: len(rows)].to(rows)
    assert torch.allclose((rows @ statistics.input_cov.to(rows) * rows).sum(1), square * largest)


def step(factors: LoraFactors) -> Tensor:
    return factors.lora_B @ factors.lora_A


def test_a_candidate_is_a_method_that_differs_from_lora_da_in_its_function_and_its_rows_alone() -> None:
    for name, candidate in CANDIDATES.items():
        assert candidate_of(name) is candidate and candidate.name == name
        lora_da = METHODS["lora_da"]
        assert replace(candidate, name="lora_da", solve=lora_da.solve, presets=lora_da.presets) == lora_da
        assert candidate.presets == {"default": replace(lora_da.presets["default"], chosen_rows=1.0)}
        assert candidate.solve is not METHODS["lora_da"].solve
    with pytest.raises(BenchmarkError, match="half_powers"):
        candidate_of("half")


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_candidate_is_what_solves_a_run(name: str) -> None:
    """End to end: the adapter of a run that it is the method of, against its function on the same statistics."""
    model, config = with_lora(tiny_llama()), as_solved(method=CANDIDATES[name], samples=4)
    with recorded() as seen:
        report = initialize_lora_da_weights(model, [pad(documents(LENGTHS))], config, show_progress=False)
    assert report.initialized == len(seen) and report.settings["method"] == name
    population = report.population_size * report.loss_tokens / report.samples
    for layer in find_adapter(model).layers:
        settings = {**SETTINGS, "population": population, "plain_variance": layer.plain_variance}
        statistics = seen[layer.name.removeprefix(PREFIX)]
        expected = solve_lora_da(statistics, layer.rank, solve=CANDIDATES[name].solve, **settings)
        assert distance(layer.lora_A, expected.lora_A) <= REORDERED
        assert torch.allclose(layer.lora_B.double(), expected.lora_B, rtol=1e-4, atol=1e-9)
