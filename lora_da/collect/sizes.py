"""Sizes of a model's layers that decide what running it takes, adapters left out: they are off meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_da.model.sharding import shape

SCALES = 0.2  # bytes of a number of a 4-bit weight: scales of 64 numbers each in float32, twice quantised and made anew

# Of each input and output of its linear layers, a block keeps so much for its backward where that was not measured:
# norms, rotary embeddings, attention and the activation function's own input are more, inputs that layers share less.
# Beside that, in 16 bits, two norms keep their input in float32. It is 0.97 to 1.25 times what gated blocks keep.
ACTIVATIONS, NORMS = 1.2, 2 * 4


@dataclass(frozen=True)
class BlockSizes:
    """What is in a block.

    Args:
        widths: inputs and outputs by layer.
        stacks: parameters that hold the matrices of all experts, as they are stored.
        asked: experts that a token is routed to; None if it is not known.
    """

    widths: Mapping[nn.Module, tuple[int, int]]
    stacks: Sequence[nn.Parameter]
    asked: int | None

    @classmethod
    def of(cls, block: nn.Module, config: Any) -> BlockSizes:
        """Look at a block, or a whole model, of this configuration."""
        asked = getattr(config.get_text_config(), "num_experts_per_tok", None)
        return cls(_widths_in(block), _stacks_in(block), asked if isinstance(asked, int) else None)

    @property
    def features(self) -> int:
        """Inputs and outputs of its layers, and of the experts that a token is routed to, summed."""
        routed = ((min(self.asked or e, e), i + o) for e, i, o in map(shape, self.stacks))
        return sum(map(sum, self.widths.values())) + sum(experts * width for experts, width in routed)

    @property
    def widest(self) -> int:
        """Inputs and outputs of the layer or the expert that has most of them."""
        return max([i + o for i, o in self.widths.values()] + [sum(shape(p)[1:]) for p in self.stacks], default=0)

    def kept_weights(self, dtype: torch.dtype, in_autocast: torch.dtype | None) -> int:
        """Bytes of the dense weights that the backward may hold on to: where a class of its own dequantises and
        multiplies by plain autograd, as GPTQ's and AWQ's do, and where autocast casts it, until the layer's backward.
        """
        layers = (
            i
            * o
            * (cast_bytes(layer.weight, in_autocast) if isinstance(layer, (nn.Linear, Conv1D)) else dtype.itemsize)
            for layer, (i, o) in self.widths.items()
        )
        return sum(layers) + sum(cast_bytes(stack, in_autocast) * math.prod(shape(stack)) for stack in self.stacks)

    def dequantised_weight(self, dtype: torch.dtype) -> int:
        """Bytes of the largest weight that is made dense to be multiplied with, with its scales; 0 where all are."""
        quantised = (i * o for layer, (i, o) in self.widths.items() if not _is_dense(layer, i, o))
        return int((dtype.itemsize + SCALES) * max(quantised, default=0))


def _widths_in(module: nn.Module) -> dict[nn.Module, tuple[int, int]]:
    """Inputs and outputs of layers that have one width each: `nn.Linear` and what takes its place, quantised."""
    found = {}
    for layer in _without_adapters(module):
        if isinstance(layer, Conv1D):
            found[layer] = shape(layer.weight)[0], shape(layer.weight)[1]
        elif not any(layer.children()):
            widths = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
            if isinstance(widths[0], int) and isinstance(widths[1], int):
                found[layer] = widths[0], widths[1]
    return found


def _stacks_in(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that hold the matrices of all experts."""
    holders = [m for m in module.modules() if isinstance(getattr(m, "num_experts", None), int)]
    parameters = [(m.num_experts, parameter) for m in holders for parameter in m.parameters(recurse=False)]
    return [p for n, p in parameters if len(shape(p)) == 3 and shape(p)[0] == n]


def _without_adapters(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all inside it, but for what adapters have put around and beside its layers."""
    wrapped = getattr(module, "base_layer", None)
    if isinstance(wrapped, nn.Module):
        yield from _without_adapters(wrapped)
        return
    yield module
    for child in module.children():
        yield from _without_adapters(child)


def kept_by_rule(features: int, width: int, itemsize: int) -> float:
    """Bytes that a block is taken to keep of a token for each of its `features`, at a width of the hidden state."""
    return ACTIVATIONS * itemsize + (NORMS * width / max(1, features) if itemsize < 4 else 0.0)


def _kept_weight(layer: nn.Module, dtype: torch.dtype, in_autocast: torch.dtype | None) -> int:
    return cast_bytes(layer.weight, in_autocast) if isinstance(layer, (nn.Linear, Conv1D)) else dtype.itemsize


def _is_dense(layer: nn.Module, i: int, o: int) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point() and shape(weight) in ((o, i), (i, o))


def cast_bytes(weight: Any, in_autocast: torch.dtype | None) -> int:
    """Bytes of a number in the copy of a weight that autocast makes; 0 where it makes none."""
    if in_autocast is None or not isinstance(weight, Tensor) or weight.dtype in (in_autocast, torch.float64):
        return 0
    return in_autocast.itemsize if weight.is_floating_point() else 0


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What products on a device are computed in by autocast; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def eager_heads(config: Any) -> int:
    """Attention heads of a model that computes attention step by step; 0 if it does not, or they are not known."""
    heads = getattr(config.get_text_config(), "num_attention_heads", 0)
    return heads if config._attn_implementation == "eager" and isinstance(heads, int) else 0
