"""Which layers a method can serve, and the factors of one layer after the other from what was collected of them."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_da.adapter import Adapter, AdapterLayer, describe_left
from lora_da.collect.handover import Observed
from lora_da.errors import LoraDAError
from lora_da.memory import is_out_of_memory
from lora_da.methods.common import LayerSpec, LoraFactors, UnsolvableLayer
from lora_da.methods.method import Method, Numbers, Preset
from lora_da.products import full_float32
from lora_da.samples.draw import InitData
from lora_da.statistics import NotServed

logger = logging.getLogger(__name__)

# Outputs for which a method that needs the full output Fisher is offered: above, its o² float32 numbers are 4 GiB and
# more, as those of a language-model head's are.
WIDEST_FULL_FISHER = 32768


def servable(adapter: Adapter, method: Method) -> Adapter:
    """The adapter with the layers that the method cannot serve among those left.

    Raises:
        LoraDAError: there is no other.
    """
    left = dict(adapter.left)
    if math.isinf(method.needs.full_fisher_up_to):
        left |= {
            a.name: f"method {method.name} needs its full output Fisher, {a.out_features:,} × {a.out_features:,}"
            for a in adapter.layers
            if a.out_features > WIDEST_FULL_FISHER
        }
    if method.needs.weight:
        # the smallest of each kind: it is dequantised to see whether it can be
        kinds = {_kind(a): a for a in sorted(adapter.layers, key=lambda a: -a.in_features * a.out_features)}
        unreadable = {kind for kind, layer in kinds.items() if layer.weight() is None}
        left |= {
            a.name: f"method {method.name} needs its weight, which PEFT cannot dequantise"
            for a in adapter.layers
            if _kind(a) in unreadable
        }
    layers = [a for a in adapter.layers if a.name not in left]
    if not layers:
        raise LoraDAError(f"{describe_left(left)}; use another method")
    return replace(adapter, layers=layers, left=left)


def _kind(layer: AdapterLayer) -> tuple[type, type]:
    """Layers of a kind hold their weights alike."""
    return type(layer.base), type(getattr(layer.base, "weight", None))


class LayerSolver:
    """Solves one layer after the other. Layers that share an input follow each other and share what comes of its Z.

    Args:
        method: what solves.
        numbers: that it is set by.
        data: the init samples.
    """

    def __init__(self, method: Method, numbers: Preset | Numbers, data: InitData) -> None:
        self._method, self._numbers = method, numbers
        self._population: float | None = None
        if method.population:  # N is counted in what the gradient is averaged over, samples or loss tokens
            assert data.population_size is not None, "a method that asks for it gets it"
            by_tokens = numbers.averaging == "tokens"
            self._population = float(data.population_size)
            self._population *= data.n_loss_tokens / data.n_samples if by_tokens else 1.0
        self._prepared: tuple[str, Any] | None = None  # of which input, and what
        self._moved = False  # whether a layer was solved on the CPU for want of room elsewhere, and a warning said so

    def solve(self, layer: AdapterLayer, observed: Observed) -> LoraFactors | NotServed:
        """The layer's factors, or why it has none. Its statistics may be used up, but for Z.

        Raises:
            LoraDAError: it does not fit in the CPU's memory.
        """
        try:
            # whatever the trainer has set for its own products
            with full_float32(), torch.autocast(observed.statistics.device.type, enabled=False):
                factors = self._factors(layer, observed)
        except (UnsolvableLayer, torch.linalg.LinAlgError) as error:  # the latter where LAPACK does not converge
            return NotServed(str(error))
        finally:
            if observed.is_last_reader:
                self._prepared = None
        if not layer.can_hold(factors.lora_A, factors.lora_B):
            gamma = " or set a larger gamma" if self._numbers.gamma is not None else ""
            return NotServed(f"its solution overflows {layer.lora_A.dtype}; keep adapters in float32{gamma}")
        # In the parameters' own dtypes and on the CPU: those of all layers are memory that no one has counted.
        return replace(
            factors,
            lora_A=factors.lora_A.to(layer.lora_A.dtype).cpu(),
            lora_B=factors.lora_B.to(layer.lora_B.dtype).cpu(),
        )

    def _factors(self, layer: AdapterLayer, observed: Observed) -> LoraFactors:
        """Solved on the layer's device, or on the CPU where it does not fit there or there is no float64 (MPS)."""
        device = observed.statistics.device
        if device.type != "mps":
            try:
                return self._factors_on(device, layer, observed)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if device.type == "cpu":
                    raise LoraDAError(f"layer {layer.name} does not fit in the CPU's memory to be solved") from error
        self._prepared = None
        logger.log(
            logging.INFO if self._moved or device.type == "mps" else logging.WARNING,
            "LoRA-DA: layer %s is solved on the CPU, which may take minutes: %s %s",
            *(layer.name, device, "has no float64" if device.type == "mps" else "has no room for it"),
        )
        self._moved = True
        return self._factors_on(torch.device("cpu"), layer, observed)

    def _factors_on(self, device: torch.device, layer: AdapterLayer, observed: Observed) -> LoraFactors:
        statistics = observed.statistics.to(device)
        spec = LayerSpec(
            name=layer.name,
            rank=layer.rank,
            plain_variance=layer.plain_variance,
            population=self._population,
            weight=None if observed.weight is None else observed.weight.to(device),
            prepared=self._prepared_of(statistics.input_cov, f"{observed.reads_like} on {statistics.device}"),
        )
        return self._method.solve(statistics, spec, self._numbers)

    def _prepared_of(self, input_cov: Tensor | None, source: str) -> Any:
        """What the method makes of Z, once for layers that share it."""
        if self._method.prepare is None:
            return None
        if self._prepared is None or self._prepared[0] != source:
            self._prepared = None  # freed before the next one is made
            self._prepared = source, self._method.prepare(input_cov, self._numbers)
        return self._prepared[1]
