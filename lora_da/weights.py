"""The dense weight of one wrapped layer, for the moment it is asked for, and what is measured on it."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROWS = 256  # of a weight that are looked at together: what is made of them stays small beside the weight itself


def dense_weight(base: nn.Module) -> Tensor:
    """W, (o, i), of a layer; a quantised one is dequantised on its device."""
    weight: Any = base.weight
    if get_bnb_param_type(weight):
        weight = dequantize_bnb_weight(weight, state=getattr(base, "state", None))
    return weight.detach().T if isinstance(base, Conv1D) else weight.detach()


def weight_norm(base: nn.Module) -> float:
    """‖W‖_F."""
    return torch.linalg.vector_norm(dense_weight(base), dtype=torch.float32).item()


def row_norms(base: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + scaling · lora_B lora_A‖ of every row, (o,): DoRA's magnitudes where its directions start.

    In the dtype of the factors, as PEFT's forward divides by it, so that the quotient is 1 and not nearly so.
    """
    weight, norms = dense_weight(base), []
    for rows, b in zip(weight.split(ROWS), lora_B.split(ROWS), strict=True):
        started = rows.to(lora_A) + scaling * (b @ lora_A)
        norms.append(torch.linalg.norm(started, dim=1))
    return torch.cat(norms)
