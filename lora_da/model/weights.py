"""The dense weight of one wrapped layer, for the moment it is asked for, and what is measured on it."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_da.errors import LoraDAError
from lora_da.model.sharding import is_shard, shape, whole

# What a weight is held in that needs no scale beside it.
DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROWS = 256  # of a weight that are looked at together: what is made of them stays small beside the weight itself


def dense_weight(base: nn.Module) -> Tensor | None:
    """W, (o, i), of a layer, dequantised on its device; None for a format that PEFT cannot dequantise (GPTQ, AWQ)."""
    weight: Any = getattr(base, "weight", None)
    if is_shard(weight):
        if not is_readable(base):
            return None
        with whole(weight) as found:
            weight = found.detach().clone()
    elif get_bnb_param_type(weight):
        weight = dequantize_bnb_weight(weight, state=getattr(base, "state", None))
    elif isinstance(weight, Tensor) or hasattr(base, "W_q"):  # HQQ's layers have no `weight`
        weight = dequantize_module_weight(base)
    if not isinstance(weight, Tensor) or weight.dtype not in DENSE:
        return None
    return weight.detach().T if isinstance(base, Conv1D) else weight.detach()


def is_readable(base: nn.Module) -> bool:
    """False for shards of a quantised weight: its own shape is not the layer's, and apart from the layer it cannot be
    dequantised. True does not promise that PEFT can."""
    weight: Any = getattr(base, "weight", None)
    sizes = {getattr(base, "in_features", None), getattr(base, "out_features", None)}
    return not is_shard(weight) or isinstance(base, Conv1D) or set(shape(weight)) == sizes


def weight_norm(base: nn.Module) -> float | None:
    """‖W‖_F; None where W cannot be read."""
    weight = dense_weight(base)
    return None if weight is None else norm_of(weight)


def norm_of(weight: Tensor) -> float:
    """‖W‖_F, in float32 or better."""
    return torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32)).item()


def row_norms(base: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + scaling · lora_B lora_A‖ of every row, (o,): DoRA's magnitudes where its directions start.

    In the dtype of the factors, as PEFT's forward divides by it, so that the quotient is 1 and not nearly so.

    Raises:
        LoraDAError: W cannot be read.
    """
    weight, norms = dense_weight(base), []
    if weight is None:
        raise LoraDAError(f"DoRA needs the weight of {type(base).__name__}, which PEFT cannot dequantise")
    for rows, b in zip(weight.split(ROWS), lora_B.split(ROWS), strict=True):
        started = rows.to(lora_A) + scaling * (b @ lora_A)
        norms.append(torch.linalg.norm(started, dim=1))
    return torch.cat(norms)
