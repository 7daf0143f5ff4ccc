"""LoRA-GA (arXiv 2407.05000), as far as it leaves the base alone: lora_A along the gradient's right singular vectors.

With G = U S Vᵀ and m the layer's output width, the paper takes

    lora_A = V_{1…r}ᵀ m^¼ / √gamma,   lora_B = U_{r+1…2r} m^¼ / √gamma,   and W − s·lora_B·lora_A for the base

so that the model starts as it is. Here the base is never changed, quantised or not, and a lora_B that is not zero would
move the model by a step that is no descent. The start is kept by lora_B = 0, with the paper's lora_A: at the first step
lora_B then learns the gradient in the same rows of V, while lora_A, which the paper's lora_B gives a gradient of its
own, follows from the second step on. gamma is 16, as in PEFT's LoraGAConfig.

PEFT's `init_lora_weights="lora_ga"` is a third variant: its lora_A is orthonormal without a factor, its lora_B carries
the singular values, and it changes the base.
"""

from __future__ import annotations

import math

import torch

from lora_da.methods.common import LayerSpec, LoraFactors
from lora_da.methods.gradient import decompose_gradient
from lora_da.methods.method import Numbers
from lora_da.statistics import LayerStatistics


def lora_ga(statistics: LayerStatistics, layer: LayerSpec, numbers: Numbers) -> LoraFactors:
    """Solve one layer.

    Args:
        statistics: its gradient is read. Where that has fewer directions than r, the rest of lora_A's rows are
            orthogonal to them and arbitrary.
        layer: its rank r.
        numbers: lora_A has singular values m^¼/√gamma, all the same.

    Raises:
        UnsolvableLayer: the gradient is not finite or zero.
    """
    found = decompose_gradient(statistics, layer.rank)
    assert numbers.gamma is not None
    out_features = found.left.shape[0]
    return LoraFactors(
        lora_A=found.right.T * (out_features**0.25 / math.sqrt(numbers.gamma)),
        lora_B=torch.zeros_like(found.left),
        bias_captured=found.captured,
        residual=found.residual,
    )
