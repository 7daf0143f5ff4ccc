"""What a method is: what it reads, its numbers, its function.

Standard library only: a config is loaded without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from lora_da.errors import LoraDAError
from lora_da.needs import Averaging, FirstStep, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from lora_da.methods.common import LayerSpec, LoraFactors
    from lora_da.statistics import LayerStatistics


@dataclass(frozen=True)
class Preset:
    """What a named variant of LoRA-DA sets. The numbers can be overridden one by one in `LoraDAConfig`."""

    averaging: Averaging
    variance_weight: float
    damping: float
    gamma: float
    full_fisher_up_to: int
    relative_damping: bool  # damping times the mean diagonal, or an absolute number
    normalize_step: bool  # divide D by its largest singular value
    match_input_energy: bool  # scale lora_A to plain LoRA's tr(A Z Aᵀ), or share 1/√gamma with lora_B
    first_step: FirstStep = "gamma"
    chosen_rows: float = 1.0  # share of lora_A's rows that are solved for; the others are random
    match_rate: bool = False  # enlarge lora_A where the learning rate is too small for a measured first step

    def n_chosen(self, rank: int) -> int:
        """How many of so many rows are solved for."""
        return max(1, math.ceil(round(self.chosen_rows * rank, 6)))  # 0.28 × 25 is above 7 in floating point


@dataclass(frozen=True)
class Numbers:
    """What a method other than LoRA-DA is set by; None where it has no such number."""

    full_fisher_up_to: ClassVar[int] = 0

    averaging: Averaging | None = None
    damping: float | None = None
    gamma: float | None = None
    first_step: FirstStep | None = None
    match_rate: bool | None = None


@dataclass(frozen=True)
class Method:
    """An initialisation on the statistics of a layer.

    Args:
        name: as users write it.
        needs: what it reads; its numbers may ask for more.
        presets: the numbers that it is set by, by the name of a variant; `default` alone where there are no others.
        solve: one layer's factors from its statistics, what else is known of it, and the numbers.
        prepare: what it makes of Z and the numbers, once for all layers that read the same input; nothing if None.
        population: whether it asks for the size of the training set.
        float32_up_to: inputs of the widest layer that is surely solved in float32 where it is set by these numbers;
            all layers are if None.

    Raises:
        LoraDAError: there is no `default` among the presets.
    """

    name: str
    needs: Needs
    presets: Mapping[str, Preset | Numbers]
    solve: Callable[[LayerStatistics, LayerSpec, Any], LoraFactors]
    prepare: Callable[[Tensor | None, Any], Any] | None = None
    population: bool = False
    float32_up_to: Callable[[Any], float] | None = None

    def __post_init__(self) -> None:
        if "default" not in self.presets:
            raise LoraDAError(f"method {self.name} has no preset `default` among {', '.join(self.presets) or 'none'}")

    @property
    def settable(self) -> list[str]:
        """The names of the numbers that it has a use for."""
        numbers = self.presets["default"]
        return [f.name for f in fields(numbers) if getattr(numbers, f.name) is not None]

    def needs_with(self, numbers: Preset | Numbers) -> Needs:
        """What it reads where it is set by these numbers."""
        widest = max(self.needs.full_fisher_up_to, numbers.full_fisher_up_to)
        float32_up_to = self.needs.float32_up_to if self.float32_up_to is None else self.float32_up_to(numbers)
        return replace(
            self.needs,
            full_fisher_up_to=widest,
            averaging=numbers.averaging or "tokens",
            float32_up_to=float32_up_to,
        )


def function_of(module: str, name: str) -> Callable[..., Any]:
    """A function of a file in this folder, which is imported when it is first called."""

    def call(*args: Any) -> Any:
        return getattr(import_module(f"lora_da.methods.{module}"), name)(*args)

    return call
