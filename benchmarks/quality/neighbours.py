"""PEFT's own starts, called as PEFT documents them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_eva_state_dict, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.layer import LoraLayer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from benchmarks.neighbours import eva_adapter, linear_names
from benchmarks.qlora import lora_config, nf4_linear

# On the unquantised model; its remaining base is quantised then, and is another than that of the other starts.
OWN_BASE = ("pissa", "olora", "corda", "orthogonal")


def eva(model: PreTrainedModel, fresh: PreTrainedModel, rank: int, loader: DataLoader[Any]) -> PeftModel:
    """Start with EVA on the quantised base.

    Args:
        model: gets the adapter.
        fresh: the same base once more. EVA evaluates, after which a 4-bit weight on a CPU passes no gradient.
    """
    found = get_eva_state_dict(eva_adapter(fresh, rank), loader, show_progress_bar=False)
    peft_model = eva_adapter(model, rank)
    initialize_lora_eva_weights(peft_model, eva_state_dict=found)
    return peft_model


def on_its_own_base(
    method: str, dense: PreTrainedModel, rank: int, loader: DataLoader[Any], device: torch.device
) -> PeftModel:
    """Start with PiSSA, OLoRA, CorDA or orthogonal on an unquantised model; quantise its remaining base to nf4.

    Args:
        dense: the unquantised model; it is changed.
        loader: of single rows, which is all that CorDA's preparation takes.
    """
    preparation = {"corda_config": CordaConfig()} if method == "corda" else {}
    config = lora_config(rank, init_lora_weights=method, **preparation)
    if method == "corda":
        from peft.tuners.lora.corda import preprocess_corda  # which wants attrs; PEFT does not install it

        config.target_modules = linear_names(dense)
        preprocess_corda(dense, config, run_model=partial(_run, dense, loader, device))
    peft_model = get_peft_model(dense, config)
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            linear = module.get_base_layer()
            module.base_layer = nf4_linear(linear.weight.detach(), linear.bias, device)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:  # as TRL does where the model was loaded in 4 bit
            parameter.data = parameter.data.bfloat16()
    return peft_model.train()


@torch.no_grad()
def _run(model: PreTrainedModel, loader: DataLoader[Any], device: torch.device) -> None:
    for batch in loader:
        model(**{key: value.to(device) for key, value in batch.items()})
