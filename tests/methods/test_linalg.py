"""Leading eigenpairs by iteration, and the orthonormal blocks that they are made of."""

import pytest
import torch
from collecting import distance
from tolerances import EXACT

from lora_da.methods.linalg import TOLERANCE, largest_eigenpairs
from lora_da.methods.orthonormal import orthonormal_to

pytestmark = pytest.mark.once


@pytest.mark.parametrize("k", [1, 8])
def test_iteration_finds_what_the_dense_solver_finds(k: int) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(400, 400, generator=g, dtype=torch.float64)).Q
    values = torch.cat(
        [torch.linspace(2, 1, 12, dtype=torch.float64), -torch.logspace(-3, 2, 388, dtype=torch.float64)]
    )
    matrix = (q * values) @ q.T
    calls = []
    pairs = largest_eigenpairs(
        lambda v: calls.append(v.shape[1]) or matrix @ v, q @ torch.ones(400, 16).double() + q[:, :16], k
    )
    assert distance(pairs.values, values[:k]) <= 1e-9
    assert distance(pairs.vectors @ pairs.vectors.T, q[:, :k] @ q[:, :k].T) <= 1e-5
    assert pairs.residual <= TOLERANCE[torch.float64]
    assert max(calls) < 400  # it did not form the operator


def test_a_block_that_would_fill_the_space_is_solved_densely_at_once() -> None:
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 300, generator=g, dtype=torch.float64)
    matrix = matrix + matrix.T
    calls: list[int] = []
    start = torch.randn(300, 60, generator=g, dtype=torch.float64)
    pairs = largest_eigenpairs(lambda v: calls.append(1) or matrix @ v, start, 52)
    assert len(calls) == 1
    assert distance(pairs.values, torch.linalg.eigvalsh(matrix).flip(0)[:52]) <= EXACT


def test_what_does_not_converge_is_solved_densely() -> None:
    """An operator with one huge cluster around the wanted eigenvalues defeats the iteration, not the solver."""
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(300, 300, generator=g, dtype=torch.float64)).Q
    values = torch.cat(
        [1 + 1e-9 * torch.arange(40, dtype=torch.float64).flip(0), -torch.logspace(0, 12, 260, dtype=torch.float64)]
    )
    matrix = (q * values) @ q.T
    pairs = largest_eigenpairs(lambda v: matrix @ v, torch.randn(300, 2, generator=g, dtype=torch.float64), 1, 1e-30)
    assert pairs.values.shape == (1,)
    assert (pairs.vectors.T @ q[:, :40]).norm().item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [1.0, 1e-1, 1e-2, 1e-3, 2e-4, 1e-7])
def test_blocks_are_orthonormal_however_close_their_columns(apart: float, dtype: torch.dtype) -> None:
    """Columns that differ by so much of their norm; CholeskyQR alone is off by 1,700 roundings of float32 at 2e-4."""
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(500, 24, generator=g, dtype=torch.float64)).Q.to(dtype)
    common = torch.randn(500, 1, generator=g, dtype=torch.float64)
    new = common / common.norm() + apart * torch.randn(500, 12, generator=g, dtype=torch.float64) / 500**0.5
    whole = torch.cat([q, orthonormal_to(q, new.to(dtype))], 1).double()
    off = (whole.T @ whole - torch.eye(36, dtype=torch.float64)).abs().max()
    assert off <= 24 * torch.finfo(dtype).eps  # rounding of sums of 500 squares: √500 of these at most
