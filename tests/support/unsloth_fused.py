"""Let Unsloth's own code put its fused functions over a tiny model, on a CPU, and start its adapter: a program.

Unsloth takes a CPU for a GPU here, as it does for its own tests. Its attention cannot run so: it is the stand-in's,
which calls the same functions; Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import os

os.environ.pop("UNSLOTH_FORCE_CPU", None)
os.environ.update(UNSLOTH_ALLOW_CPU="1", TRITON_INTERPRET="1")

import unsloth  # noqa: I001  (before what it patches)
import torch
from models import N_PROJECTIONS, PROJECTIONS, WIDE, adapter_weights, batches, documents, tiny_llama, with_lora
from peft import PeftModel
from torch import Tensor
from transformers import Trainer
from transformers.models.llama.modeling_llama import LlamaAttention
from unsloth.kernels import fast_lora
from unsloth.models import llama
from unsloth_stand_ins import attention_forward, blocks, fired, on_instances

from lora_da import LoraDAConfig, initialize_lora_da_weights

DATA = batches(documents(8), 4)
# The second needs no backward pass: with the adapter off, Unsloth's functions call the layers where a gradient is to
# come, and where none is they compute in one.
METHODS = ("lora_da", "cntlora")


def tiny() -> PeftModel:
    return with_lora(tiny_llama(**WIDE).to(torch.bfloat16), target_modules=PROJECTIONS)


def fused(model: PeftModel) -> PeftModel:
    """Do what `FastLanguageModel.get_peft_model` ends with on a GPU."""
    for block in blocks(model):
        block.self_attn.apply_qkv, block.self_attn.apply_o = llama.original_apply_qkv, llama.original_apply_o
    model.max_seq_length = 64
    return llama.FastLlamaModel.patch_peft_model(model, use_gradient_checkpointing=False)


def started(model: PeftModel, method: str) -> dict[str, Tensor]:
    report = initialize_lora_da_weights(model, DATA, LoraDAConfig(samples=8, method=method), show_progress=False)
    assert report.initialized == N_PROJECTIONS, report
    return adapter_weights(model)


def _fast_inner_training_loop() -> None:
    """Bears the name by which Unsloth knows a Trainer that it has patched."""


if __name__ == "__main__":
    LlamaAttention.forward, Trainer._inner_training_loop = attention_forward, _fast_inner_training_loop
    for method in METHODS:
        expected, model = started(tiny(), method), fused(tiny())
        before = on_instances(model)
        functions = [getattr(value, "__func__", value) for value in before.values()]
        theirs = fast_lora.apply_lora_qkv, fast_lora.apply_lora_o, fast_lora.apply_lora_mlp_swiglu
        assert sorted(map(id, functions)) == sorted(map(id, theirs * len(blocks(model)))), functions
        assert not fired(model, lambda model=model: model(**DATA[0])), "a hook on a fused layer fires"
        found = started(model, method)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        after = on_instances(model)
        assert before.keys() == after.keys() and all(after[key] is before[key] for key in before)
        print(f"Unsloth {unsloth.__version__}, {method}: {len(functions)} functions lifted and put back")
