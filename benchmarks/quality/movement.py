"""How an adapter moves while it trains, layer by layer: how far, in how many directions, and whether lora_A turns."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from statistics import median

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from lora_da.model.weights import weight_norm

FIGURES = ("step", "travelled", "effective_rank", "turned", "growth")

Figures = Mapping[str, Mapping[str, float]]  # medians by figure, by the kind of the layers


class Movement:
    """An adapter's movement from where it is when this is made.

    Args:
        model: with one active adapter. Its factors are copied.
    """

    def __init__(self, model: PeftModel) -> None:
        self._name = model.active_adapter
        # Whatever it was started by: `find_adapter` takes those alone that LoRA-DA may start.
        self._layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        self._started = {name: self._factors(layer) for name, layer in self._layers.items()}
        self._norms = {name: weight_norm(layer.get_base_layer()) for name, layer in self._layers.items()}

    def figures(self) -> Figures:
        """What is told of it now, as medians over the layers of one kind (`q_proj`, …):

        step: ‖s·B·A‖_F ÷ ‖W‖_F.
        travelled: ‖s·(B·A − B₀·A₀)‖_F ÷ ‖W‖_F, from the start.
        effective_rank: of B·A, the exponential of the entropy of its singular values over their sum (Roy and
            Vetterli, 2007); 0 while it is zero.
        turned: share of ‖A‖²_F that lies outside the row space of A₀.
        growth: ‖A‖_F ÷ ‖A₀‖_F.
        """
        found: dict[str, dict[str, list[float]]] = {figure: defaultdict(list) for figure in FIGURES}
        for name, layer in self._layers.items():
            kind, norm = name.rpartition(".")[2], self._norms[name]
            now, start = self._factors(layer), self._started[name]
            scale = abs(layer.scaling[self._name]) / norm if norm else math.nan
            values = singular_values(*now)
            apart = singular_values(torch.cat([now[0], start[0]]), torch.cat([now[1], -start[1]], 1))
            basis = torch.linalg.qr(start[0].T)[0]  # (i, r)
            size = now[0].square().sum()
            told = (
                scale * values.norm().item(),
                scale * apart.norm().item(),
                effective_rank(values),
                1 - float((now[0] @ basis).square().sum() / size),
                float((size / start[0].square().sum()).sqrt()),
            )
            for figure, value in zip(FIGURES, told, strict=True):
                found[figure][kind].append(value)
        return {
            figure: {kind: float(f"{median(values):.4g}") for kind, values in kinds.items()}
            for figure, kinds in found.items()
        }

    def _factors(self, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        """Copy lora_A (r, i) and lora_B (o, r), in float64 on the CPU."""
        pair = layer.lora_A[self._name].weight, layer.lora_B[self._name].weight
        a, b = (parameter.detach().to("cpu", torch.float64, copy=True) for parameter in pair)
        return a, b


def singular_values(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Give those of lora_B·lora_A, (r,), without forming it."""
    outer, inner = torch.linalg.qr(lora_B)[1], torch.linalg.qr(lora_A.T)[1]
    return torch.linalg.svdvals(outer @ inner.T)


def effective_rank(values: Tensor) -> float:
    """The exponential of the entropy of singular values over their sum; 0 where all are zero."""
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else 0.0
