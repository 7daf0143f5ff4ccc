"""QLoRA as all benchmarks set it up: a base in nf4, its dense twin or bf16, and an adapter on all linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

BASES = ("nf4", "bf16", "twin")
DTYPE = torch.bfloat16  # of unquantised weights, activations and 4-bit products
ALPHA_OVER_R = 2.0  # unless a benchmark says otherwise


def load_model(folder: Path | str, base: str, device: torch.device) -> PreTrainedModel:
    """Load a causal language model, in `nf4` (double quantisation, computing in bf16), `bf16`, or as the `twin` of nf4:
    dense, with the weights that those dequantise to, so that nothing is dequantised in a step."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPE
    )
    options = {} if base == "bf16" else {"quantization_config": quantisation}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPE, attn_implementation="sdpa", device_map={"": device}, **options
    )
    if base == "twin":
        model = model.dequantize(dtype=DTYPE)
        model.is_loaded_in_4bit = False  # which is left as it was, and trainers ask for it
    return model


def nf4_linear(weight: Tensor, bias: nn.Parameter | None, device: torch.device) -> nn.Module:
    """Quantise one layer of weight (o, i) as `load_model` does those of a whole model."""
    o, i = weight.shape
    layer = bnb.nn.Linear4bit(i, o, bias=bias is not None, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    ).to(device)
    layer.bias = bias
    return layer


def dense_linear(weight: Tensor, bias: nn.Parameter | None, device: torch.device) -> nn.Module:
    """Build the twin of `nf4_linear`: dense, with the weight (o, i) that it dequantises to."""
    packed: Any = nf4_linear(weight, bias, device).weight
    dense: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(bnb.functional.dequantize_4bit(packed.data, packed.quant_state), requires_grad=False)
    dense.bias = bias
    return dense


def lora_config(rank: int, alpha_over_r: float = ALPHA_OVER_R, **changes: Any) -> LoraConfig:
    """Describe the adapter: on all linear layers but the output layer."""
    alpha = alpha_over_r * rank
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM", **changes)
