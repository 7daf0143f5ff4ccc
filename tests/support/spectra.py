"""Statistics of a layer with the spectra that real ones have, and the solution that a dense float64 solver finds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_da.statistics import LayerStatistics


def orthonormal(n: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q


def realistic(o: int, i: int, condition: float, decay: float, channels: float = 15.0) -> LayerStatistics:
    """In float32: Z with eigenvalues spread evenly over its condition number, beside three channels as many times as
    large as the others; G with singular values that fall as 1/kᵈᵉᶜᵃʸ, in the inputs that Z has; Y over five decades."""
    g = torch.Generator().manual_seed(0)
    scale = torch.exp(0.5 * torch.randn(i, generator=g, dtype=torch.float64))
    scale[torch.randint(i, (3,), generator=g)] *= channels
    values = torch.logspace(0, -math.log10(condition), i, dtype=torch.float64)
    root = scale.unsqueeze(1) * orthonormal(i, i, g) * values.sqrt()
    falling = torch.arange(1, min(i, o) + 1, dtype=torch.float64) ** -decay
    inputs = torch.randn(i, len(falling), generator=g, dtype=torch.float64)
    grad = 1e-3 * (orthonormal(o, len(falling), g) * falling) @ (root @ inputs).T
    fisher = 1e-7 * torch.exp(1.5 * torch.randn(o, generator=g, dtype=torch.float64))
    cov = root @ root.T
    return LayerStatistics(grad.float(), ((cov + cov.T) / 2).float(), fisher.float(), 4000)


def doubled(s: LayerStatistics) -> tuple[Tensor, Tensor, Tensor]:
    assert s.grad is not None and s.input_cov is not None and s.output_fisher is not None
    return s.grad.double(), s.input_cov.double(), s.output_fisher.double()


def share(rows: Tensor, direction: Tensor) -> float:
    """What share of ‖D‖²_F, D (i, o), lies in the span of the rows (r, i)."""
    basis = torch.linalg.qr(rows.double().T).Q
    return ((basis.T @ direction).square().sum() / direction.square().sum()).item()
