"""LoRA-One and LoRA-GA: the formulas of their papers, and what is done where the gradient has few directions."""

import pytest
import torch
from collecting import distance
from method_oracles import oracle_lora_ga, oracle_lora_one
from oracle import projector
from solving import solve_lora_ga, solve_lora_one
from tolerances import EXACT

from lora_da.methods.common import UnsolvableLayer
from lora_da.methods.linalg import largest_singular_triplets
from lora_da.statistics import LayerStatistics

pytestmark = pytest.mark.once

ITERATED = 1e-7  # of wide layers: the residual of the squares over the gaps of these spectra
SIZES = [(20, 33), (48, 24), (30, 300), (300, 30), (200, 260), (260, 200)]  # the last two are solved by iteration


def gradient(o: int, i: int, n: int = 400, seed: int = 0) -> torch.Tensor:
    """G of tokens with a few strong input channels, one of them huge."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, i, generator=g, dtype=torch.float64) * torch.logspace(1, -2, i, dtype=torch.float64)
    x[:, i // 2] *= 1e3
    d = 1e-3 * torch.randn(n, o, generator=g, dtype=torch.float64) * torch.logspace(0, -1, o, dtype=torch.float64)
    return d.T @ x / n


def taken(grad: torch.Tensor) -> LayerStatistics:
    return LayerStatistics(grad, None, None, 400)


@pytest.mark.parametrize(("o", "i"), SIZES)
def test_lora_one_is_its_formula(o: int, i: int) -> None:
    grad, rank, gamma = gradient(o, i), 4, 128.0
    ours = solve_lora_one(taken(grad), rank, gamma=gamma)
    lora_A, lora_B = oracle_lora_one(grad, rank, gamma)
    assert distance(ours.lora_B @ ours.lora_A, lora_B @ lora_A) <= ITERATED
    # pair by pair, whose signs are free together
    for k in range(rank):
        assert distance(torch.outer(ours.lora_B[:, k], ours.lora_A[k]), torch.outer(lora_B[:, k], lora_A[k])) <= 1e-5
        assert ours.lora_A[k].norm().item() == pytest.approx(lora_A[k].norm().item(), rel=ITERATED)
        assert ours.lora_B[:, k].norm().item() == pytest.approx(lora_A[k].norm().item(), rel=ITERATED)


def test_lora_one_goes_downhill_by_one_over_gamma() -> None:
    grad = gradient(40, 60)
    ours = solve_lora_one(taken(grad), 40, gamma=4.0)
    step = ours.lora_B @ ours.lora_A
    assert distance(step, -grad / torch.linalg.matrix_norm(grad, 2) / 4) <= EXACT
    assert (grad * step).sum() < 0
    assert ours.bias_captured == pytest.approx(1.0)


@pytest.mark.parametrize(("o", "i"), SIZES)
def test_lora_ga_has_the_papers_lora_a_and_moves_nothing(o: int, i: int) -> None:
    grad, rank = gradient(o, i), 4
    ours = solve_lora_ga(taken(grad), rank, gamma=16.0)
    truth = oracle_lora_ga(grad, rank, 16.0)
    assert distance(projector(ours.lora_A.T), projector(truth.T)) <= 1e-5
    assert distance(ours.lora_A @ ours.lora_A.T, truth @ truth.T) <= EXACT  # orthogonal rows of one length
    assert ours.lora_B.shape == (o, rank) and not ours.lora_B.any()
    share = torch.linalg.svdvals(grad)[:rank].square().sum() / grad.square().sum()
    assert ours.bias_captured == pytest.approx(share.item(), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
@pytest.mark.parametrize("method", [solve_lora_one, solve_lora_ga])
def test_the_size_of_the_loss_changes_nothing(method, scale: float) -> None:
    grad = gradient(30, 40).float()
    one, other = (method(taken(g), 4, gamma=16.0) for g in (grad, grad * scale))
    for name in ("lora_A", "lora_B"):
        assert torch.allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [solve_lora_one, solve_lora_ga])
def test_deterministic_and_sign_canonical(method) -> None:
    first, second = (method(taken(gradient(50, 200)), 6, gamma=16.0) for _ in range(2))
    assert torch.equal(first.lora_A, second.lora_A) and torch.equal(first.lora_B, second.lora_B)
    assert (first.lora_A.gather(1, first.lora_A.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(("o", "i"), [(40, 300), (300, 40)])
def test_a_gradient_of_three_tokens(o: int, i: int) -> None:
    """LoRA-One has no start for more pairs than it has directions; LoRA-GA's further rows are orthogonal to them."""
    grad = gradient(o, i, n=3).float()
    with pytest.raises(UnsolvableLayer, match="its gradient has rank 3, below the adapter's 8"):
        solve_lora_one(taken(grad), 8, gamma=128.0)
    assert solve_lora_one(taken(grad), 3, gamma=128.0).bias_captured == pytest.approx(1.0)
    ours = solve_lora_ga(taken(grad), 8, gamma=16.0)
    gram = ours.lora_A @ ours.lora_A.T
    assert distance(gram, torch.eye(8, dtype=torch.float64) * o**0.5 / 16) <= 1e-8
    assert ours.bias_captured == pytest.approx(1.0)


@pytest.mark.parametrize(("value", "message"), [(0.0, "gradient is zero"), (float("nan"), "gradient is not finite")])
@pytest.mark.parametrize("method", [solve_lora_one, solve_lora_ga])
def test_impossible_gradients_are_named(method, value: float, message: str) -> None:
    with pytest.raises(UnsolvableLayer, match=message):
        method(taken(torch.full((5, 6), value)), 2, gamma=16.0)


@pytest.mark.parametrize(("m", "n"), [(150, 400), (400, 150)])
def test_small_singular_values_are_found_beside_large_ones(m: int, n: int) -> None:
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(k, 150, generator=g, dtype=torch.float64)).Q for k in (m, n))
    values = torch.logspace(0, -6, 150, dtype=torch.float64)
    matrix = (u * values) @ v.T
    found = largest_singular_triplets(matrix, torch.randn(400, 24, generator=g, dtype=torch.float64), 16)
    assert distance(found.values, values[:16]) <= 1e-8
    assert distance((found.left * found.values) @ found.right.T, (u[:, :16] * values[:16]) @ v[:, :16].T) <= 1e-5
    for side in (found.left, found.right):
        assert distance(side.T @ side, torch.eye(16, dtype=torch.float64)) <= 1e-8
