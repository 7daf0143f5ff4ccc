"""QLoRA as all benchmarks set it up: a base in nf4 or bf16, and an adapter on all its linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

BASES = ("nf4", "bf16")
DTYPE = torch.bfloat16  # of unquantised weights, activations and 4-bit products


def load_model(folder: Path | str, base: str, device: torch.device) -> PreTrainedModel:
    """Load a causal language model, in `nf4` (double quantisation, computing in bf16) or `bf16`."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPE
    )
    options = {"quantization_config": quantisation} if base == "nf4" else {}
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPE, attn_implementation="sdpa", device_map={"": device}, **options
    )


def nf4_linear(weight: Tensor, bias: nn.Parameter | None, device: torch.device) -> nn.Module:
    """Quantise one layer of weight (o, i) as `load_model` does those of a whole model."""
    o, i = weight.shape
    layer = bnb.nn.Linear4bit(i, o, bias=bias is not None, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    ).to(device)
    layer.bias = bias
    return layer


def lora_config(rank: int, **changes: Any) -> LoraConfig:
    """Describe the adapter: on all linear layers but the output layer, alpha twice the rank."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", **changes)
