"""Any tiny model in nf4, as users load theirs, and its twin with the dense weights that it dequantises to."""

from __future__ import annotations

from pathlib import Path

import torch
from peft.utils.integrations import dequantize_bnb_weight
from transformers import BitsAndBytesConfig, PreTrainedModel

# A quantised layer multiplies with its twin's weight; what is left is the order of float32 sums.
SAME = 2e-5


def four_bit(model: PreTrainedModel, folder: Path, head: str = "lm_head") -> PreTrainedModel:
    """The model loaded in nf4 but for its head, which PEFT trains beside the adapter; it must be at least 64 wide."""
    model.save_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=[head],
    )
    return type(model).from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def dequantized(quantised: PreTrainedModel, like: PreTrainedModel) -> PreTrainedModel:
    """`like` with the weights of the quantised model, which has no adapter yet."""
    found = dict(quantised.named_parameters())
    four_bits = [name for name, p in found.items() if type(p).__name__ == "Params4bit"]
    assert four_bits
    for name in four_bits:
        layer = quantised.get_submodule(name.rpartition(".")[0])
        found[name] = dequantize_bnb_weight(found[name], state=getattr(layer, "state", None))
    assert not like.load_state_dict(found, strict=False).unexpected_keys
    return like
