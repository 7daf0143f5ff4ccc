"""What was tried in the place of LoRA-DA's solution of a layer, so that trying it again is one line of a sweep.

Each takes what `lora_da.methods.lora_da.lora_da` takes. Those that choose another A start with lora_B = 0, as the
control `zero_B` does, which is what they are to be compared with.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lora_da import solve
from lora_da.methods.common import LoraFactors, start_at_the_base
from lora_da.methods.gradient import decompose_gradient
from lora_da.methods.lora_da import damp_input, lora_da
from lora_da.statistics import LayerStatistics


@contextlib.contextmanager
def tried(name: str | None) -> Iterator[None]:
    """While open, LoRA-DA's layers are solved so; as ever if None.

    Raises:
        ValueError: there is no such candidate.
    """
    if name not in (None, *CANDIDATES):
        raise ValueError(f"candidate is {name!r}; set one of {', '.join(CANDIDATES)}")
    with mock.patch.object(solve, "lora_da", CANDIDATES[name]) if name else contextlib.nullcontext():
        yield


def half_powers(
    statistics: LayerStatistics, rank: int, *, damping: float, plain_variance: float, **_: Any
) -> LoraFactors:
    """Between the gradient and the natural gradient: A spans the left singular vectors of Z^-½ Gᵀ Y^-½."""
    grad, cov, fisher = _double(statistics)
    values, vectors = torch.linalg.eigh(cov)
    values = values.clamp_min(0) + damping * values.mean()
    direction = (vectors * values.rsqrt()) @ (vectors.T @ (grad.T * _damped(fisher, damping).rsqrt()))
    return _start(_left_vectors(direction, rank), cov, plain_variance, len(grad))


def gradient(statistics: LayerStatistics, rank: int, *, plain_variance: float, **_: Any) -> LoraFactors:
    """No Fisher at all: A spans the right singular vectors of G, LoRA-One's and LoRA-GA's, at the default's scale."""
    grad, cov, _fisher = _double(statistics)
    return _start(decompose_gradient(statistics, rank).right, cov, plain_variance, len(grad))


def fisher_metric(
    statistics: LayerStatistics, rank: int, *, damping: float, plain_variance: float, **_: Any
) -> LoraFactors:
    """The rows of A that lower the damped quadratic model the most, orthonormal under Z: A = Uᵀ L⁻¹ for Z = L Lᵀ and U
    the left singular vectors of L⁻¹ Gᵀ Y^-½."""
    grad, cov, fisher = _double(statistics)
    factor = damp_input(cov, damping, relative_damping=True).factor.double()
    whitened = torch.linalg.solve_triangular(factor, grad.T * _damped(fisher, damping).rsqrt(), upper=False)
    directions = torch.linalg.solve_triangular(factor.T, _left_vectors(whitened, rank), upper=True)
    return _start(directions, cov, plain_variance, len(grad))


def slope_matched(statistics: LayerStatistics, rank: int, *, plain_variance: float, **settings: Any) -> LoraFactors:
    """The default, its A scaled so that Adam's first step from lora_B = 0, which lowers the loss by the rate times
    ‖G Aᵀ‖₁ in first order, lowers it as much as plain LoRA's random A is expected to."""
    factors = lora_da(statistics, rank, plain_variance=plain_variance, **settings)
    assert statistics.grad is not None
    grad = statistics.grad.double()
    own = (grad @ factors.lora_A.double().T).abs().sum().item()
    plain = rank * math.sqrt(2 / math.pi * plain_variance) * grad.norm(dim=1).sum().item()
    return _scaled(factors, plain / own)


def half_scale(statistics: LayerStatistics, rank: int, **settings: Any) -> LoraFactors:
    """The default with half its lora_A, and lora_B twice as large."""
    return _scaled(lora_da(statistics, rank, **settings), 0.5)


def double_scale(statistics: LayerStatistics, rank: int, **settings: Any) -> LoraFactors:
    """The default with twice its lora_A, and half its lora_B."""
    return _scaled(lora_da(statistics, rank, **settings), 2.0)


CANDIDATES: dict[str, Callable[..., LoraFactors]] = {
    solution.__name__: solution
    for solution in (half_powers, gradient, fisher_metric, slope_matched, half_scale, double_scale)
}


def _double(statistics: LayerStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """G (o, i), Z (i, i) and the diagonal of Y (o,)."""
    assert statistics.grad is not None and statistics.input_cov is not None and statistics.output_fisher is not None
    return statistics.grad.double(), statistics.input_cov.double(), statistics.output_fisher.double()


def _damped(fisher: Tensor, damping: float) -> Tensor:
    return fisher + damping * fisher.mean()


def _left_vectors(matrix: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]


def _start(directions: Tensor, cov: Tensor, plain_variance: float, out_features: int) -> LoraFactors:
    return LoraFactors(*start_at_the_base(directions, cov, plain_variance, out_features))


def _scaled(factors: LoraFactors, factor: float) -> LoraFactors:
    return replace(factors, lora_A=factors.lora_A * factor, lora_B=factors.lora_B / factor)
