"""Tiny mixtures whose experts are slices of one parameter, and the truth of each slice in float64."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from models import IGNORED, PREFIX, Document, batches, documents, seeded, with_lora
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from settings import as_solved
from tiny_configs import tiny_config
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.report import InitReport

PARAMETERS = ["gate_up_proj", "down_proj"]
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


def stacks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold all experts of a block, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, PARAMETERS[0])}


def expert_truth(model: PreTrainedModel, rows: list[Document], averaging: str) -> dict[str, dict[str, Tensor]]:
    """G, Z and Y of every slice that a token is routed to, from float64 documents one by one.

    Each expert is run on all tokens, and its output taken where the router asks for it. G is also what autograd gives
    of the parameter itself, whatever is made of the outputs here.
    """
    twin = copy.deepcopy(model).double().requires_grad_(True)
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # x, y and who was asked, of the running document
    for name, module in stacks_of(twin).items():
        module.forward = _dense(module, name, seen)
    parameters = {f"{n}.{p}": getattr(m, p) for n, m in stacks_of(twin).items() for p in PARAMETERS}
    xs: dict[str, list[Tensor]] = {}
    ds: dict[str, list[Tensor]] = {}
    of_parameters = {name: torch.zeros_like(value) for name, value in parameters.items()}
    n_loss = [sum(label != IGNORED for label in row["labels"][1:]) for row in rows]
    for document, n in zip(batches(rows, 1), n_loss, strict=True):
        seen.clear()
        logits = twin(input_ids=document["input_ids"], use_cache=False).logits[0, :-1].double()
        loss = F.cross_entropy(logits, document["labels"][0, 1:], reduction="sum")
        loss = loss / (n if averaging == "samples" else 1)
        outputs = [y for _, y, _ in seen.values()]
        gradients = torch.autograd.grad(loss, [*outputs, *parameters.values()])
        for (name, (x, _, asked)), d in zip(seen.items(), gradients, strict=False):
            xs.setdefault(name, []).append(x.detach()[asked])
            ds.setdefault(name, []).append(d[asked])
        for total, gradient in zip(of_parameters.values(), gradients[len(outputs) :], strict=True):
            total += gradient
    units = len(rows) if averaging == "samples" else sum(n_loss)
    found = {}
    for name in xs:
        x, d = torch.cat(xs[name]), torch.cat(ds[name])
        if len(x):
            parameter, _, number = name.rpartition(".")
            grad = of_parameters[parameter][int(number)] / units
            grad = grad if grad.shape == (d.shape[1], x.shape[1]) else grad.T
            torch.testing.assert_close(d.T @ x / units, grad)
            found[name] = {"grad": grad, "input_cov": x.T @ x / len(x), "output_fisher": d.T @ d / len(d)}
    return found


def _dense(module: Any, name: str, seen: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Tensor]:
    """The module's forward, all experts on all tokens."""

    def product(x: Tensor, parameter: str, number: int, asked: Tensor) -> Tensor:
        weight = getattr(module, parameter)[number]
        y = x @ (weight if module.is_transposed else weight.T)
        seen[f"{name}.{parameter}.{number}"] = x, y, asked
        return y + getattr(module, f"{parameter}_bias")[number] if module.has_bias else y

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for number in range(module.num_experts):
            asked = (index == number).any(-1)
            share = (weights * (index == number)).sum(-1, keepdim=True)
            inner = module._apply_gate(product(hidden, "gate_up_proj", number, asked))
            out = out + share * product(inner, "down_proj", number, asked)
        return out

    return forward
