"""The leading singular triplets of a layer's gradient, which LoRA-One and LoRA-GA both start from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da.methods.common import canonical_signs, checked, noise, squared_norm
from lora_da.methods.linalg import OVERSAMPLING, largest_singular_triplets
from lora_da.statistics import LayerStatistics


@dataclass(frozen=True)
class GradientDirections:
    """G ≈ left · diag(values) · rightᵀ, the best of its rank.

    Args:
        left: (o, r). values: (r,) falling, in units of G's largest entry. right: (i, r), with canonical signs.
        captured: share of ‖G‖²_F in it.
        residual: of the eigenpairs of the Gram matrix.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    captured: float
    residual: float


def decompose_gradient(statistics: LayerStatistics, rank: int) -> GradientDirections:
    """The r leading triplets, in float64, whatever the size of the loss; G is iterated on in its own dtype.

    Raises:
        UnsolvableLayer: the gradient is not finite or zero.
    """
    grad = checked("gradient", statistics.grad)
    grad = grad / torch.linalg.vector_norm(grad, torch.inf)  # (o, i)
    start = noise(max(grad.shape), min(rank + OVERSAMPLING, *grad.shape), like=grad)
    found = largest_singular_triplets(grad, start, rank)
    signs = canonical_signs(found.right)
    captured = found.values.square().sum().item() / squared_norm(grad)
    return GradientDirections(found.left * signs, found.values, found.right * signs, captured, found.residual)
