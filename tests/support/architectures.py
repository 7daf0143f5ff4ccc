"""Tiny random models of the architectures that stream, four blocks each, with windows shorter than the documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from models import PROJECTIONS, VOCABULARY, seeded, with_lora
from peft import PeftModel
from transformers import PreTrainedModel

BLOCKS = 4
WINDOW = 3  # tokens; every document is longer
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "layer_types": MIXED}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Architecture:
    """A kind of model, its config, and the layers an adapter is put on."""

    name: str
    config: dict[str, Any]
    targets: str | list[str] = "all-linear"

    def base(self) -> PreTrainedModel:
        config = getattr(transformers, f"{self.name}Config")(**self.config)
        return seeded(getattr(transformers, self.model_name), config)

    def model(self, base: PreTrainedModel) -> PeftModel:
        return with_lora(base, r=2, target_modules=self.targets)

    @property
    def model_name(self) -> str:
        return {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}.get(self.name, f"{self.name}ForCausalLM")


def _neox(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | changes


def _moe(**changes: Any) -> dict[str, Any]:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return {**SIZES, **experts, "experts_implementation": "eager", **changes}


LLAMA = Architecture("Llama", SIZES)
ARCHITECTURES = {
    a.name: a
    for a in (
        LLAMA,
        Architecture("Mistral", {**SIZES, "sliding_window": WINDOW}),
        Architecture(
            "Qwen2", {**SIZES, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": BLOCKS // 2}
        ),
        Architecture("Qwen3", {**SIZES, "head_dim": 8}),
        # sdpa would leave the soft-capping of the attention out
        Architecture("Gemma2", {**GEMMA, "attn_implementation": "eager"}),
        Architecture("Gemma3Text", GEMMA),
        Architecture("Phi3", {**SIZES, "sliding_window": None}),
        Architecture("GPT2", {**COMMON, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 256}),
        Architecture("GPTNeoX", _neox(use_parallel_residual=True)),
        Architecture("Mixtral", {**_moe(num_local_experts=4), "sliding_window": None}, ATTENTION),
        Architecture("Qwen3Moe", _moe(head_dim=8), ATTENTION),
        Architecture("Qwen2Moe", _moe(shared_expert_intermediate_size=24), PROJECTIONS),
    )
}
