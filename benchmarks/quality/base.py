"""The base that all cells train on."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.errors import BenchmarkError
from benchmarks.qlora import BASES, load_model
from examples.smollm2 import prepare

SMOLLM2 = "smollm2-135m"


def load_base(name: str, base: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in train mode, without dropout, and its tokenizer.

    Args:
        name: `smollm2-135m`, which is made on this machine, or a model's folder.
        base: `nf4`, `bf16` or `twin`, see `load_model`.

    Raises:
        BenchmarkError: there is no such base.
    """
    if base not in BASES:
        raise BenchmarkError(f"base is {base!r}; set one of {', '.join(BASES)}")
    path = str(prepare()) if name == SMOLLM2 else name
    model = load_model(path, base, device)
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # held-out rows are looked at in train mode, and all runs draw alike
    return model.train(), AutoTokenizer.from_pretrained(path)
