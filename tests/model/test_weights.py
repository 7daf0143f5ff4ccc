"""The size of a layer's weight, in the precision that it has, or in float32."""

import pytest
import torch
from torch import nn

from lora_da.model.weights import weight_norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_of_a_weight_of_any_precision(dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 2, bias=False, dtype=dtype)
    nn.init.constant_(layer.weight, 0.5)
    assert weight_norm(layer) == pytest.approx(1.5**0.5)
