"""Leading eigenpairs of a symmetric operator, without forming it: block Krylov with restarts, checked by its residual.

A dense `eigh` of a 1536-wide layer takes seconds on a CPU, of a 14336-wide one minutes, and all but r of its vectors
are thrown away. Here the operator is applied to a few dozen vectors at a time; what does not converge is solved
densely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DENSE_UP_TO = 128  # narrower operators are cheaper to solve densely than to iterate on
OVERSAMPLING = 8  # extra vectors in a block: they take the eigenvalues next to the wanted ones
KRYLOV_BLOCKS = 8  # blocks in the basis before a restart
CHECKED_AT = (2, 4, 6, 8)  # blocks at which the residual is looked at
MAX_RESTARTS = 40
# Of the residual, relative to the largest eigenvalue: in float64 what float32 sums can tell apart, in float32 what the
# arithmetic reaches.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5}
SINGULAR_TOLERANCE = 1e-10  # of squares: singular values of 1e-4 of the largest still stand out


@dataclass(frozen=True)
class Eigenpairs:
    """`vectors` (n, k) orthonormal, `values` (k,) falling, `residual` ‖A V − V Λ‖_F / max|Λ|."""

    values: Tensor
    vectors: Tensor
    residual: float


def largest_eigenpairs(
    apply: Callable[[Tensor], Tensor], start: Tensor, k: int, tolerance: float | None = None
) -> Eigenpairs:
    """The `k` algebraically largest eigenpairs of a symmetric operator.

    Args:
        apply: (n, b) → (n, b), the operator on a block of vectors; symmetric.
        start: (n, b) with b ≥ k, a first guess; its span must not be orthogonal to what is sought.
        k: number of pairs.
        tolerance: residual at which to stop, that of the dtype if None. Beyond the last restart the operator is formed
            and solved densely.
    """
    n, width = start.shape
    tolerance = TOLERANCE[start.dtype] if tolerance is None else tolerance
    if n <= max(DENSE_UP_TO, KRYLOV_BLOCKS * width):  # the basis would fill the whole space
        return _dense(apply, start, k)
    basis = torch.linalg.qr(start).Q
    for _ in range(MAX_RESTARTS):
        q, aq = basis, apply(basis)
        for blocks in range(1, KRYLOV_BLOCKS + 1):
            if blocks in CHECKED_AT:
                keep, pairs = _rayleigh_ritz(q, aq, width, k)
                if pairs.residual <= tolerance:
                    return pairs
            if blocks < KRYLOV_BLOCKS:
                block = _orthonormal_to(q, aq[:, -width:])
                q, aq = torch.cat([q, block], 1), torch.cat([aq, apply(block)], 1)  # (n, b·blocks)
        basis = torch.linalg.qr(q @ keep).Q
    return _dense(apply, start, k)


@dataclass(frozen=True)
class SingularTriplets:
    """`left` (m, k) and `right` (n, k) orthonormal, `values` (k,) falling; `residual` of the eigenpairs behind them."""

    left: Tensor
    values: Tensor
    right: Tensor
    residual: float


def largest_singular_triplets(matrix: Tensor, start: Tensor, k: int) -> SingularTriplets:
    """The `k` largest singular values of a matrix and their vectors, in float64: their squares are what is iterated on,
    and in float32 what is below a three-hundredth of the largest would drown.

    Args:
        matrix: (m, n), float64.
        start: (max(m, n), b) with b ≥ k, any block of noise.
        k: number of triplets, at most min(m, n).
    """
    if matrix.shape[0] < matrix.shape[1]:  # the smaller Gram matrix is the one to iterate on
        found = largest_singular_triplets(matrix.T, start, k)
        return SingularTriplets(found.right, found.values, found.left, found.residual)
    pairs = largest_eigenpairs(lambda v: matrix.T @ (matrix @ v), matrix.T @ start, k, SINGULAR_TOLERANCE)
    # Small values are more exact from the image of the vectors than as the roots of eigenvalues.
    left, values, rotation = torch.linalg.svd(matrix @ pairs.vectors, full_matrices=False)
    return SingularTriplets(left, values, pairs.vectors @ rotation.T, pairs.residual)


def _rayleigh_ritz(q: Tensor, aq: Tensor, width: int, k: int) -> tuple[Tensor, Eigenpairs]:
    """The best pairs in the span of the orthonormal q (n, m), given A q: coefficients (m, width) and the first k."""
    projected = q.T @ aq
    values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
    keep = rotation[:, -width:].flip(1)
    return keep, _pairs(values.flip(0)[:k], q @ keep[:, :k], aq @ keep[:, :k])


def _orthonormal_to(q: Tensor, new: Tensor) -> Tensor:
    """An orthonormal block spanning what `new` adds to the orthonormal `q`.

    Projected and orthonormalised twice: once is not enough in floating point, nor where `new` adds almost nothing.
    """
    for _ in range(2):
        new = torch.linalg.qr(new - q @ (q.T @ new)).Q
    return new


def _dense(apply: Callable[[Tensor], Tensor], start: Tensor, k: int) -> Eigenpairs:
    matrix = apply(torch.eye(start.shape[0], dtype=start.dtype, device=start.device))
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    return _pairs(values, vectors, matrix @ vectors)


def _pairs(values: Tensor, vectors: Tensor, image: Tensor) -> Eigenpairs:
    scale = values.abs().max().clamp_min(torch.finfo(values.dtype).tiny)
    return Eigenpairs(values, vectors, (torch.linalg.norm(image - vectors * values) / scale).item())
