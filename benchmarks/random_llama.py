"""A Llama of random weights, built one matrix at a time, so that its 4-bit form never exists in bf16 as a whole."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

DTYPE = torch.bfloat16  # of unquantised weights, activations and 4-bit products


def random_llama(config: LlamaConfig, base: str, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """A Llama whose weights are drawn on the device one by one, the decoder's matrices quantised as they are drawn."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=DTYPE, attn_implementation="sdpa")
    generator = torch.Generator(device).manual_seed(seed)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                weight = _drawn(child.weight, device, generator)
                quantised = base == "nf4" and child is not model.lm_head
                setattr(parent, name, _quantised(weight, device) if quantised else _linear(weight))
            elif isinstance(child, nn.Embedding):
                child.weight = nn.Parameter(_drawn(child.weight, device, generator), requires_grad=False)
            elif "weight" in child._parameters:  # a norm
                child.weight = nn.Parameter(torch.ones_like(child.weight, device=device), requires_grad=False)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)  # its tables are computed, not drawn
    model.is_loaded_in_4bit = base == "nf4"  # what PEFT asks
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if left:
        raise RuntimeError(f"no weights were drawn for {', '.join(left)}")
    return model


def _drawn(like: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    """(o, i), of a size that keeps activations of order one."""
    weight = torch.empty(like.shape, dtype=DTYPE, device=device)
    return weight.normal_(std=like.shape[1] ** -0.5, generator=generator)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _quantised(weight: Tensor, device: torch.device) -> nn.Module:
    o, i = weight.shape
    layer = bnb.nn.Linear4bit(i, o, bias=False, compute_dtype=DTYPE, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    ).to(device)
    return layer
