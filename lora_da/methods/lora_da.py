"""LoRA-DA (arXiv 2510.24561): the subspace of least expected distance to the target model, from gradient and Fisher.

With Z the input covariance, Y the output Fisher and G the gradient of a layer,

    D  = −Z⁻¹ Gᵀ diag([Y⁻¹]_oo)              (i, o)  Fisher-gradient estimate of (W_tgt − W)ᵀ
    Ω  = v · (Σ_o [Y⁻¹]_oo / N) · Z⁻¹ − D Dᵀ  (i, i)  variance − bias: the guidance matrix (Algorithm 1)
    A0 = eigenvectors of Ω with the r smallest eigenvalues,  B0 = A0ᵀ D

and the model starts at W + s·lora_B·lora_A with lora_B·lora_A = (A0 B0)ᵀ / gamma. The base weight is not touched.

Z is factored once for all layers that read it, in the memory of its damped copy, and never inverted. All of it runs on
the device of the statistics, in float32 where the damping bounds Z's condition number and in float64 where it does not:
on the layers of a real model with the default damping the two subspaces are 1e-5 apart and their objectives 1e-10, and
a consumer GPU's float64 is 64 times slower than its float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_da.methods.common import (
    MAX_FLOAT32_CONDITION,
    LayerSpec,
    LoraFactors,
    UnsolvableLayer,
    canonical_signs,
    checked,
    fisher_length,
    float32_suffices,
    noise,
    plain_energy_scale,
    squared_norm,
    with_random_rows,
)
from lora_da.methods.linalg import OVERSAMPLING, estimated_eigenvalue, largest_eigenpairs, largest_eigenvalue_near
from lora_da.methods.method import Preset
from lora_da.statistics import LayerStatistics

NORM_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
CONDITION_TOLERANCE = 0.05  # an eigenvalue's error is at most that of its residual: one digit is settled
COLUMNS = 512  # of the inverse of a full Fisher that are held at a time


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
        return self.solve_(right.clone())

    def solve_(self, right: Tensor) -> Tensor:
        """The same in the memory of `right`. Two triangular solves: on CUDA `cholesky_solve` copies the factor."""
        torch.linalg.solve_triangular(self.factor, right, upper=False, out=right)
        return torch.linalg.solve_triangular(self.factor.T, right, upper=True, out=right)

    def energy(self, directions: Tensor) -> Tensor:
        """tr(Vᵀ Z V), Z undamped, for orthonormal directions V (i, b); in float64 by L, without a copy of Z."""
        if self.cov.dtype == self.factor.dtype:
            return (directions * (self.cov @ directions)).sum()
        return (self.factor.T @ directions).square().sum() - self.damping * directions.shape[1]


def lora_da(statistics: LayerStatistics, layer: LayerSpec, preset: Preset) -> LoraFactors:
    """Solve one layer.

    Args:
        statistics: means of the layer, any float dtype.
        layer: its rank r, its population N, and `damp_input` of its Z. With `match_input_energy` lora_A is scaled to
            the input energy tr(A Z Aᵀ) that plain LoRA's, with entries of its plain variance, is expected to have, and
            lora_B takes the rest of the step; otherwise both factors carry 1/√gamma.
        preset: v is `variance_weight`; `damping` is added to the diagonals of Z and Y, times their mean if it is
            relative; `gamma` divides the step, of which D is divided by its largest singular value before if
            `normalize_step`, or by the norm of B0 where the step's length is measured anyway. Where `chosen_rows` is
            below 1, all this is the solution of so many rows, rounded up, and the others are random, with no lora_B.

    Raises:
        UnsolvableLayer: statistics are not finite or all zero, or Y is not positive definite after damping.
    """
    chosen = replace(layer, rank=preset.n_chosen(layer.rank))
    return with_random_rows(_of_rank(statistics, chosen, preset), layer)


def _of_rank(statistics: LayerStatistics, layer: LayerSpec, preset: Preset) -> LoraFactors:
    """The solution of the layer's rank."""
    grad = checked("gradient", statistics.grad)
    fisher = checked("output Fisher", statistics.output_fisher)
    damped_input: DampedInput = layer.prepared
    assert layer.population is not None, "the population was not asked for"
    dtype = damped_input.factor.dtype
    inverse_fisher, damping_output = _inverse_fisher_diagonal(fisher, preset)  # (o,)
    variance = preset.variance_weight * inverse_fisher.sum().item() / layer.population
    # G and 1/Y may be as small and as large as they like: D is held in units of their largest entries.
    grad_unit, fisher_unit = torch.linalg.vector_norm(grad, torch.inf), inverse_fisher.max()
    direction = torch.empty(grad.shape, dtype=dtype, device=grad.device)  # Dᵀ / unit (o, i)
    torch.div(grad, grad_unit, out=direction).mul_((-inverse_fisher / fisher_unit).to(dtype).unsqueeze(1))
    direction = damped_input.solve_(direction.T)  # D / unit (i, o)
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
    _check_finite(a0, b0)
    size = unit
    if preset.normalize_step:  # the eigenvectors of Ω do not change with the scale of D
        exact = preset.first_step == "gamma"  # else its length is measured, or nothing, and any norm keeps it in range
        size = 1 / math.sqrt(_largest_square(bias, a0, start) if exact else squared_norm(b0) or 1.0)
    captured = squared_norm(b0) / squared_norm(direction)
    b0 = b0.double() * size

    scale = 1 / math.sqrt(preset.gamma)
    if preset.match_input_energy:
        energy, trace = damped_input.energy(a0), damped_input.cov.trace()
        scale = plain_energy_scale(energy, trace, layer.rank, layer.plain_variance)
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
    _check_finite(factors.lora_A, factors.lora_B)
    return factors


def _check_finite(*solution: Tensor) -> None:
    if not all(torch.isfinite(part).all() for part in solution):
        raise UnsolvableLayer("its solution is not finite")


def damp_input(input_cov: Tensor | None, preset: Preset) -> DampedInput:
    """Damp and factor Z.

    Args:
        input_cov: Z, (i, i).
        preset: its damping, added to the diagonal, times its mean if it is relative.

    Raises:
        UnsolvableLayer: Z is not finite, zero, or not positive definite after damping.
    """
    input_cov = checked("input covariance", input_cov)
    added = _damping(input_cov.diagonal().double(), preset)
    dtype = torch.float32 if float32_suffices(input_cov, added) else torch.float64
    factor = _factored_(input_cov.to(dtype, copy=True), added, "input covariance")
    damped = DampedInput(input_cov, factor, added, math.nan)
    guess = noise(factor.shape[0], 1, like=factor)  # four of them cost four times as much and settle the same digit
    undamped = estimated_eigenvalue(lambda v: input_cov @ v, guess.to(input_cov.dtype), CONDITION_TOLERANCE)
    inverse = estimated_eigenvalue(damped.solve, guess, CONDITION_TOLERANCE)
    return replace(damped, condition=(undamped + added) * inverse)


def float32_up_to(preset: Preset) -> float:
    """Inputs of the widest layer whose Z is factored in float32 whatever it is: its Frobenius norm is at most its
    trace, i times its mean diagonal."""
    return MAX_FLOAT32_CONDITION * preset.damping if preset.relative_damping else 0.0


def _largest_square(bias: Callable[[Tensor], Tensor], a0: Tensor, start: Tensor) -> float:
    """The square of D's largest singular value: the largest eigenvalue of D Dᵀ.

    The variance term turns A0 a little away from its eigenvector, and may leave that out: beside A0 (i, r), an image of
    noise is followed.
    """
    other = start[:, :1]
    for _ in range(2):
        other = other - a0 @ (a0.T @ other)
        other = other / torch.linalg.vector_norm(other).clamp_min(torch.finfo(other.dtype).tiny)
    return largest_eigenvalue_near(bias, torch.cat([a0, other], 1), start[:, 1:], NORM_TOLERANCE[a0.dtype])


def _damping(diagonal: Tensor, preset: Preset) -> float:
    return preset.damping * diagonal.mean().item() if preset.relative_damping else preset.damping


def _factored_(matrix: Tensor, damping: float, name: str) -> Tensor:
    """L of the damped symmetric matrix, in its memory."""
    matrix.diagonal().add_(damping)
    columns = matrix.T  # as LAPACK lays matrices out
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(columns, out=(columns, info))
    if info.item() != 0:
        raise UnsolvableLayer(f"its {name} is not positive definite with damping {damping:.3g}; set a larger damping")
    return columns


def _inverse_fisher_diagonal(fisher: Tensor, preset: Preset) -> tuple[Tensor, float]:
    """[Y⁻¹]_oo of the damped Y: the diagonal of the inverse if Y is full, 1/diag(Y) if only its diagonal is known."""
    if fisher.dim() == 2:
        added = _damping(fisher.diagonal().double(), preset)
        factor = _factored_(fisher.to(torch.float64, copy=True), added, "output Fisher")
        return _inverse_diagonal(factor), added
    fisher = fisher.double()
    added = _damping(fisher, preset)
    damped = fisher + added
    if damped.min() <= 0:
        raise UnsolvableLayer("its output Fisher has a zero on the diagonal; set a damping above 0")
    return damped.reciprocal(), added


def _inverse_diagonal(factor: Tensor) -> Tensor:
    """The diagonal of (L Lᵀ)⁻¹, (o,): the squared norms of the columns of L⁻¹, a few at a time."""
    parts = []
    for first in range(0, len(factor), COLUMNS):
        rest = factor[first:, first:]  # above its own row, a column of L⁻¹ is zero
        columns = torch.eye(len(rest), min(COLUMNS, len(rest)), dtype=factor.dtype, device=factor.device)
        parts.append(torch.linalg.solve_triangular(rest, columns, upper=False).square().sum(0))
    return torch.cat(parts)
