"""From a filled collector to the factors of its layers."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from lora_da.adapter import AdapterLayer
from lora_da.collect import Collector
from lora_da.config import Preset
from lora_da.data import InitData
from lora_da.errors import LoraDAError
from lora_da.memory import is_out_of_memory
from lora_da.methods.lora_da import DampedInput, LoraFactors, UnsolvableLayer, damp_input, lora_da
from lora_da.statistics import LayerStatistics, full_float32

logger = logging.getLogger(__name__)


class LayerSolver:
    """Solves one layer after the other; layers that share an input follow each other and share its factor."""

    def __init__(self, collector: Collector, data: InitData, preset: Preset) -> None:
        self._collector, self._preset = collector, preset
        # The gradient is averaged over, and N counted in, samples or loss tokens.
        self._n_units, self._population = data.n_samples, float(data.population_size)
        if preset.averaging == "tokens":
            self._n_units = data.n_loss_tokens
            self._population *= data.n_loss_tokens / data.n_samples
        self._input: tuple[str, DampedInput] | None = None

    def solve(self, layer: AdapterLayer) -> LoraFactors | str:
        """The layer's factors, or why it has none. Its statistics are used up.

        Raises:
            LoraDAError: no gradient ever reached the layer.
        """
        if layer.name in self._collector.misshapen:
            shape = self._collector.misshapen[layer.name]
            return (
                f"its input has shape {shape}, not one vector per token of the batch (an expert or a vision layer?); "
                "take such layers out of target_modules (Axolotl: lora_target_modules)"
            )
        statistics = self._collector.statistics(layer.name, self._n_units)
        if statistics is None:
            raise LoraDAError(
                f"layer {layer.name} was never reached by a gradient: its forward is replaced (a fused kernel?) or it "
                "takes no part in the loss; switch the kernel off or take the layer out of target_modules"
            )
        try:
            # whatever the trainer has set for its own products
            with full_float32(), torch.autocast(statistics.grad.device.type, enabled=False):
                factors = self._factors(layer, statistics)
        except (UnsolvableLayer, torch.linalg.LinAlgError) as error:  # the latter where LAPACK does not converge
            return str(error)
        if not layer.can_hold(factors.lora_A, factors.lora_B):
            return f"its solution overflows {layer.lora_A.dtype}; keep adapters in float32 or set a larger gamma"
        # In the parameters' own dtypes and on the CPU: those of all layers are memory that no one has counted.
        return replace(
            factors,
            lora_A=factors.lora_A.to(layer.lora_A.dtype).cpu(),
            lora_B=factors.lora_B.to(layer.lora_B.dtype).cpu(),
        )

    def _factors(self, layer: AdapterLayer, statistics: LayerStatistics) -> LoraFactors:
        """Solved on the layer's device, or on the CPU where it does not fit there or there is no float64 (MPS)."""
        device = statistics.grad.device
        if device.type != "mps":
            try:
                return self._factors_on(device, layer, statistics)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if device.type == "cpu":
                    raise LoraDAError(f"layer {layer.name} does not fit in the CPU's memory to be solved") from error
        self._input = None
        logger.info("LoRA-DA: layer %s is solved on the CPU, %s cannot", layer.name, device)
        return self._factors_on(torch.device("cpu"), layer, statistics)

    def _factors_on(self, device: torch.device, layer: AdapterLayer, statistics: LayerStatistics) -> LoraFactors:
        preset, statistics = self._preset, statistics.to(device)
        return lora_da(
            statistics,
            layer.rank,
            population=self._population,
            variance_weight=preset.variance_weight,
            damping=preset.damping,
            relative_damping=preset.relative_damping,
            gamma=preset.gamma,
            normalize_step=preset.normalize_step,
            plain_variance=layer.plain_variance if preset.match_input_energy else None,
            damped_input=self._damped_input(layer, statistics),
        )

    def _damped_input(self, layer: AdapterLayer, statistics: LayerStatistics) -> DampedInput:
        source = f"{self._collector.reads_like(layer.name)} on {statistics.grad.device}"
        if self._input is None or self._input[0] != source:
            self._input = None  # freed before the next one is made
            damped = damp_input(statistics.input_cov, self._preset.damping, self._preset.relative_damping)
            self._input = source, damped
        return self._input[1]
