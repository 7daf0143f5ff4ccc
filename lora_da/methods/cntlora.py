"""An activation-constraint initialiser after ConsNoTrainLoRA (CNTLoRA, arXiv 2507.08044): forward passes only.

What is public of the paper: the start of LoRA is a domain shift between pre-training and fine-tuning activations,
constraints tie W and ΔW to both, and give ΔW in closed form from W and the fine-tuning activations alone, which is then
split into the two factors. Its formulas are not. The derivation here is ours, from that statement.

Fine-tuning activations x have the second moment Z, with the mean energy c = tr(Z)/i. Z is that of a few samples: let n
be isotropic noise of energy μc, and Z + μcI the second moment of x + n. Of the pre-training activations nothing is kept
but the scale: take them as isotropic, of the same mean energy (1 + μ)c. Of all linear maps that turn the one domain
into the other, the one that moves activations least is T = √((1 + μ)c) (Z + μcI)^-½ (optimal transport), so
x_pre = T (x + n) is what x would have been before the shift. Two constraints then tie ΔW to W:

    (W + ΔW) x = W x_pre      fine-tuning inputs give the outputs that the layer was trained to give
    ΔW x_pre = 0              and what it gives for pre-training inputs stays

in the least-squares sense, the second with the weight μ/(1 + μ), so that it is μc ‖ΔW‖²_F:

    J(ΔW) = E‖(W + ΔW) x − W x_pre‖² + μ/(1 + μ) E‖ΔW x_pre‖²

Its gradient is zero where ΔW (Z + μcI) = W (T − I) Z. With H = (Z + μcI)^½ and N = W (T − I) Z H⁻¹,
J(ΔW) = ‖ΔW H − N‖²_F + a constant, so among all ΔW of rank r the least J has ΔW = [N]_r H⁻¹ (Eckart and Young):

    N ≈ U_r S_r V_rᵀ,   down: V_rᵀ H⁻¹ (r, i),   up: U_r S_r (o, r)

All functions of Z share its eigenvectors: with Z = Q diag(cλ) Qᵀ, N Q = √c W Q diag(g), where

    g = λ (√(1 + μ) − √(λ + μ)) / (λ + μ)

is 0 where λ = 1 or 0. Directions that the samples never touch are left alone; those they use far more than others count
by what W makes of them. The rows of V_rᵀ H⁻¹ see inputs that are close to white.

Up is not used: W + ΔW is not the model, and a weight changed as far as that is no start. lora_B = 0 keeps the start
exact, and lora_A is the down factor, scaled to the input energy tr(A Z Aᵀ) that plain LoRA's is expected to have. μ is
the damping, relative to the mean diagonal of Z as in LoRA-DA's default. The rank is the same in all layers. Z is
decomposed once for all layers that read it; of wide layers that is most of the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da.methods.common import (
    LayerSpec,
    LoraFactors,
    UnsolvableLayer,
    canonical_signs,
    checked,
    float32_suffices,
    noise,
    start_at_the_base,
)
from lora_da.methods.linalg import OVERSAMPLING, largest_singular_triplets
from lora_da.methods.method import Numbers
from lora_da.statistics import LayerStatistics

# Of ‖W‖_F √c, which N would be if the shift were as large as the activations: what is rounding.
MIN_SHIFT = 1e-6


@dataclass(frozen=True)
class DomainShift:
    """How the inputs of some layers are shifted against isotropic ones, one for all layers that read them.

    Args:
        cov: Z, (i, i). vectors: Q, (i, i).
        shift: g, (i,). whitening: (λ + μ)^-½, (i,).
        damping: μc. condition: of the damped Z.
    """

    cov: Tensor
    vectors: Tensor
    shift: Tensor
    whitening: Tensor
    damping: float
    condition: float


def cntlora(statistics: LayerStatistics, layer: LayerSpec, numbers: Numbers) -> LoraFactors:
    """Solve one layer, in the dtype that Z was decomposed in.

    Args:
        statistics: nothing of them is read but what was prepared of Z.
        layer: its rank r, its weight W, its plain variance, and `find_shift` of its Z.
        numbers: they have gone into that.

    Raises:
        UnsolvableLayer: W is not finite or zero, or its inputs are not shifted.
    """
    shift: DomainShift = layer.prepared
    rank, weight = layer.rank, checked("weight", layer.weight, if_zero="")
    weight = weight.to(shift.vectors.dtype)
    weight = weight / weight.abs().max()
    residual = ((weight @ shift.vectors) * shift.shift).double()  # N Q (o, i)
    if torch.linalg.norm(residual) <= MIN_SHIFT * torch.linalg.norm(weight):
        raise UnsolvableLayer(
            "its inputs have the same energy in all directions that its weight reads: there is no shift to start from"
        )
    start = noise(max(residual.shape), min(rank + OVERSAMPLING, *residual.shape), like=residual)
    found = largest_singular_triplets(residual, start, rank)
    rows = found.right.to(shift.vectors.dtype) * shift.whitening.unsqueeze(1)
    directions = shift.vectors @ rows  # H⁻¹ V_r (i, r)
    directions = directions * canonical_signs(directions)
    cov = shift.cov.to(directions.dtype)
    lora_A, lora_B = start_at_the_base(directions, cov, layer.plain_variance, len(weight))
    return LoraFactors(lora_A, lora_B, damping_input=shift.damping, condition=shift.condition, residual=found.residual)


def find_shift(input_cov: Tensor | None, numbers: Numbers) -> DomainShift:
    """Decompose Z, in float32 where the damping bounds its condition number, else in float64.

    Args:
        input_cov: Z, (i, i).
        numbers: `damping` is μ, the energy of the noise and the weight of the pre-training constraint.

    Raises:
        UnsolvableLayer: Z is not finite, zero, or not positive definite after damping.
    """
    cov = checked("input covariance", input_cov)
    assert numbers.damping is not None
    damping, trace = numbers.damping, cov.diagonal().double().sum().item()
    mean, added = trace / len(cov), damping * trace / len(cov)
    dense = cov if float32_suffices(cov, added) else cov.double()
    values, vectors = torch.linalg.eigh(dense / mean)  # λ and Q
    values = values.clamp_min(0)  # rounding leaves some a little below zero
    damped = values + damping
    if not damped.min() > torch.finfo(damped.dtype).eps * damped.max():
        raise UnsolvableLayer(
            f"its input covariance is not positive definite with damping {added:.3g}; set a larger damping"
        )
    shift = values * ((1 + damping) ** 0.5 - damped.sqrt()) / damped
    condition = (damped.max() / damped.min()).item()
    return DomainShift(cov, vectors, shift, damped.rsqrt(), added, condition)
