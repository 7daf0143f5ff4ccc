"""The methods on one layer's statistics, set by plain numbers as tests write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import lora_da.methods.cntlora
import lora_da.methods.filet
import lora_da.methods.lora_da
import lora_da.methods.lora_ga
import lora_da.methods.lora_one
from lora_da.methods.cntlora import DomainShift
from lora_da.methods.common import LayerSpec, LoraFactors
from lora_da.methods.lora_da import DampedInput
from lora_da.methods.method import Numbers, Preset
from lora_da.statistics import LayerStatistics

Solve = Callable[[LayerStatistics, LayerSpec, Any], LoraFactors]


def preset(**numbers: Any) -> Preset:
    """A preset of these numbers; what does not concern a single layer is of no effect here."""
    unset = {"variance_weight": 1.0, "gamma": 1.0, "normalize_step": True, "match_input_energy": False}
    return Preset(**{"averaging": "tokens", "full_fisher_up_to": 0, **unset, **numbers})


def spec(
    rank: int,
    plain_variance: float = 0.0,
    population: float | None = None,
    weight: Tensor | None = None,
    prepared: Any = None,
) -> LayerSpec:
    return LayerSpec("layer", rank, plain_variance, population, weight, prepared)


def damp_input(cov: Tensor | None, damping: float, relative_damping: bool) -> DampedInput:
    return lora_da.methods.lora_da.damp_input(cov, preset(damping=damping, relative_damping=relative_damping))


def solve_lora_da(
    statistics: LayerStatistics,
    rank: int,
    population: float,
    plain_variance: float | None = None,
    damped_input: DampedInput | None = None,
    solve: Solve = lora_da.methods.lora_da.lora_da,
    **numbers: Any,
) -> LoraFactors:
    """LoRA-DA, or what is tried in its place; lora_A has plain LoRA's input energy where its variance is given."""
    numbers = preset(match_input_energy=plain_variance is not None, **numbers)
    prepared = damped_input or lora_da.methods.lora_da.damp_input(statistics.input_cov, numbers)
    return solve(statistics, spec(rank, plain_variance or 0.0, population, prepared=prepared), numbers)


def solve_lora_one(statistics: LayerStatistics, rank: int, gamma: float) -> LoraFactors:
    return lora_da.methods.lora_one.lora_one(statistics, spec(rank), Numbers(gamma=gamma))


def solve_lora_ga(statistics: LayerStatistics, rank: int, gamma: float) -> LoraFactors:
    return lora_da.methods.lora_ga.lora_ga(statistics, spec(rank), Numbers(gamma=gamma))


def solve_filet(statistics: LayerStatistics, weight: Tensor, rank: int, plain_variance: float) -> LoraFactors:
    return lora_da.methods.filet.filet(statistics, spec(rank, plain_variance, weight=weight), Numbers())


def find_shift(cov: Tensor, damping: float) -> DomainShift:
    return lora_da.methods.cntlora.find_shift(cov, Numbers(damping=damping))


def solve_cntlora(shift: DomainShift, weight: Tensor, rank: int, plain_variance: float) -> LoraFactors:
    """Solve by what was made of Z; nothing else of the statistics is read."""
    nothing = LayerStatistics(None, shift.cov, None, 1)
    of_layer = spec(rank, plain_variance, weight=weight, prepared=shift)
    return lora_da.methods.cntlora.cntlora(nothing, of_layer, Numbers())
