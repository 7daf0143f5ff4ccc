"""What a method reads of a layer. Standard library only: a config is loaded without torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Averaging: TypeAlias = Literal["samples", "tokens"]
FirstStep: TypeAlias = Literal["measured", "gamma", "none"]


@dataclass(frozen=True)
class Sums:
    """Which sums over the samples are read; the others are neither computed nor held.

    Args:
        grad: Σ d xᵀ. input_cov: Σ x xᵀ. output_fisher: Σ d dᵀ, or its diagonal.
    """

    grad: bool = True
    input_cov: bool = True
    output_fisher: bool = True

    @property
    def backward(self) -> bool:
        """Whether any of them needs d, and so a backward pass."""
        return self.grad or self.output_fisher


@dataclass(frozen=True)
class Needs:
    """What is read of every layer.

    Args:
        sums: taken over the samples.
        solving: bytes that solving a layer of i inputs and o outputs in float32 takes beside them.
        solving_fisher: bytes that a full Fisher of o outputs takes in addition.
        weight: whether the layer's weight is read, dequantised, one layer at a time.
        full_fisher_up_to: widest layer output whose Fisher is kept in full and not as its diagonal; infinite where
            nothing less will do.
        averaging: what d is the gradient of: a loss token's share of the mean over all `tokens`, or over its own
            sample's, so that all `samples` weigh the same.
        float32_up_to: inputs of the widest layer that is surely solved in float32; wider ones may take float64.
    """

    sums: Sums
    solving: Callable[[int, int], int]
    weight: bool = False
    full_fisher_up_to: float = 0
    averaging: Averaging = "tokens"
    solving_fisher: Callable[[int], int] = lambda o: 0
    float32_up_to: float = math.inf

    def solving_bytes(self, in_features: int, out_features: int) -> int:
        """What solving a layer takes at most, in the precision that it may need."""
        fisher = self.solving_fisher(out_features) if self.full_fisher(out_features) else 0
        return self.solving(in_features, out_features) * (1 if in_features <= self.float32_up_to else 2) + fisher

    def full_fisher(self, out_features: int) -> bool:
        """Whether the Fisher of so many outputs is kept in full."""
        return out_features <= self.full_fisher_up_to
