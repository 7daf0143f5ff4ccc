"""From a filled collector to the factors of its layers, by the method that was chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_da.adapter import AdapterLayer
from lora_da.collect.collector import Collector
from lora_da.config import LoraDAConfig, Preset
from lora_da.errors import LoraDAError
from lora_da.memory import is_out_of_memory
from lora_da.methods.cntlora import cntlora, find_shift
from lora_da.methods.common import LoraFactors, UnsolvableLayer
from lora_da.methods.filet import filet
from lora_da.methods.lora_da import damp_input, lora_da
from lora_da.methods.lora_ga import lora_ga
from lora_da.methods.lora_one import lora_one
from lora_da.model.weights import dense_weight
from lora_da.needs import NEEDS
from lora_da.samples.draw import InitData
from lora_da.statistics import LayerStatistics, full_float32

logger = logging.getLogger(__name__)

T = TypeVar("T")


class LayerSolver:
    """Solves one layer after the other; layers that share an input follow each other and share what comes of its Z."""

    def __init__(self, collector: Collector, data: InitData, config: LoraDAConfig) -> None:
        self._collector, self._data, self._method = collector, data, config.method
        self._numbers = config.numbers()
        # The gradient is averaged over, and N counted in, samples or loss tokens.
        self._n_units = data.n_loss_tokens if self._numbers.averaging == "tokens" else data.n_samples
        self._needs = NEEDS[config.method]
        self._of_input: tuple[str, Any] | None = None

    def weight(self, layer: AdapterLayer) -> Tensor | None:
        """W, (o, i), dequantised on its device, for a method that reads it; all processes ask where it is sharded.

        Raises:
            LoraDAError: it does not fit in memory.
        """
        if not self._needs.weight:
            return None
        try:
            return dense_weight(layer.base)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise LoraDAError(
                f"the weight of layer {layer.name} does not fit in memory beside what was collected; set a smaller "
                "`memory_budget`, so that fewer layers are served at a time"
            ) from error

    def solve(self, layer: AdapterLayer) -> LoraFactors | str:
        """The layer's factors, or why it has none. Its statistics are used up.

        Raises:
            LoraDAError: the layer was never seen, or no gradient reached it; or it does not fit in the CPU's memory.
        """
        weight = self.weight(layer)
        if layer.name in self._collector.misshapen:
            shape = self._collector.misshapen[layer.name]
            return (
                f"its input has shape {shape}, not one vector per token of the batch (an expert or a vision layer?); "
                "take such layers out of target_modules (Axolotl: lora_target_modules)"
            )
        statistics = self._collector.statistics(layer.name, self._n_units)
        if statistics is None:
            what = "a gradient" if self._needs.sums.backward else "a token"
            raise LoraDAError(
                f"layer {layer.name} was never reached by {what}: its forward is replaced (a fused kernel?) or it "
                "takes no part in the loss; switch the kernel off or take the layer out of target_modules"
            )
        try:
            # whatever the trainer has set for its own products
            with full_float32(), torch.autocast(statistics.device.type, enabled=False):
                factors = self._factors(layer, statistics, weight)
        except (UnsolvableLayer, torch.linalg.LinAlgError) as error:  # the latter where LAPACK does not converge
            return str(error)
        if not layer.can_hold(factors.lora_A, factors.lora_B):
            gamma = " or set a larger gamma" if self._numbers.gamma is not None else ""
            return f"its solution overflows {layer.lora_A.dtype}; keep adapters in float32{gamma}"
        # In the parameters' own dtypes and on the CPU: those of all layers are memory that no one has counted.
        return replace(
            factors,
            lora_A=factors.lora_A.to(layer.lora_A.dtype).cpu(),
            lora_B=factors.lora_B.to(layer.lora_B.dtype).cpu(),
        )

    def _factors(self, layer: AdapterLayer, statistics: LayerStatistics, weight: Tensor | None) -> LoraFactors:
        """Solved on the layer's device, or on the CPU where it does not fit there or there is no float64 (MPS)."""
        device = statistics.device
        if device.type != "mps":
            try:
                return self._factors_on(device, layer, statistics, weight)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if device.type == "cpu":
                    raise LoraDAError(f"layer {layer.name} does not fit in the CPU's memory to be solved") from error
        self._of_input = None
        logger.info("LoRA-DA: layer %s is solved on the CPU, %s cannot", layer.name, device)
        return self._factors_on(torch.device("cpu"), layer, statistics, weight)

    def _factors_on(
        self, device: torch.device, layer: AdapterLayer, statistics: LayerStatistics, weight: Tensor | None
    ) -> LoraFactors:
        statistics = statistics.to(device)
        if isinstance(self._numbers, Preset):
            return self._lora_da(layer, statistics, self._numbers)
        weight = None if weight is None else weight.to(device)
        return self._other_method(layer, statistics, weight)

    def _lora_da(self, layer: AdapterLayer, statistics: LayerStatistics, preset: Preset) -> LoraFactors:
        assert self._data.population_size is not None
        population = float(self._data.population_size)
        if preset.averaging == "tokens":
            population *= self._data.n_loss_tokens / self._data.n_samples
        return lora_da(
            statistics,
            layer.rank,
            population=population,
            variance_weight=preset.variance_weight,
            damping=preset.damping,
            relative_damping=preset.relative_damping,
            gamma=preset.gamma,
            normalize_step=preset.normalize_step,
            plain_variance=layer.plain_variance if preset.match_input_energy else None,
            damped_input=self._once_for_its_input(
                layer, statistics, lambda cov: damp_input(cov, preset.damping, preset.relative_damping)
            ),
        )

    def _other_method(self, layer: AdapterLayer, statistics: LayerStatistics, weight: Tensor | None) -> LoraFactors:
        rank, plain_variance = layer.rank, layer.plain_variance
        # What is set of a method's numbers is what it takes, but for how its gradient is averaged.
        numbers = {k: v for k, v in vars(self._numbers).items() if v is not None and k != "averaging"}
        match self._method:
            case "lora_one":
                return lora_one(statistics, rank, **numbers)
            case "lora_ga":
                return lora_ga(statistics, rank, **numbers)
            case "filet":
                return filet(statistics, weight, rank, plain_variance=plain_variance, **numbers)
            case "cntlora":
                shift = self._once_for_its_input(layer, statistics, lambda cov: find_shift(cov, **numbers))
                return cntlora(shift, weight, rank, plain_variance=plain_variance)
        raise LookupError(self._method)

    def _once_for_its_input(
        self, layer: AdapterLayer, statistics: LayerStatistics, make: Callable[[Tensor | None], T]
    ) -> T:
        """What `make` makes of Z, which is made once for layers that share it."""
        source = f"{self._collector.reads_like(layer.name)} on {statistics.device}"
        if self._of_input is None or self._of_input[0] != source:
            self._of_input = None  # freed before the next one is made
            self._of_input = source, make(statistics.input_cov)
        made: T = self._of_input[1]
        return made
