"""What was tried in the place of LoRA-DA's solution of a layer, so that trying it again is one line of a sweep.

Each is a method as those of the project are, with LoRA-DA's needs and numbers; what it calls the solution is that of
all rows of lora_A. Those that choose another A start with lora_B = 0, as the control `zero_B` does, which is what they
are to be compared with.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lora_da.methods import METHODS
from lora_da.methods.common import LayerSpec, LoraFactors, fisher_length, start_at_the_base
from lora_da.methods.gradient import decompose_gradient
from lora_da.methods.lora_da import damp_input, lora_da
from lora_da.methods.method import Method, Preset
from lora_da.methods.presets import PRESETS
from lora_da.statistics import LayerStatistics


def half_powers(statistics: LayerStatistics, layer: LayerSpec, preset: Preset) -> LoraFactors:
    """Go half the way from the gradient to the natural gradient: A spans the left singular vectors of Z^-½ Gᵀ Y^-½."""
    grad, cov, fisher = _double(statistics)
    values, vectors = torch.linalg.eigh(cov)
    values = values.clamp_min(0) + preset.damping * values.mean()
    direction = (vectors * values.rsqrt()) @ (vectors.T @ (grad.T * _damped(fisher, preset).rsqrt()))
    return _start(_left_vectors(direction, layer.rank), cov, layer, len(grad))


def gradient(statistics: LayerStatistics, layer: LayerSpec, _preset: Preset) -> LoraFactors:
    """Leave the Fisher out: A spans the right singular vectors of G, as LoRA-One's does, at the default's scale."""
    grad, cov, _fisher = _double(statistics)
    return _start(decompose_gradient(statistics, layer.rank).right, cov, layer, len(grad))


def fisher_metric(statistics: LayerStatistics, layer: LayerSpec, preset: Preset) -> LoraFactors:
    """Take the rows of A that lower the damped quadratic model the most, orthonormal under Z: A = Uᵀ L⁻¹ for Z = L Lᵀ
    and U the left singular vectors of L⁻¹ Gᵀ Y^-½."""
    grad, cov, fisher = _double(statistics)
    factor = damp_input(cov, preset).factor.double()
    whitened = torch.linalg.solve_triangular(factor, grad.T * _damped(fisher, preset).rsqrt(), upper=False)
    directions = torch.linalg.solve_triangular(factor.T, _left_vectors(whitened, layer.rank), upper=True)
    return _start(directions, cov, layer, len(grad))


def random_A(statistics: LayerStatistics, layer: LayerSpec, preset: Preset) -> LoraFactors:
    """Leave A random, as plain LoRA draws it, and take the Newton step of the damped quadratic model in its subspace:
    B = −Y⁻¹ G Aᵀ (A Z Aᵀ)⁻¹. What the subspace is worth beside the step."""
    grad, cov, fisher = _double(statistics)
    lora_A = _drawn(grad, layer.rank, layer)
    damping, damped = preset.damping * cov.diagonal().mean().item(), _damped(fisher, preset)
    energy = lora_A @ cov @ lora_A.T + damping * lora_A @ lora_A.T
    lora_B = -torch.linalg.solve(energy, lora_A @ grad.T).T / damped.unsqueeze(1)
    return LoraFactors(lora_A, lora_B, fisher_length=fisher_length(lora_A, lora_B, cov, damping, damped))


def slope_matched(statistics: LayerStatistics, layer: LayerSpec, preset: Preset) -> LoraFactors:
    """The solution, its A scaled so that Adam's first step from lora_B = 0, which lowers the loss by the rate times
    ‖G Aᵀ‖₁ in first order, lowers it as much as plain LoRA's random A is expected to."""
    factors = lora_da(statistics, layer, preset)
    assert statistics.grad is not None
    grad = statistics.grad.double()
    own = (grad @ factors.lora_A.double().T).abs().sum().item()
    plain = layer.rank * math.sqrt(2 / math.pi * layer.plain_variance) * grad.norm(dim=1).sum().item()
    return _scaled(factors, plain / own)


def half_scale(statistics: LayerStatistics, layer: LayerSpec, preset: Preset) -> LoraFactors:
    """The solution with half its lora_A, and lora_B twice as large."""
    return _scaled(lora_da(statistics, layer, preset), 0.5)


def double_scale(statistics: LayerStatistics, layer: LayerSpec, preset: Preset) -> LoraFactors:
    """The solution with twice its lora_A, and half its lora_B."""
    return _scaled(lora_da(statistics, layer, preset), 2.0)


def plain_norm(statistics: LayerStatistics, layer: LayerSpec, preset: Preset) -> LoraFactors:
    """The solution, its A with the Frobenius norm that plain LoRA's is expected to have, and B the rest of the step.
    Adam moves every number by the rate, so a smaller A turns faster."""
    factors = lora_da(statistics, layer, preset)
    expected = math.sqrt(layer.plain_variance * factors.lora_A.numel())
    return _scaled(factors, expected / torch.linalg.vector_norm(factors.lora_A).item())


def equal_energies(statistics: LayerStatistics, layer: LayerSpec, preset: Preset) -> LoraFactors:
    """The solution, every row a of its A with plain LoRA's input energy a Z aᵀ; the step unchanged."""
    factors, (_, cov, _) = lora_da(statistics, layer, preset), _double(statistics)
    a = factors.lora_A.double()
    energy = ((a @ cov) * a).sum(1)
    by = (layer.plain_variance * cov.trace() / energy).sqrt()
    return replace(factors, lora_A=a * by.unsqueeze(1), lora_B=factors.lora_B / by)


def half_random(statistics: LayerStatistics, layer: LayerSpec, preset: Preset) -> LoraFactors:
    """The solution of half the rank, and for the other half rows as plain LoRA draws them, with no B."""
    half = lora_da(statistics, replace(layer, rank=layer.rank // 2), preset)
    return _beside(half, _drawn(_double(statistics)[0], layer.rank - layer.rank // 2, layer))


def half_principal(statistics: LayerStatistics, layer: LayerSpec, preset: Preset) -> LoraFactors:
    """The solution of half the rank, and for the other half the principal components of the inputs, as EVA's whole A
    has them, of the norm that plain LoRA's rows are expected to have, with no B."""
    half = lora_da(statistics, replace(layer, rank=layer.rank // 2), preset)
    vectors = torch.linalg.eigh(_double(statistics)[1])[1][:, layer.rank // 2 - layer.rank :].T.flip(0)
    return _beside(half, vectors * math.sqrt(layer.plain_variance * vectors.shape[1]))


_TRIED = (
    half_powers,
    gradient,
    fisher_metric,
    random_A,
    slope_matched,
    half_scale,
    double_scale,
    plain_norm,
    equal_energies,
    half_random,
    half_principal,
)
ALL_ROWS = replace(PRESETS["default"], chosen_rows=1.0)
CANDIDATES: dict[str, Method] = {
    solve.__name__: replace(METHODS["lora_da"], name=solve.__name__, solve=solve, presets={"default": ALL_ROWS})
    for solve in _TRIED
}


def _double(statistics: LayerStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """G (o, i), Z (i, i) and the diagonal of Y (o,)."""
    assert statistics.grad is not None and statistics.input_cov is not None and statistics.output_fisher is not None
    return statistics.grad.double(), statistics.input_cov.double(), statistics.output_fisher.double()


def _drawn(grad: Tensor, rows: int, layer: LayerSpec) -> Tensor:
    """Rows of lora_A as plain LoRA's are distributed, (rows, i), others for each layer and the same in each run."""
    seed = hash(grad.abs().sum().item()) % 2**31
    drawn = torch.randn(rows, grad.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn * math.sqrt(layer.plain_variance)


def _damped(fisher: Tensor, preset: Preset) -> Tensor:
    return fisher + preset.damping * fisher.mean()


def _left_vectors(matrix: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]


def _start(directions: Tensor, cov: Tensor, layer: LayerSpec, out_features: int) -> LoraFactors:
    return LoraFactors(*start_at_the_base(directions, cov, layer.plain_variance, out_features))


def _beside(half: LoraFactors, rows: Tensor) -> LoraFactors:
    """A solution with more rows of lora_A, which have no lora_B."""
    b = torch.cat([half.lora_B, half.lora_B.new_zeros(len(half.lora_B), len(rows))], 1)
    return replace(half, lora_A=torch.cat([half.lora_A, rows.to(half.lora_A)]), lora_B=b)


def _scaled(factors: LoraFactors, factor: float) -> LoraFactors:
    return replace(factors, lora_A=factors.lora_A * factor, lora_B=factors.lora_B / factor)
