"""A Llama of random weights, built one matrix at a time, so that its 4-bit form never exists in bf16 as a whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.qlora import DTYPE, nf4_linear


def random_llama(config: LlamaConfig, base: str, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """Draw a Llama's weights on the device one by one, and quantise the decoder's matrices as they are drawn."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=DTYPE, attn_implementation="sdpa")
    generator = torch.Generator(device).manual_seed(seed)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                weight = _drawn(child.weight, device, generator)
                quantised = base == "nf4" and child is not model.lm_head
                setattr(parent, name, nf4_linear(weight, None, device) if quantised else _linear(weight))
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
    """Draw a weight (o, i), of a size that keeps activations of order one."""
    weight = torch.empty(like.shape, dtype=DTYPE, device=device)
    return weight.normal_(std=like.shape[1] ** -0.5, generator=generator)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
