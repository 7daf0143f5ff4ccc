"""PEFT's own starts, called as PEFT documents them."""

from __future__ import annotations

from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from peft import (
    EvaConfig,
    LoraConfig,
    PeftModel,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

# On the unquantised model; its remaining base is quantised then, and is another than that of the other starts.
OWN_BASE = ("pissa", "olora", "corda", "orthogonal")


def eva(model: PreTrainedModel, fresh: PreTrainedModel, config: LoraConfig, loader: DataLoader[Any]) -> PeftModel:
    """EVA on the quantised base, every layer at the same rank.

    Args:
        model: gets the adapter.
        fresh: the same base once more. EVA evaluates, after which a 4-bit weight on a CPU passes no gradient.
    """
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    found = get_eva_state_dict(get_peft_model(fresh, config, low_cpu_mem_usage=True), loader, show_progress_bar=False)
    peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(peft_model, eva_state_dict=found)
    return peft_model


def on_its_own_base(
    method: str, dense: PreTrainedModel, config: LoraConfig, loader: DataLoader[Any], device: torch.device
) -> PeftModel:
    """PiSSA, OLoRA, CorDA or orthogonal on an unquantised model, whose remaining base is then quantised to nf4.

    Args:
        dense: the unquantised model; it is changed.
        loader: of single rows, which is all that CorDA's preparation takes.
    """
    config.init_lora_weights = method
    if method == "corda":
        from peft.tuners.lora.corda import preprocess_corda  # which wants attrs; PEFT does not install it

        config.corda_config = CordaConfig()
        # It looks for targets before PEFT knows `all-linear`.
        head = dense.get_output_embeddings()
        linear = (name for name, m in dense.named_modules() if isinstance(m, nn.Linear) and m is not head)
        config.target_modules = {name.rpartition(".")[2] for name in linear}
        preprocess_corda(dense, config, run_model=partial(_run, dense, loader, device))
    peft_model = get_peft_model(dense, config)
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            module.base_layer = _nf4(module.get_base_layer(), device)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:  # as TRL does where the model was loaded in 4 bit
            parameter.data = parameter.data.bfloat16()
    return peft_model.train()


@torch.no_grad()
def _run(model: PreTrainedModel, loader: DataLoader[Any], device: torch.device) -> None:
    for batch in loader:
        model(**{key: value.to(device) for key, value in batch.items()})


def _nf4(linear: nn.Linear, device: torch.device) -> nn.Module:
    quantised = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = linear.weight.detach()
    quantised.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    quantised.bias = linear.bias
    return quantised.to(device)
