"""LoRA-One: the best rank-r step down the gradient, from its singular value decomposition.

With −G = U S Vᵀ, the gradient of the layer's weight with its sign turned, S falling from S_1,

    lora_B = U_r √(S_r / S_1) / √gamma,   lora_A = √(S_r / S_1) V_rᵀ / √gamma

so lora_B·lora_A = −[G]_r / (S_1 · gamma): the sign sits in U, and W + s·lora_B·lora_A is a step downhill, with spectral
norm 1/gamma. gamma is 128 in the paper. The base weight is not touched. Of LoRA-DA it is the case Z = Y = I without the
variance term, but for the singular values, of which both factors get a share.
"""

from __future__ import annotations

import math

from lora_da.methods.common import LayerSpec, LoraFactors, UnsolvableLayer
from lora_da.methods.gradient import decompose_gradient
from lora_da.methods.method import Numbers
from lora_da.statistics import LayerStatistics

# Of the largest singular value: what float32 sums cannot tell from nothing.
MIN_SINGULAR_VALUE = 1e-6


def lora_one(statistics: LayerStatistics, layer: LayerSpec, numbers: Numbers) -> LoraFactors:
    """Solve one layer.

    Args:
        statistics: its gradient is read.
        layer: its rank r.
        numbers: `gamma` divides the step.

    Raises:
        UnsolvableLayer: the gradient is not finite, zero, or of a rank below r: both factors of the rest of the pairs
            would be zero, and would stay zero in training.
    """
    found = decompose_gradient(statistics, layer.rank)
    relative = found.values / found.values[0]
    if relative[-1] <= MIN_SINGULAR_VALUE:
        found_rank = int((relative > MIN_SINGULAR_VALUE).sum())
        raise UnsolvableLayer(
            f"its gradient has rank {found_rank}, below the adapter's {layer.rank}; take more samples or a smaller rank"
        )
    assert numbers.gamma is not None
    share = relative.sqrt() / math.sqrt(numbers.gamma)  # (r,)
    return LoraFactors(
        lora_A=share.unsqueeze(1) * found.right.T,
        lora_B=-found.left * share,
        bias_captured=found.captured,
        residual=found.residual,
    )
