"""Any tiny model in 4 bits, as users load theirs, and its twin with the dense weights that it dequantises to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import quantized
from peft.utils.integrations import dequantize_bnb_weight
from transformers import PreTrainedModel

FOUR_BIT: dict[str, dict[str, Any]] = {  # by the keys of their rows in the table of what works
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "double-quantisation": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "quant-storage": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.float32},
}


def four_bit(
    model: PreTrainedModel,
    folder: Path,
    kind: str = "nf4",
    dtype: torch.dtype = torch.float32,
    head: str = "lm_head",
) -> PreTrainedModel:
    """The model loaded in 4 bits but for its head, which stays dense where PEFT trains it beside the adapter."""
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype, "llm_int8_skip_modules": [head]}
    return quantized(model, folder, dtype, **four, **FOUR_BIT[kind])


def dequantized(quantised: PreTrainedModel, like: PreTrainedModel) -> PreTrainedModel:
    """`like` with the weights of the quantised model, which has no adapter yet, in the dtype of its dense ones."""
    found = dict(quantised.named_parameters())
    packed = [name for name, p in found.items() if type(p).__name__ in ("Params4bit", "Int8Params")]
    assert packed
    for name in packed:
        layer = quantised.get_submodule(name.rpartition(".")[0])
        found[name] = dequantize_bnb_weight(found[name], state=getattr(layer, "state", None))
    assert not like.load_state_dict(found, strict=False).unexpected_keys
    return like.to(quantised.get_input_embeddings().weight.dtype)
