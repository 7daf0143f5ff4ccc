"""The base that all cells train on."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from examples.smollm2 import prepare

SMOLLM2 = "smollm2-135m"
BASES = ("nf4", "bf16")
DTYPE = torch.bfloat16


def load_base(name: str, base: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in train mode and its tokenizer.

    Args:
        name: `smollm2-135m`, which is made on this machine, or a model's folder.
        base: `nf4` (double quantisation, computing in bf16) or `bf16`.
    """
    if base not in BASES:
        raise ValueError(f"base is {base!r}; set one of {', '.join(BASES)}")
    path = str(prepare()) if name == SMOLLM2 else name
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPE
    )
    options = {"quantization_config": quantisation} if base == "nf4" else {}
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=DTYPE, attn_implementation="sdpa", device_map={"": device}, **options
    )
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # held-out rows are looked at in train mode, and all runs draw alike
    return model.train(), AutoTokenizer.from_pretrained(path)
