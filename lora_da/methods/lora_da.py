"""LoRA-DA (arXiv 2510.24561): the subspace of least expected distance to the target model, from gradient and Fisher.

With Z the input covariance, Y the output Fisher and G the gradient of a layer,

    D  = −Z⁻¹ Gᵀ diag([Y⁻¹]_oo)              (i, o)  Fisher-gradient estimate of (W_tgt − W)ᵀ
    Ω  = v · (Σ_o [Y⁻¹]_oo / N) · Z⁻¹ − D Dᵀ  (i, i)  variance − bias: the guidance matrix (Algorithm 1)
    A0 = eigenvectors of Ω with the r smallest eigenvalues,  B0 = A0ᵀ D

and the model starts at W + s·lora_B·lora_A with lora_B·lora_A = (A0 B0)ᵀ / gamma. The base weight is not touched.

Z is factored once for all layers that read it and never inverted. All of it runs on the device of the statistics, in
float32 where the damping bounds Z's condition number and in float64 where it does not: on the layers of a real model
with the default damping the two subspaces are 1e-5 apart and their objectives 1e-10, and a consumer GPU's float64 is
64 times slower than its float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da.methods.common import (
    LayerSpec,
    LoraFactors,
    UnsolvableLayer,
    canonical_signs,
    checked,
    fisher_length,
    float32_suffices,
    noise,
    plain_energy_scale,
)
from lora_da.methods.linalg import OVERSAMPLING, largest_eigenpairs
from lora_da.methods.method import Preset
from lora_da.statistics import LayerStatistics

# An eigenvalue's error is the square of its residual: at these, a norm and an order of magnitude are settled.
NORM_TOLERANCE = 1e-4
CONDITION_TOLERANCE = 0.1
NORM_BLOCK = 4  # vectors in the block for a single eigenvalue


@dataclass(frozen=True)
class DampedInput:
    """The damped input covariance Z + damping·I = L Lᵀ, one for all layers that read the same input.

    Args:
        cov: Z, (i, i), undamped.
        factor: L, (i, i), lower triangular, in the dtype to solve in.
        damping: what was added to the diagonal.
        condition: estimated condition number of the damped Z.
    """

    cov: Tensor
    factor: Tensor
    damping: float
    condition: float

    def solve(self, right: Tensor) -> Tensor:
        """(Z + damping·I)⁻¹ right, for right (i, b)."""
        return torch.cholesky_solve(right, self.factor)


def lora_da(statistics: LayerStatistics, layer: LayerSpec, preset: Preset) -> LoraFactors:
    """Solve one layer.

    Args:
        statistics: means of the layer, any float dtype.
        layer: its rank r, its population N, and `damp_input` of its Z. With `match_input_energy` lora_A is scaled to
            the input energy tr(A Z Aᵀ) that plain LoRA's, with entries of its plain variance, is expected to have, and
            lora_B takes the rest of the step; otherwise both factors carry 1/√gamma.
        preset: v is `variance_weight`; `damping` is added to the diagonals of Z and Y, times their mean if it is
            relative; `gamma` divides the step, of which D is divided by its largest singular value before if
            `normalize_step`.

    Raises:
        UnsolvableLayer: statistics are not finite or all zero, or Y is not positive definite after damping.
    """
    grad = checked("gradient", statistics.grad)
    fisher = checked("output Fisher", statistics.output_fisher)
    damped_input: DampedInput = layer.prepared
    assert layer.population is not None, "the population was not asked for"
    dtype = damped_input.factor.dtype
    inverse_fisher, damping_output = _inverse_fisher_diagonal(fisher.double(), preset)  # (o,)
    variance = preset.variance_weight * inverse_fisher.sum().item() / layer.population
    # G and 1/Y may be as small and as large as they like: D is held in units of their largest entries.
    grad_unit, fisher_unit = grad.abs().max(), inverse_fisher.max()
    weighted = (grad / grad_unit).T.to(dtype) * (inverse_fisher / fisher_unit).to(dtype)  # (i, o)
    direction = damped_input.solve(weighted).neg_()  # D / unit (i, o)
    unit = grad_unit.item() * fisher_unit.item()
    variance /= unit**2

    def bias(v: Tensor) -> Tensor:  # (i, b) → (i, b)
        return direction @ (direction.T @ v)

    def minus_omega(v: Tensor) -> Tensor:  # (i, b) → (i, b)
        return bias(v) - variance * damped_input.solve(v) if variance else bias(v)

    width = min(layer.rank + OVERSAMPLING, *direction.shape)
    start = direction @ noise(direction.shape[1], width, like=direction)
    pairs = largest_eigenpairs(minus_omega, start, layer.rank)
    a0 = pairs.vectors * canonical_signs(pairs.vectors)  # (i, r)
    b0 = a0.T @ direction  # (r, o)
    size = unit
    if preset.normalize_step:  # the eigenvectors of Ω do not change with the scale of D
        size = 1 / largest_eigenpairs(bias, a0, 1, NORM_TOLERANCE).values.sqrt().item()
    captured = (b0.square().sum() / direction.square().sum()).item()
    b0 = b0.double() * size

    scale = 1 / math.sqrt(preset.gamma)
    if preset.match_input_energy:
        scale = plain_energy_scale(a0, damped_input.cov.to(dtype), layer.plain_variance)
    lora_A, lora_B = a0.T.double() * scale, b0.T / (preset.gamma * scale)
    factors = LoraFactors(
        lora_A=lora_A,
        lora_B=lora_B,
        bias_captured=captured,
        damping_input=damped_input.damping,
        damping_output=damping_output,
        condition=damped_input.condition,
        residual=pairs.residual,
        fisher_length=fisher_length(lora_A, lora_B, damped_input.cov, damped_input.damping, 1 / inverse_fisher),
    )
    if not (torch.isfinite(factors.lora_A).all() and torch.isfinite(factors.lora_B).all()):
        raise UnsolvableLayer("its solution is not finite")
    return factors


def damp_input(input_cov: Tensor | None, preset: Preset) -> DampedInput:
    """Damp and factor Z.

    Args:
        input_cov: Z, (i, i).
        preset: its damping, added to the diagonal, times its mean if it is relative.

    Raises:
        UnsolvableLayer: Z is not finite, zero, or not positive definite after damping.
    """
    input_cov = checked("input covariance", input_cov)
    diagonal = input_cov.diagonal().double()
    trace, added = diagonal.sum().item(), _damping(diagonal, preset)
    dense = input_cov if float32_suffices(input_cov, trace, added) else input_cov.double()
    factor = _cholesky(dense, added, "input covariance")
    start = noise(factor.shape[0], min(NORM_BLOCK, factor.shape[0]), like=factor)
    largest = largest_eigenpairs(lambda v: factor @ (factor.T @ v), start, 1, CONDITION_TOLERANCE).values
    smallest = largest_eigenpairs(lambda v: torch.cholesky_solve(v, factor), start, 1, CONDITION_TOLERANCE).values
    return DampedInput(input_cov, factor, added, (largest * smallest).item())


def _damping(diagonal: Tensor, preset: Preset) -> float:
    return preset.damping * diagonal.mean().item() if preset.relative_damping else preset.damping


def _cholesky(matrix: Tensor, damping: float, name: str) -> Tensor:
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    cholesky, info = torch.linalg.cholesky_ex(damped)
    if info.item() != 0:
        raise UnsolvableLayer(f"its {name} is not positive definite with damping {damping:.3g}; set a larger damping")
    return cholesky


def _inverse_fisher_diagonal(fisher: Tensor, preset: Preset) -> tuple[Tensor, float]:
    """[Y⁻¹]_oo of the damped Y: the diagonal of the inverse if Y is full, 1/diag(Y) if only its diagonal is known."""
    if fisher.dim() == 2:
        added = _damping(fisher.diagonal(), preset)
        return torch.cholesky_inverse(_cholesky(fisher, added, "output Fisher")).diagonal(), added
    added = _damping(fisher, preset)
    damped = fisher + added
    if damped.min() <= 0:
        raise UnsolvableLayer("its output Fisher has a zero on the diagonal; set a damping above 0")
    return damped.reciprocal(), added
