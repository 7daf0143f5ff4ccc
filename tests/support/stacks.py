"""Tiny mixtures whose experts are slices of one parameter, and adapters on them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import transformers
from expert_oracle import PARAMETERS
from models import PREFIX, Document, batches, documents, seeded, with_lora
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from settings import as_solved
from tiny_configs import tiny_config
from torch import Tensor
from transformers import PreTrainedModel

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.report import InitReport

TARGETS = [f"mlp.experts.{name}" for name in PARAMETERS]
ROWS = documents((9, 14, 6, 11, 7, 13, 8, 10))
CONFIG = as_solved(samples=len(ROWS), population_size=len(ROWS))
# What sizes alone do not say, by family: gpt-oss stores its matrices (i, o), and the first block of DeepSeek-V3 has no
# experts here.
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_hidden_layers": 4},
    "Qwen3Moe": {"num_hidden_layers": 4},
    "GptOss": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "DeepseekV3": {"num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 2},
}


def stacked(family: str, **config: Any) -> PreTrainedModel:
    """A tiny model of the family; skips where PEFT takes its matrices for (i, o), as up to 0.18."""
    if family != "GptOss" and "is_transposed" not in inspect.getsource(ParamWrapper):
        pytest.skip("this PEFT takes all matrices for (i, o)")
    kind = getattr(transformers, f"{family}Config")
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **FAMILIES[family], **config}
    return seeded(getattr(transformers, f"{family}ForCausalLM"), tiny_config(kind, **special))


def with_experts(model: PreTrainedModel, **config: Any) -> PeftModel:
    """An adapter on the experts, and on one layer of the attention."""
    targets = {"target_modules": ["o_proj"], "target_parameters": TARGETS, "r": 2}
    return with_lora(model, **{**targets, **config})


def without_expert(number: int, **config: Any) -> PeftModel:
    """Experts of which one is given no token."""
    base = stacked("GptOss", **config)
    for layer in base.model.layers:
        layer.mlp.router.bias.data[number] = -1e4
    return with_experts(base)


def initialize(model: PeftModel, config: LoraDAConfig = CONFIG, rows: list[Document] = ROWS) -> InitReport:
    """Start the adapter on rows in batches of three."""
    return initialize_lora_da_weights(model, batches(rows, 3), config, show_progress=False)


def wrappers(model: PeftModel) -> Iterator[tuple[str, ParamWrapper]]:
    """What PEFT has wrapped, by the parameter's name in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            place = name.removeprefix(PREFIX).replace(".base_layer", "")
            yield f"{place}.{module.parameter_name}", module


def experts_of(model: PeftModel) -> dict[str, Tensor]:
    """ΔW, (o, i), of each expert as PEFT has it, by the expert's name in the base model."""
    found = {}
    for name, wrapper in wrappers(model):
        delta = wrapper.get_delta_weight("default").detach()
        delta = delta.mT if getattr(wrapper.get_base_layer(), "is_transposed", False) else delta
        found |= {f"{name}.{number}": matrix for number, matrix in enumerate(delta)}
    return found
