"""The oracle of experts that are slices of one parameter: the statistics of each, in float64, every token kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from models import IGNORED, Document, batches
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

PARAMETERS = ["gate_up_proj", "down_proj"]


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
