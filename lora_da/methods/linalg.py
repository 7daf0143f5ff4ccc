"""Leading eigenpairs of symmetric operators and singular triplets of matrices, and one eigenvalue alone.

A dense `eigh` of a 1536-wide layer takes seconds on a CPU, of a 14336-wide one minutes, and all but r of its vectors
are thrown away. Here an operator is applied to a few dozen vectors at a time; what does not converge is solved densely.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da.methods.krylov import BLOCKS, Eigenpairs, Operator, dense, iterate
from lora_da.methods.orthonormal import orthonormal_to

DENSE_UP_TO = 128  # narrower operators are cheaper to solve densely than to iterate on
OVERSAMPLING = 8  # extra vectors in a block: they take the eigenvalues next to the wanted ones
# Of the residual, relative to the largest eigenvalue: in float64 what float32 sums can tell apart, in float32 what the
# arithmetic reaches.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5}
# Of squares: in float64 singular values of 1e-4 of the largest still stand out.
SINGULAR_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
ROWS = 1024  # of a float32 matrix that are in float64 at a time
POWER_STEPS = 20
NEAR_LOOKS = (1, 2, 4)  # blocks


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
    operator = Operator(apply, lambda image: image, lambda v, image: v.T @ image)
    found = _solved(operator, start, k, TOLERANCE[start.dtype] if tolerance is None else tolerance)
    return Eigenpairs(found.values[:k], found.vectors[:, :k], found.residual)


def estimated_eigenvalue(apply: Callable[[Tensor], Tensor], start: Tensor, tolerance: float) -> float:
    """A lower bound of the largest eigenvalue of a positive operator, by power iteration: products and norms alone.

    Args:
        apply: (n, 1) → (n, 1), the operator on a vector; symmetric, positive semidefinite.
        start: (n, 1), a first guess.
        tolerance: residual, relative to the eigenvalue, at which to stop; the error is its square where no other
            eigenvalue is close.
    """
    image, found = start, 0.0
    for _ in range(POWER_STEPS):
        v = image / torch.linalg.vector_norm(image).clamp_min(torch.finfo(image.dtype).tiny)
        image = apply(v)
        value = (v * image).sum()
        found, error = torch.stack([value, torch.linalg.vector_norm(image - v * value)]).tolist()
        if error <= tolerance * found:
            break
    return found


def largest_eigenvalue_near(
    apply: Callable[[Tensor], Tensor], block: Tensor, others: Tensor, tolerance: float
) -> float:
    """The largest eigenvalue of a positive operator, from vectors whose span all but contains its eigenvector: a block
    Krylov space that is looked at from the first block on.

    Args:
        apply: (n, b) → (n, b), the operator on a block of vectors; symmetric, positive semidefinite.
        block: (n, b), orthonormal, b > 1.
        others: (n, c), a further guess, for where that is not so.
        tolerance: of the eigenvalue, relative.
    """
    width = block.shape[1]
    q, image = block, apply(block)
    for blocks in range(1, NEAR_LOOKS[-1] + 1):
        if blocks in NEAR_LOOKS:
            values, rotation = torch.linalg.eigh(q.T @ image)
            top = rotation[:, -1:]
            error = torch.linalg.vector_norm(image @ top - q @ top * values[-1])
            missing = error * (error / (values[-1] - values[-width]))  # lower than these is what lies outside
            value, missing = torch.stack([values[-1], torch.minimum(error, missing)]).tolist()
            if missing <= tolerance * value:
                return value
        following = image[:, -width:] if blocks > 1 else torch.cat([image, others], 1)
        block = orthonormal_to(q, following)
        width = block.shape[1]
        q, image = torch.cat([q, block], 1), torch.cat([image, apply(block)], 1)
    return largest_eigenpairs(apply, block, 1, math.sqrt(tolerance)).values.item()


@dataclass(frozen=True)
class SingularTriplets:
    """`left` (m, k) and `right` (n, k) orthonormal, `values` (k,) falling, all in float64; `residual` of the eigenpairs
    behind them."""

    left: Tensor
    values: Tensor
    right: Tensor
    residual: float


def largest_singular_triplets(matrix: Tensor, start: Tensor, k: int) -> SingularTriplets:
    """The `k` largest singular values of a matrix and their vectors: iterated on in its dtype, settled in float64.

    Their squares are what is iterated on, in which float32 would lose all below a three-hundredth of the largest. So
    the small problem is made of the images of the basis, and in float64: what remains is float32's rounding of the
    matrix itself. One step of subspace iteration in float64 takes that away.

    Args:
        matrix: (m, n), float32 or float64, its largest entry around 1.
        start: (max(m, n), b) with b ≥ k, any block of noise.
        k: number of triplets, at most min(m, n).
    """
    if matrix.shape[0] < matrix.shape[1]:  # the smaller Gram matrix is the one to iterate on
        found = largest_singular_triplets(matrix.T, start, k)
        return SingularTriplets(found.right, found.values, found.left, found.residual)
    operator = Operator(lambda v: matrix @ v, lambda image: matrix.T @ image, lambda _, image: _gram(image))
    pairs = _solved(operator, matrix.T @ start, k, SINGULAR_TOLERANCE[matrix.dtype])
    right = pairs.vectors.double()  # (n, b)
    if matrix.dtype != torch.float64:
        right = torch.linalg.qr(_squared_product(matrix, right)).Q
    # Small values are more exact from the image of the vectors than as the roots of eigenvalues.
    image = torch.cat([rows.double() @ right for rows in matrix.split(ROWS)])
    left, values, rotation = torch.linalg.svd(image, full_matrices=False)
    return SingularTriplets(left[:, :k], values[:k], right @ rotation[:k].T, pairs.residual)


def _solved(operator: Operator, start: Tensor, k: int, tolerance: float) -> Eigenpairs:
    """Iterated where that is cheaper and converges; else densely."""
    if start.shape[0] <= max(DENSE_UP_TO, BLOCKS * start.shape[1]):  # the basis would fill the whole space
        return dense(operator, start, k)
    return iterate(operator, start, k, tolerance) or dense(operator, start, k)


def _gram(image: Tensor) -> Tensor:
    tall = image.double()
    return tall.T @ tall


def _squared_product(matrix: Tensor, right: Tensor) -> Tensor:
    """matrixᵀ matrix right for right (n, b) in float64, a few rows of the matrix at a time."""
    product = torch.zeros_like(right)
    for rows in matrix.split(ROWS):
        tall = rows.double()
        product.addmm_(tall.T, tall @ right)
    return product
