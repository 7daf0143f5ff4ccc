"""Orthonormal blocks out of one small Cholesky factorisation each.

A QR of a few dozen long columns is a chain of small launches; CholeskyQR (Stathopoulos and Wu, 2002) is two products
and a triangular solve. With its Gram matrix in float64 it loses orthogonality by eps · κ (Yamazaki, Tomov and Dongarra,
2015), at most 1e-3 here; a Newton–Schulz step (Björck and Bowie, 1971), products alone, squares that.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of a column's norm: the least distance from the span of those before it that CholeskyQR is trusted with.
MIN_DISTANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


def orthonormal_to(q: Tensor, new: Tensor) -> Tensor:
    """An orthonormal block (n, b) spanning what `new` (n, b) adds to the orthonormal `q` (n, m), m ≥ 0.

    Where `new` adds too little in some direction, `qr` fills the block up with arbitrary ones.
    """
    new = new / torch.linalg.vector_norm(new, dim=0).clamp_min(torch.finfo(new.dtype).tiny)
    projected = new - q @ (q.T @ new)
    tall = projected.double()
    upper, info = torch.linalg.cholesky_ex(tall.T @ tall, upper=True)
    nearest = torch.where(info == 0, upper.diagonal().min(), 0.0)
    if not nearest >= MIN_DISTANCE[new.dtype]:
        return _by_qr(q, projected)
    block = torch.linalg.solve_triangular(upper.to(new.dtype), projected, upper=True, left=False)
    block = block - q @ (q.T @ block)  # once is not enough in floating point
    return 1.5 * block - 0.5 * block @ (block.T @ block)


def _by_qr(q: Tensor, new: Tensor) -> Tensor:
    """Projected and orthonormalised twice: once is not enough where `new` adds almost nothing."""
    for _ in range(2):
        new = torch.linalg.qr(new - q @ (q.T @ new)).Q
    return new
