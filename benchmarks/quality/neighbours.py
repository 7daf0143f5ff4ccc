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
from benchmarks.qlora import dense_linear, lora_config, nf4_linear
from benchmarks.quality.results import Cell

# On the unquantised model; its remaining base is quantised then, and is another than that of the other starts.
OWN_BASE = ("pissa", "olora", "corda", "orthogonal")


def eva(model: PreTrainedModel, fresh: PreTrainedModel, cell: Cell, loader: DataLoader[Any]) -> PeftModel:
    """Start with EVA on the base that all others train on.

    Args:
        model: gets the adapter.
        fresh: the same base once more. EVA evaluates, after which a 4-bit weight on a CPU passes no gradient.
    """
    found = get_eva_state_dict(eva_adapter(fresh, cell.rank, cell.alpha_over_r), loader, show_progress_bar=False)
    peft_model = eva_adapter(model, cell.rank, cell.alpha_over_r)
    initialize_lora_eva_weights(peft_model, eva_state_dict=found)
    return peft_model


def on_its_own_base(dense: PreTrainedModel, cell: Cell, loader: DataLoader[Any], device: torch.device) -> PeftModel:
    """Start with PiSSA, OLoRA, CorDA or orthogonal on an unquantised model; quantise its remaining base to nf4, and
    take that one's twin where the cell's base is one.

    Args:
        dense: the unquantised model; it is changed.
        loader: of single rows, which is all that CorDA's preparation takes.
    """
    preparation = {"corda_config": CordaConfig()} if cell.method == "corda" else {}
    config = lora_config(cell.rank, cell.alpha_over_r, init_lora_weights=cell.method, **preparation)
    if cell.method == "corda":
        from peft.tuners.lora.corda import preprocess_corda  # which wants attrs; PEFT does not install it

        config.target_modules = linear_names(dense)
        preprocess_corda(dense, config, run_model=partial(_run, dense, loader, device))
    peft_model = get_peft_model(dense, config)
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            linear = module.get_base_layer()
            quantised = dense_linear if cell.base == "twin" else nf4_linear
            module.base_layer = quantised(linear.weight.detach(), linear.bias, device)
    return peft_model.train()


@torch.no_grad()
def _run(model: PreTrainedModel, loader: DataLoader[Any], device: torch.device) -> None:
    for batch in loader:
        model(**{key: value.to(device) for key, value in batch.items()})
