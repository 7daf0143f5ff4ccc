"""cntlora: its rows span the least of the constrained problem that it is derived from, posed on activations."""

import pytest
import torch
from collecting import distance
from method_oracles import ShiftProblem
from oracle import projector
from solving import find_shift, solve_cntlora
from tolerances import TURNED

from lora_da.methods.common import LoraFactors, UnsolvableLayer

pytestmark = pytest.mark.once

WHITENED = 1e-8  # float64 against float64, through the inverse of a badly scaled Z^(1/2) in the oracle
MU = 0.1
SIZES = [(20, 33), (48, 24), (90, 150), (8, 120)]


def problem(o: int, i: int, n: int = 600, mu: float = MU, seed: int = 0) -> ShiftProblem:
    """Activations with strong directions, one of them huge, that are no channels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, i, generator=g, dtype=torch.float64) * torch.logspace(0.5, -0.5, i, dtype=torch.float64)
    x[:, i // 2] *= 20
    x = x @ torch.linalg.qr(torch.randn(i, i, generator=g, dtype=torch.float64)).Q
    return ShiftProblem(x, torch.randn(o, i, generator=g, dtype=torch.float64) / i**0.5, mu)


def second_moment(p: ShiftProblem) -> torch.Tensor:
    return p.x.T @ p.x / len(p.x)


def mu_of(p: ShiftProblem) -> float:
    return p.share / (1 - p.share)


def solved(p: ShiftProblem, rank: int, plain_variance: float = 1.0) -> LoraFactors:
    return solve_cntlora(find_shift(second_moment(p), mu_of(p)), p.weight, rank, plain_variance=plain_variance)


def test_the_pre_training_partners_are_isotropic_with_the_same_energy() -> None:
    """The premise of the derivation, of the oracle itself."""
    p = problem(20, 33)
    c = second_moment(p).trace() / 33
    assert distance(p.x_pre.T @ p.x_pre / len(p.x), (1 + MU) * c * torch.eye(33, dtype=torch.float64)) <= WHITENED


@pytest.mark.parametrize("mu", [1e-3, MU, 1.0])
@pytest.mark.parametrize(("o", "i"), SIZES)
def test_its_rows_are_those_of_the_constrained_optimum(o: int, i: int, mu: float) -> None:
    p, rank = problem(o, i, mu=mu), 4
    step = p.solve(rank)
    rows = torch.linalg.svd(step, full_matrices=False).Vh[:rank]
    ours = solved(p, rank)
    assert distance(projector(ours.lora_A.T), projector(rows.T)) <= WHITENED
    best = p.best_step(ours.lora_A)
    assert p.objective(best).item() == pytest.approx(p.objective(step).item(), rel=WHITENED)
    assert distance(best, step) <= WHITENED
    assert ours.lora_B.shape == (o, rank) and not ours.lora_B.any()


def test_no_other_rows_do_better() -> None:
    """J of the best B beside them is least at the rows chosen: below perturbed and random ones, and those of the
    leading directions of the activations or of W."""
    p, rank = problem(30, 40), 5
    chosen = solved(p, rank).lora_A
    chosen = chosen / chosen.norm(dim=1, keepdim=True)
    least = p.objective(p.best_step(chosen))
    g = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-1, 1e3):
        for _ in range(20):
            other = chosen + size * torch.randn(chosen.shape, generator=g, dtype=torch.float64)
            assert least <= p.objective(p.best_step(other)) * (1 + 1e-12)
    for matrix in (p.x, p.weight):
        others = torch.linalg.svd(matrix, full_matrices=False).Vh[:rank]
        assert p.objective(p.best_step(others)) > least * (1 + 1e-3)


def test_the_least_is_stationary() -> None:
    """The oracle's own claim: no gradient of J in either factor at the optimum, and none at all at full rank."""
    p = problem(20, 33)
    for rank in (4, 20):
        step = p.solve(rank)
        u, s, vt = torch.linalg.svd(step, full_matrices=False)
        up, down = (u[:, :rank] * s[:rank]).requires_grad_(), vt[:rank].clone().requires_grad_()
        gradients = torch.autograd.grad(p.objective(up @ down), [up, down])
        scale = p.objective(torch.zeros_like(step)).item()
        assert max(gradient.abs().max().item() for gradient in gradients) <= 1e-6 * scale
        free = step.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(p.objective(free), free)
        assert (gradient.abs().max().item() <= 1e-6 * scale) == (rank == 20)


def test_all_ranks_fulfil_the_first_constraint_where_the_second_has_no_weight() -> None:
    """mu = 0 and full rank: W + dW gives for each x what W gives for its partner."""
    p = problem(20, 33, mu=0.0)
    step = p.best_step(solved(p, 20).lora_A)
    assert distance(p.x @ (p.weight + step).T, p.x_pre @ p.weight.T) <= WHITENED


def test_directions_that_are_used_as_before_training_are_left_alone() -> None:
    """A diagonal case by hand: W = I, Z = diag(λ), c = 1. λ |√(1 + μ) − √(λ + μ)| / (λ + μ) ranks the channels; where
    λ = 1 or 0 it is 0."""
    values = torch.tensor([2.9, 1.0, 0.0, 0.5, 0.6, 1.0], dtype=torch.float64)
    assert values.mean() == 1
    found = solve_cntlora(find_shift(torch.diag(values), MU), torch.eye(6, dtype=torch.float64), 2, plain_variance=1.0)
    worth = values * ((1 + MU) ** 0.5 - (values + MU).sqrt()).abs() / (values + MU)
    chosen = worth.argsort(descending=True)[:2]
    assert sorted(chosen.tolist()) == sorted(found.lora_A.abs().argmax(1).tolist()) == [0, 3]
    others = [k for k in range(6) if k not in chosen]
    assert found.lora_A[:, others].abs().max() <= 1e-12
    # rows of H⁻¹, at 2 · 6 of energy: entries in the ratio of (λ + μ)^-½
    entries = found.lora_A.abs().amax(1)[found.lora_A.abs().argmax(1).argsort()]
    assert (entries[0] / entries[1]).item() == pytest.approx(((0.5 + MU) / (2.9 + MU)) ** 0.5)
    assert torch.trace(found.lora_A @ torch.diag(values) @ found.lora_A.T).item() == pytest.approx(12.0)


def test_its_rows_see_inputs_that_are_close_to_white() -> None:
    p = problem(30, 40, mu=1e-6)
    ours = solved(p, 5)
    seen = ours.lora_A @ second_moment(p) @ ours.lora_A.T
    assert distance(seen / seen[0, 0], torch.eye(5, dtype=torch.float64)) <= 1e-4


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_change_nothing_but_the_scale_that_is_plain_loras(scale: float) -> None:
    p = problem(30, 40)
    one = solve_cntlora(find_shift(second_moment(p), MU), p.weight, 4, plain_variance=1.0)
    other = solve_cntlora(find_shift(second_moment(p) * scale, MU), p.weight * scale, 4, plain_variance=1.0)
    assert distance(other.lora_A, one.lora_A) <= WHITENED


def test_float32_where_the_damping_bounds_the_condition_number() -> None:
    p = problem(90, 150)
    shift = find_shift(second_moment(p).float(), MU)
    assert shift.vectors.dtype == torch.float32
    assert find_shift(second_moment(p).float(), 1e-9).vectors.dtype == torch.float64
    ours = solve_cntlora(shift, p.weight.bfloat16(), 4, plain_variance=1.0)
    truth = ShiftProblem(p.x, p.weight.bfloat16().double(), MU)
    rows = torch.linalg.svd(truth.solve(4), full_matrices=False).Vh[:4]
    assert distance(projector(ours.lora_A.T), projector(rows.T)) <= TURNED


def test_fewer_tokens_than_inputs() -> None:
    """Directions that no token has are not chosen, and nothing blows up."""
    p = problem(20, 33)
    few = p.x[:6].float()
    ours = solve_cntlora(find_shift(few.T @ few / 6, MU), p.weight.float(), 4, plain_variance=1.0)
    touched = projector(few.T.double())  # (33, 33), of rank 6
    assert distance(ours.lora_A @ touched, ours.lora_A) <= 1e-4  # rounding of float32 sums, whitened
    rest = solve_cntlora(find_shift(few.T @ few / 6, MU), p.weight.float(), 12, plain_variance=1.0)
    assert torch.isfinite(rest.lora_A).all() and torch.linalg.matrix_rank(rest.lora_A) == 12


def test_condition_and_damping_are_reported() -> None:
    p = problem(30, 40)
    values = torch.linalg.eigvalsh(second_moment(p))
    ours, added = solved(p, 4), MU * values.mean().item()
    assert ours.damping_input == pytest.approx(added)
    assert ours.condition == pytest.approx(((values[-1] + added) / (values[0] + added)).item())


def test_isotropic_inputs_have_no_shift() -> None:
    weight = torch.randn(5, 8, dtype=torch.float64)
    with pytest.raises(UnsolvableLayer, match="there is no shift to start from"):
        solve_cntlora(find_shift(3.0 * torch.eye(8, dtype=torch.float64), MU), weight, 2, plain_variance=1.0)


@pytest.mark.parametrize(
    ("cov", "damping", "message"),
    [
        (torch.zeros(4, 4), MU, "input covariance is zero"),
        (torch.full((4, 4), float("nan")), MU, "input covariance is not finite"),
        (torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])), 0.0, "not positive definite .*set a larger damping"),
    ],
)
def test_impossible_inputs_are_named(cov: torch.Tensor, damping: float, message: str) -> None:
    with pytest.raises(UnsolvableLayer, match=message):
        find_shift(cov, damping)


@pytest.mark.parametrize(("value", "message"), [(0.0, "weight is zero$"), (float("inf"), "weight is not finite")])
def test_impossible_weights_are_named(value: float, message: str) -> None:
    shift = find_shift(second_moment(problem(5, 8)), MU)
    with pytest.raises(UnsolvableLayer, match=message):
        solve_cntlora(shift, torch.full((5, 8), value), 2, plain_variance=1.0)
