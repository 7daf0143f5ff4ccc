"""Block Krylov with restarts: the leading Ritz pairs of a symmetric operator, checked by their residual.

A block costs one small factorisation and a look at the residual another, where a `qr` a block and a look at every other
one are a chain of some hundred small launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da.methods.orthonormal import orthonormal_to

BLOCKS = 8  # in the basis before a restart
CHECKED_AT = (6, 8)  # blocks at which the residual is looked at: the layers of a real model are solved at one of them
MAX_RESTARTS = 40
# Of the sum of the wanted eigenvalues: where so little is left to gain, float32 stops. The vectors of nearly equal
# eigenvalues take hundreds of blocks to settle, and which of them are taken then makes no difference.
GAIN = {torch.float64: 0.0, torch.float32: 1e-5}


@dataclass(frozen=True)
class Eigenpairs:
    """`vectors` (n, k) orthonormal, `values` (k,) falling, `residual` ‖A V − V Λ‖_F / max|Λ|."""

    values: Tensor
    vectors: Tensor
    residual: float


@dataclass(frozen=True)
class Operator:
    """A symmetric operator A on blocks of vectors (n, b).

    Args:
        half: (n, b) → (m, b), of which `whole` makes A times the block.
        projected: Vᵀ A V from an orthonormal block V (n, b) and its half.
    """

    half: Callable[[Tensor], Tensor]
    whole: Callable[[Tensor], Tensor]
    projected: Callable[[Tensor, Tensor], Tensor]


def iterate(operator: Operator, start: Tensor, k: int, tolerance: float) -> Eigenpairs | None:
    """The largest eigenpairs, as many as `start` (n, b) has columns; the residual is that of the first k, the others
    have one of their own. None where it does not come down to `tolerance`."""
    n, width = start.shape
    nothing, basis = start[:, :0], start
    q = start.new_empty(n, BLOCKS * width)
    for _ in range(MAX_RESTARTS):
        basis = orthonormal_to(nothing, basis)
        q[:, :width], halves = basis, [operator.half(basis)]
        for blocks in range(1, BLOCKS + 1):
            known = q[:, : blocks * width]
            if blocks in CHECKED_AT:
                pairs, settled = _rayleigh_ritz(operator, known, torch.cat(halves, 1), width, k)
                if pairs.residual <= tolerance or settled:
                    return pairs
            if blocks < BLOCKS:
                block = orthonormal_to(known, operator.whole(halves[-1]))
                q[:, blocks * width : (blocks + 1) * width] = block
                halves.append(operator.half(block))
        basis = pairs.vectors
    return None


def dense(operator: Operator, like: Tensor, k: int) -> Eigenpairs:
    """The same from the operator as a matrix, for a block `like` the start."""
    n, width = like.shape
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    return _rayleigh_ritz(operator, eye, operator.half(eye), width, k)[0]


def _rayleigh_ritz(operator: Operator, q: Tensor, halves: Tensor, width: int, k: int) -> tuple[Eigenpairs, bool]:
    """The best `width` pairs in the span of the orthonormal q (n, m), given its halves; and whether the first k leave
    next to nothing to gain."""
    projected = operator.projected(q, halves)
    values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
    values, rotation = values.flip(0)[:width].to(q.dtype), rotation.flip(1)[:, :width].to(q.dtype)
    vectors, wanted = q @ rotation, values[:k]
    errors = torch.linalg.vector_norm(operator.whole(halves @ rotation[:, :k]) - vectors[:, :k] * wanted, dim=0)
    scale = wanted.abs().max().clamp_min(torch.finfo(q.dtype).tiny)
    residual = (torch.linalg.vector_norm(errors) / scale).item()
    return Eigenpairs(values, vectors, residual), _left(values / scale, errors / scale, k) <= GAIN[q.dtype]


def _left(values: Tensor, errors: Tensor, k: int) -> float:
    """How much of the sum of the first k eigenvalues is left to gain, by their residuals (k,).

    A vector at the angle φ to the right one, towards one whose eigenvalue is lower by δ, has the residual φ·δ, and φ²·δ
    is left to gain, which is never more than φ·δ.
    """
    if len(values) == k:
        return torch.inf
    gaps = (values[:k] - values[k]).clamp_min(torch.finfo(values.dtype).tiny)
    left = torch.minimum(errors, errors * (errors / gaps)).sum() / values[:k].sum()
    return left.item() if values[:k].sum() > 0 else torch.inf
