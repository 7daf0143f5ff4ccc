"""Parameters that PEFT's `target_parameters` wraps: one matrix, or those of all experts, each a layer of its own.

PEFT lays the factors of E experts of rank r out as one pair: rows e·r … e·r + r − 1 of lora_A (r·E, i) are those of
expert e, and columns e, e + E, e + 2E, … of lora_B (o, r·E). Each expert's matrix gets the product of its own alone, so
each is solved alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.utils import parametrize

from lora_da.adapter.layer import AdapterLayer, Part, variance_of_plain
from lora_da.model.sharding import is_shard, is_zero3, shape
from lora_da.model.slices import Slice, Stack

STAYS_ON = "a quantised parameter, whose adapter this release of PEFT does not take off again after a forward"
NESTED = ".base_layer"  # wrappers of several parameters of a module are inside each other


def name_of(path: str, wrapper: ParamWrapper) -> str:
    """The name of the parameter in the PEFT model as if nothing were wrapped."""
    while path.endswith(NESTED):
        path = path.removesuffix(NESTED)
    return f"{path}.{wrapper.parameter_name}"


def why_left(wrapper: ParamWrapper) -> str | None:
    """Why its parameter cannot be served; None where it may be."""
    module: Any = wrapper.get_base_layer()
    name = wrapper.parameter_name
    if any(map(is_zero3, module.parameters())):  # PEFT reads it, and its factors, where DeepSpeed has not gathered them
        return "a targeted parameter under DeepSpeed ZeRO-3"
    if parametrize.is_parametrized(module, name):  # by a quantisation
        if is_shard(module.parametrizations[name].original):
            return "a quantised parameter that is divided over processes"
        return None if _comes_off() else STAYS_ON
    return None if wrapper.get_param().is_floating_point() else "a quantised parameter, whose matrices nobody knows"


def _comes_off() -> bool:
    """Whether PEFT takes a parameter's adapter off again where the parameter is parametrised: 0.21.2 leaves what was on
    in one forward for all that follow, in training too."""
    module: Any = nn.Identity()
    module.weight = nn.Parameter(torch.zeros(2, 1, 1, device="cpu"))
    parametrize.register_parametrization(module, "weight", nn.Identity())
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ParamWrapper(module, "probe", "weight", LoraConfig(r=1), r=1, lora_alpha=1)(torch.zeros(1, device="cpu"))
    return len(module.parametrizations["weight"]) == 1


def slice_layers(
    path: str, wrapper: ParamWrapper, adapter: str, is_gaussian: bool, is_head: bool
) -> Iterator[AdapterLayer]:
    """The layers in a wrapped parameter, an expert's each.

    Args:
        path: of the wrapper in the PEFT model.
        wrapper: PEFT's.
        adapter: which of its adapters.
        is_gaussian: whether PEFT drew lora_A so.
        is_head: whether its module is the language-model head.
    """
    module, is_stack = wrapper.get_base_layer(), len(shape(wrapper.get_param())) == 3
    # PEFT takes two dimensions as (o, i), and three as (E, i, o) unless it has swapped the last two
    is_swapped = getattr(wrapper, "_did_swap_in_out_features", False)
    stack = Stack(module, wrapper.parameter_name, is_transposed=is_stack and not is_swapped)
    n, rank, name = wrapper.num_experts, wrapper.r[adapter], name_of(path, wrapper)
    lora_A, lora_B = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    for number in range(n):
        yield AdapterLayer(
            name=f"{name}.{number}" if is_stack else name,
            base=module,
            lora_A=Part(lora_A, slice(number * rank, (number + 1) * rank), slice(None)),
            lora_B=Part(lora_B, slice(None), slice(number, None, n)),
            scaling=wrapper.scaling[adapter],
            plain_variance=variance_of_plain(rank, shape(lora_A)[1], is_gaussian),
            is_head=is_head,
            slice=Slice(stack, number if is_stack else None),
        )
