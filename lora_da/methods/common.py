"""What the methods share: their result, the checks of what they read, and the scale of a start that moves nothing."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Where Z's condition number can be above this, Z is decomposed in float64: with a single direction that has all of the
# energy, the worst case, float32 loses 1e-4 of the bias at 1e6 and 5e-3 at 4e6.
MAX_FLOAT32_CONDITION = 5e5
# Of the mean input energy of a direction: what float32 sums cannot tell from nothing.
MIN_INPUT_ENERGY = 1e-7


class UnsolvableLayer(ArithmeticError):
    """One layer's statistics admit no solution; the message says why."""


@dataclass(frozen=True)
class LayerSpec:
    """What a method is told of a layer beside its statistics.

    Args:
        name: of the layer.
        rank: r ≤ min(i, o).
        plain_variance: variance of an entry of the lora_A that PEFT draws for it.
        population: N, in the unit the gradient was averaged over; None where the method does not ask for it.
        weight: W, (o, i), dequantised, on the device of the statistics; None where the method does not read it.
        prepared: what the method's `prepare` has made of Z; None where it has none.
    """

    name: str
    rank: int
    plain_variance: float
    population: float | None
    weight: Tensor | None
    prepared: Any


@dataclass(frozen=True)
class LoraFactors:
    """The start of one adapter layer and how well it was determined; None where a method has no such figure.

    Args:
        lora_A: (r, i). lora_B: (o, r).
        bias_captured: share of LoRA-DA's bias term ‖D‖²_F that lies in the chosen subspace; of ‖G‖²_F, which it is for
            Z = Y = I, in methods on the gradient alone.
        damping_input, damping_output: what was added to the diagonals of Z and Y.
        condition: (estimated) condition number of the damped Z.
        residual: ‖A V − V Λ‖_F / max|Λ| of the eigenpairs of the operator A that was solved.
        fisher_length: of the step lora_B·lora_A in the damped Fisher, see `fisher_length`.
    """

    lora_A: Tensor
    lora_B: Tensor
    bias_captured: float | None = None
    damping_input: float | None = None
    damping_output: float | None = None
    condition: float | None = None
    residual: float | None = None
    fisher_length: float | None = None


def fisher_length(lora_A: Tensor, lora_B: Tensor, cov: Tensor, damping: float, fisher: Tensor) -> float:
    """√tr(Y S Z Sᵀ) of the step S = lora_B·lora_A: in K-FAC (arXiv 1503.05671) half its square is how far the step
    moves the model's predictions, as a divergence.

    Args:
        lora_A: (r, i). lora_B: (o, r). Both in float64.
        cov: Z, (i, i), undamped, in any dtype; damping: added to its diagonal.
        fisher: the damped diagonal of Y, (o,).
    """
    energy = lora_A @ (cov @ lora_A.T.to(cov.dtype)).double() + damping * lora_A @ lora_A.T  # (r, r)
    return math.sqrt(max(0.0, (fisher.unsqueeze(1) * (lora_B @ energy) * lora_B).sum().item()))


def checked(name: str, tensor: Tensor | None, if_zero: str = "; does it take part in the loss?") -> Tensor:
    """What a method reads of a layer, looked at without a copy of it.

    Raises:
        UnsolvableLayer: it is not finite, or all zero.
    """
    assert tensor is not None, f"the {name} was not taken"
    least, greatest = torch.stack(torch.aminmax(tensor)).tolist()
    if not (math.isfinite(least) and math.isfinite(greatest)):
        raise UnsolvableLayer(f"its {name} is not finite")
    if least == greatest == 0:
        raise UnsolvableLayer(f"its {name} is zero{if_zero}")
    return tensor


def squared_norm(matrix: Tensor) -> float:
    """‖M‖²_F, without a copy, and column by column: in float32 a CPU adds all of a norm's squares to one sum."""
    return torch.linalg.vector_norm(matrix, dim=0).double().square().sum().item()


def float32_suffices(input_cov: Tensor, damping: float) -> bool:
    """Whether Z, with `damping` added to its diagonal, can be decomposed in float32. Its largest eigenvalue is at most
    its Frobenius norm, and that at most its trace."""
    bound = MAX_FLOAT32_CONDITION * damping
    return input_cov.dtype == torch.float32 and (
        input_cov.trace().item() <= bound or squared_norm(input_cov) <= bound**2
    )


def plain_energy_scale(energy: Tensor, trace: Tensor, rank: int, plain_variance: float) -> float:
    """The factor c for which lora_A = c · Vᵀ has plain LoRA's expected input energy tr(A Z Aᵀ).

    Args:
        energy: tr(Vᵀ Z V) of the directions V (i, r).
        trace: of Z, undamped.
        rank: r.
        plain_variance: variance of an entry of the lora_A that PEFT draws.
    """
    return math.sqrt(plain_variance * rank * trace / energy)


def with_random_rows(factors: LoraFactors, layer: LayerSpec) -> LoraFactors:
    """Factors of a lower rank, and random rows of plain LoRA's variance for what lora_A has left, with no lora_B, so
    that training starts where it did. They are a layer's own, whatever the seed; nobody's global generator moves.

    Args:
        factors: lora_A (k, i) and lora_B (o, k), k ≤ r.
        layer: its name, rank and plain variance.
    """
    a, b = factors.lora_A, factors.lora_B
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(layer.name.encode()))
    shape = layer.rank - len(a), a.shape[1]
    drawn = torch.randn(shape, generator=generator, dtype=a.dtype, device="cpu") * math.sqrt(layer.plain_variance)
    return replace(
        factors,
        lora_A=torch.cat([a, drawn.to(a.device)]),
        lora_B=torch.cat([b, b.new_zeros(len(b), shape[0])], 1),
    )


def start_at_the_base(
    directions: Tensor, cov: Tensor, plain_variance: float, out_features: int
) -> tuple[Tensor, Tensor]:
    """lora_A (r, i) along the directions with plain LoRA's input energy, and lora_B (o, r) zero: the model starts as it
    is, whatever the scale of lora_A.

    Args:
        directions: V, (i, r).
        cov: Z, (i, i), undamped, in the same dtype.
        plain_variance: variance of an entry of the lora_A that PEFT draws.
        out_features: o.

    Raises:
        UnsolvableLayer: the samples have next to no input energy in these directions, and no scale gives it to them.
    """
    energy, trace = (directions * (cov @ directions)).sum(), cov.trace()
    mean = directions.square().sum() * trace / len(cov)
    if not energy > MIN_INPUT_ENERGY * mean:
        raise UnsolvableLayer(
            f"the directions chosen carry {energy / mean:.1e} of the mean input energy over the samples, which is "
            "rounding; take more samples"
        )
    scale = plain_energy_scale(energy, trace, directions.shape[1], plain_variance)
    lora_B = torch.zeros(out_features, directions.shape[1], dtype=torch.float64, device=directions.device)
    return directions.T.double() * scale, lora_B


def noise(rows: int, columns: int, like: Tensor) -> Tensor:
    """The same Gaussian block every time, whatever the device, and no one's global generator moved."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def canonical_signs(vectors: Tensor) -> Tensor:
    """Signs (k,) that make each column's entry of largest magnitude positive."""
    peak = vectors.abs().argmax(0, keepdim=True)
    return vectors.gather(0, peak).sign().squeeze(0)
