"""The oracle of tasks other than causal language modelling: one unit of the loss at a time, in float64, unpadded.

A unit is what has a loss of its own: a row with its labels, a source with its target, a pair. G is autograd's own
gradient in the weight; x and y come from hooks of this file. Shares no code with what it judges.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from oracle import Averaging, OracleStatistics
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Unit = dict[str, Any]
Loss = Callable[[nn.Module, Unit], Tensor]  # the losses (T,) of a unit's loss tokens, in float64


@torch.enable_grad()
def statistics_of(
    model: nn.Module, units: Sequence[Unit], losses: Loss, layers: Sequence[str], averaging: Averaging
) -> dict[str, OracleStatistics]:
    """G, Z and Y of each named layer over all that it is called with.

    Unit s has losses of T_s loss tokens; l_s is their mean ("samples") or their sum ("tokens"), and G is the sum of
    dl_s/dW over the number of units, or over sum_s T_s. Units must have no padding: every row of x counts.
    """
    twin = copy.deepcopy(model).double().eval().requires_grad_(True)
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def remember(name: str, args: tuple[Any, ...], y: Tensor) -> Tensor:
        calls[name].append((args[0].detach(), y))
        return y.clone()  # the model may change it in place, as Longformer does

    for name in layers:
        twin.get_submodule(name).register_forward_hook(lambda _module, args, y, name=name: remember(name, args, y))
    weights = [twin.get_submodule(name).weight for name in layers]
    grads = [torch.zeros_like(weight) for weight in weights]
    xs: dict[str, list[Tensor]] = {name: [] for name in layers}
    ds: dict[str, list[Tensor]] = {name: [] for name in layers}
    n_loss = 0
    for unit in units:
        for seen in calls.values():
            seen.clear()
        of_tokens = losses(twin, unit)
        n_loss += len(of_tokens)
        loss = of_tokens.mean() if averaging == "samples" else of_tokens.sum()
        outputs = [y for name in layers for _, y in calls[name]]
        found = torch.autograd.grad(loss, [*weights, *outputs])
        grads = [total + part for total, part in zip(grads, found, strict=False)]
        of_outputs = iter(found[len(weights) :])
        for name in layers:
            for x, _ in calls[name]:
                xs[name].append(x.flatten(0, -2))
                ds[name].append(next(of_outputs).flatten(0, -2))
    statistics = {}
    for name, grad in zip(layers, grads, strict=True):
        x, d = torch.cat(xs[name]), torch.cat(ds[name])
        statistics[name] = OracleStatistics(
            grad=(grad.T if isinstance(twin.get_submodule(name), Conv1D) else grad)
            / (len(units) if averaging == "samples" else n_loss),
            input_cov=x.T @ x / len(x),
            output_fisher=d.T @ d / len(d),
            n_tokens=len(x),
            n_samples=len(units),
            n_loss_tokens=n_loss,
        )
    return statistics


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of each label (T,) that is not -100, from logits (T, k)."""
    where = (labels != -100).nonzero().flatten()
    return -logits.double().log_softmax(-1)[where, labels[where]]
