"""Adapters at the first step, and how far one is from another."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback


class FirstStep(TrainerCallback):
    """Copies the adapter before the first step. List it after the initializer."""

    def __init__(self) -> None:
        self.adapter: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.adapter = self.adapter or adapter_of(model)


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU in float32, by the names that a saved adapter has."""
    named = ((name.replace(".default", ""), p) for name, p in model.named_parameters() if "lora_" in name)
    return {name: p.detach().float().cpu().clone() for name, p in named}


def distances(adapter: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """How far lora_B·lora_A of each layer is from the truth's, relative to its size.

    Raises:
        ValueError: the layers are not the same.
    """
    if set(adapter) != set(truth):
        raise ValueError(f"layers are not the truth's: {sorted(set(adapter) ^ set(truth))[:4]}")
    found = {}
    for name in (name for name in truth if "lora_A" in name):
        one, other = (s[name.replace("lora_A", "lora_B")] @ s[name] for s in (adapter, truth))
        found[name] = ((one - other).norm() / other.norm()).item()
    return found


def quantiles(found: Mapping[str, float]) -> dict[str, float]:
    """Sum up over the layers."""
    ascending = sorted(found.values())
    most = ascending[round(0.9 * (len(ascending) - 1))]
    return {"median_difference": median(ascending), "ninth_tenth_difference": most, "worst_difference": ascending[-1]}
