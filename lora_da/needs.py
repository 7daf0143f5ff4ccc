"""What each method reads of a layer: which sums over the samples, and whether its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lora_da.adapter import Adapter, AdapterLayer, describe_left
from lora_da.config import LoraDAConfig, Preset
from lora_da.errors import LoraDAError
from lora_da.methods.filet import CANDIDATES
from lora_da.model.weights import dense_weight
from lora_da.statistics import Sums

# Outputs for which a method that needs the full output Fisher is offered: above, its o² float32 numbers are 4 GiB and
# more, as those of a language-model head's are.
WIDEST_FULL_FISHER = 32768


@dataclass(frozen=True)
class Needs:
    """What a method reads of a layer.

    Args:
        sums: taken over the samples.
        solving: bytes that solving a layer of i inputs and o outputs takes beside them.
        weight: whether it reads the layer's weight, dequantised, one layer at a time.
        full_fisher: whether it must have the full output Fisher, whatever the layer's width.
    """

    sums: Sums
    solving: Callable[[int, int], int]
    weight: bool = False
    full_fisher: bool = False


NEEDS = {
    # the damped copy of Z and its factor, D and what it is made of, in float32
    "lora_da": Needs(Sums(), lambda i, o: 4 * (2 * i**2 + 4 * i * o)),
    # Z and Y scaled, W dequantised, in float32 and scaled, and a block of candidates with their products
    "filet": Needs(
        Sums(grad=False),
        lambda i, o: 4 * (i**2 + o**2 + 3 * i * o + 4 * min(i, CANDIDATES) * (i + o)),
        weight=True,
        full_fisher=True,
    ),
    # Z's copy, its eigenvectors and their workspace, W dequantised, scaled and turned, and the residual in float64
    "cntlora": Needs(Sums(grad=False, output_fisher=False), lambda i, o: 4 * (5 * i**2 + 7 * i * o), weight=True),
    # G scaled and in float64
    "lora_one": Needs(Sums(input_cov=False, output_fisher=False), lambda i, o: 4 * 3 * i * o),
    "lora_ga": Needs(Sums(input_cov=False, output_fisher=False), lambda i, o: 4 * 3 * i * o),
}


def full_fisher_layers(config: LoraDAConfig, layers: Sequence[AdapterLayer]) -> frozenset[str]:
    """The names of the layers whose output Fisher is taken in full and not as its diagonal."""
    numbers = config.numbers()
    widest = numbers.full_fisher_up_to if isinstance(numbers, Preset) else 0
    return frozenset(a.name for a in layers if NEEDS[config.method].full_fisher or a.out_features <= widest)


def servable(adapter: Adapter, method: str) -> Adapter:
    """The adapter with the layers that the method cannot serve among those left.

    Raises:
        LoraDAError: there is no other.
    """
    left = dict(adapter.left)
    if NEEDS[method].full_fisher:
        left |= {
            a.name: f"method {method} needs its full output Fisher, {a.out_features:,} × {a.out_features:,}"
            for a in adapter.layers
            if a.out_features > WIDEST_FULL_FISHER
        }
    if NEEDS[method].weight:
        # the smallest of each kind: it is dequantised to see whether it can be
        kinds = {_kind(a): a.base for a in sorted(adapter.layers, key=lambda a: -a.in_features * a.out_features)}
        unreadable = {kind for kind, base in kinds.items() if dense_weight(base) is None}
        left |= {
            a.name: f"method {method} needs its weight, which PEFT cannot dequantise"
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
