"""The solver: against the authors' own vectors, the dense oracle, the theorem it rests on, and its exact cases."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from collecting import distance
from oracle import objective, oracle_solve, projector
from solving import damp_input, solve_lora_da
from tolerances import EXACT

from lora_da.config import PRESETS
from lora_da.methods.common import LoraFactors, UnsolvableLayer
from lora_da.methods.linalg import DENSE_UP_TO, TOLERANCE
from lora_da.statistics import LayerStatistics

pytestmark = pytest.mark.once

AUTHORS = 5e-4  # the authors' vectors were solved in float32; a float64 solution agrees to 5e-5 … 4e-4


def statistics(o: int, i: int, n: int = 400, seed: int = 0, full: bool = False) -> LayerStatistics:
    """Statistics of n tokens with a few strong input channels, as real layers have."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, i, generator=g, dtype=torch.float64) * torch.logspace(1, -2, i, dtype=torch.float64)
    d = 1e-3 * torch.randn(n, o, generator=g, dtype=torch.float64) + 1e-4 * x[:, :1]
    fisher = d.T @ d / n
    return LayerStatistics(d.T @ x / 16, x.T @ x / n, fisher if full else fisher.diagonal().clone(), n)


def numbers(preset: str, population: float = 7473.0) -> dict:
    p = PRESETS[preset]
    return {
        "population": population,
        "variance_weight": p.variance_weight,
        "damping": p.damping,
        "relative_damping": p.relative_damping,
        "gamma": p.gamma,
        "normalize_step": p.normalize_step,
    }


def solve(s: LayerStatistics, rank: int, plain_variance: float | None = None, **kwargs) -> LoraFactors:
    return solve_lora_da(s, rank, plain_variance=plain_variance, **kwargs)


def reference_file() -> Path:
    folder = os.environ.get("LORA_DA_DATA")
    path = Path(folder or ".") / "reference_vectors.safetensors"
    if not folder or not path.exists():
        pytest.skip("LORA_DA_DATA does not name a folder with reference_vectors.safetensors")
    return path


@pytest.mark.parametrize("case", range(4))
def test_reference_preset_reproduces_the_authors_steps(case: int) -> None:
    from safetensors import safe_open

    with safe_open(reference_file(), "pt") as file:
        meta = json.loads(file.metadata()[str(case)])
        t = {k.split(".", 1)[1]: file.get_tensor(k) for k in file.keys() if k.startswith(f"{case}.")}  # noqa: SIM118
    n = meta["n_tokens"]
    s = LayerStatistics(t["grad"], t["input_cov_sum"] / n, t["output_sq_sum"] / n, n)
    preset = numbers("reference", meta["population_size"])
    assert (preset["variance_weight"], preset["gamma"], preset["damping"]) == (
        meta["variance_weight"],
        meta["gamma"],
        meta["damping"],
    )
    authors = t["lora_B"] @ t["lora_A"]
    ours = solve(s, meta["rank"], **preset)
    assert distance(ours.lora_B @ ours.lora_A, authors.double()) <= AUTHORS
    assert distance(ours.lora_A.norm(), t["lora_A"].norm().double()) <= AUTHORS
    if case == 3:  # the one that sees the variance term: its weight must matter, or the comparison proves nothing
        other = solve(s, meta["rank"], **{**preset, "variance_weight": 0.0})
        assert distance(other.lora_B @ other.lora_A, authors.double()) > 100 * AUTHORS


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("population", [2.0, 1e5])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("o", "i"), [(20, 33), (48, 24), (90, 200)])  # narrow and wide; 200 is solved by iteration
def test_agrees_with_the_dense_oracle(preset: str, population: float, full: bool, o: int, i: int) -> None:
    s, rank = statistics(o, i, full=full), 4
    plain = 1 / (3 * i) if PRESETS[preset].match_input_energy else None
    energy = None if plain is None else plain * rank * s.input_cov.trace().item()
    ours = solve(s, rank, plain, **numbers(preset, population))
    oracle = oracle_solve(
        s.grad, s.input_cov, s.output_fisher, rank, input_energy=energy, **numbers(preset, population)
    )
    # An eigenvector's error is the residual over the gap to the next eigenvalue.
    gap = (oracle.eigenvalues[rank] - oracle.eigenvalues[rank - 1]) / oracle.eigenvalues.abs().max()
    tolerance = EXACT if i <= DENSE_UP_TO else 4 * TOLERANCE[torch.float64] / gap.item()
    assert tolerance < 1e-3, "the case is too degenerate to compare"
    assert distance(projector(ours.lora_A.T), projector(oracle.lora_A.T)) <= tolerance
    assert distance(ours.lora_B @ ours.lora_A, oracle.lora_B @ oracle.lora_A) <= tolerance
    assert distance(ours.lora_A.norm(), oracle.lora_A.norm()) <= tolerance
    captured = (oracle.subspace.T @ oracle.direction).norm() ** 2 / oracle.direction.norm() ** 2
    assert ours.bias_captured == pytest.approx(captured.item(), rel=1e-6)


def single(s: LayerStatistics, scale: float = 1.0) -> LayerStatistics:
    """In float32, as the sums are taken, of a loss that is `scale` times as large."""
    grad, fisher = scale * s.grad, scale**2 * s.output_fisher
    return LayerStatistics(grad.float(), s.input_cov.float(), fisher.float(), s.n_tokens)


@pytest.mark.parametrize(("preset", "dtype"), [("default", torch.float32), ("paper", torch.float64)])
def test_float32_is_solved_in_where_the_damping_bounds_the_condition_number(preset: str, dtype: torch.dtype) -> None:
    s, rank = statistics(90, 300), 4
    p = PRESETS[preset]
    damped = damp_input(single(s).input_cov, p.damping, p.relative_damping)
    assert damped.factor.dtype == dtype
    assert damp_input(s.input_cov, p.damping, p.relative_damping).factor.dtype == torch.float64
    ours = solve(single(s), rank, **numbers(preset))
    oracle = oracle_solve(
        *(t.double() for t in (single(s).grad, single(s).input_cov, single(s).output_fisher)), rank, **numbers(preset)
    )
    gap = (oracle.eigenvalues[rank] - oracle.eigenvalues[rank - 1]) / oracle.eigenvalues.abs().max()
    tolerance = 4 * TOLERANCE[dtype] / gap.item()
    assert tolerance < 2e-2, "the case is too degenerate to compare"
    assert distance(projector(ours.lora_A.T), projector(oracle.lora_A.T)) <= tolerance
    assert distance(ours.lora_B @ ours.lora_A, oracle.lora_B @ oracle.lora_A) <= tolerance
    chosen = torch.linalg.qr(ours.lora_A.T).Q
    best = oracle.eigenvalues[:rank].sum()
    assert abs(objective(oracle.omega, chosen) - best) <= tolerance**2 * oracle.eigenvalues.abs().sum()


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_float32_does_not_depend_on_the_size_of_the_loss(scale: float) -> None:
    """D grows as the loss shrinks; what is normalised comes out the same, down to where float32 itself ends."""
    s = statistics(90, 300)
    numbers_ = {**numbers("default"), "variance_weight": 0.0}
    one, other = (solve(single(s, size), 4, 1 / 900, **numbers_) for size in (1.0, scale))
    assert distance(other.lora_B @ other.lora_A, one.lora_B @ one.lora_A) <= 1e-4


@pytest.mark.parametrize("preset", PRESETS)
def test_no_other_subspace_has_a_smaller_expected_distance(preset: str) -> None:
    """The theorem: tr(Pᵀ Ω P) is least at the chosen subspace, below random and perturbed ones."""
    s, rank = statistics(30, 150), 5
    oracle = oracle_solve(s.grad, s.input_cov, s.output_fisher, rank, **numbers(preset, 50.0))
    chosen = torch.linalg.qr(solve(s, rank, **numbers(preset, 50.0)).lora_A.T).Q
    least = objective(oracle.omega, chosen)
    slack = 1e-6 * oracle.omega.norm()
    g = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-1, 1e3):
        for _ in range(20):
            other = torch.linalg.qr(chosen + size * torch.randn(chosen.shape, generator=g, dtype=torch.float64)).Q
            assert least <= objective(oracle.omega, other) + slack
    gradient_svd = torch.linalg.svd(s.grad, full_matrices=False).Vh[:rank].T
    assert least < objective(oracle.omega, gradient_svd) - slack  # the Fisher makes a difference here


def test_without_fisher_and_variance_it_is_the_gradient_svd() -> None:
    s = statistics(40, 60)
    flat = LayerStatistics(s.grad, torch.eye(60, dtype=torch.float64), torch.ones(40, dtype=torch.float64), 400)
    ours = solve(flat, 6, **{**numbers("paper"), "variance_weight": 0.0, "damping": 0.0})
    u, sv, vh = torch.linalg.svd(s.grad, full_matrices=False)
    assert distance(projector(ours.lora_A.T), projector(vh[:6].T)) <= EXACT
    step = -(u[:, :6] * sv[:6]) @ vh[:6]
    assert distance(ours.lora_B @ ours.lora_A, step) <= EXACT


def test_the_step_goes_downhill_and_gamma_sets_its_size() -> None:
    s = statistics(40, 60)
    steps = [solve(s, 8, **{**numbers("reference"), "gamma": gamma}) for gamma in (4.0, 1024.0)]
    products = [f.lora_B @ f.lora_A for f in steps]
    assert (s.grad * products[0]).sum() < 0
    assert distance(products[0], products[1] * 256) <= EXACT
    full = solve(s, 40, **{**numbers("reference"), "variance_weight": 0.0, "gamma": 4.0})
    assert torch.linalg.matrix_norm(full.lora_B @ full.lora_A, 2).item() == pytest.approx(1 / 4, rel=1e-6)


def test_input_energy_is_that_of_plain_lora_and_leaves_the_step_alone() -> None:
    s, rank, variance = statistics(40, 60), 8, 1 / (3 * 60)
    matched, shared = (solve(s, rank, v, **numbers("default")) for v in (variance, None))
    energy = torch.trace(matched.lora_A @ s.input_cov @ matched.lora_A.T).item()
    g = torch.Generator().manual_seed(0)
    bound = 60**-0.5
    plain = [(torch.rand(rank, 60, generator=g, dtype=torch.float64) * 2 - 1) * bound for _ in range(2000)]
    drawn = sum(torch.trace(a @ s.input_cov @ a.T).item() for a in plain) / len(plain)
    assert energy == pytest.approx(drawn, rel=0.02)  # the mean of 2000 draws of PEFT's default A
    assert distance(matched.lora_B @ matched.lora_A, shared.lora_B @ shared.lora_A) <= EXACT


def test_scale_free() -> None:
    """Default damping is relative: units of the inputs and of the loss change neither subspace nor step direction."""
    s = statistics(30, 40)
    scaled = LayerStatistics(s.grad * 1e-4 * 1e3, s.input_cov * 1e6, s.output_fisher * 1e-8, s.n_tokens)
    one, other = (solve(t, 4, **{**numbers("default"), "variance_weight": 0.0}) for t in (s, scaled))
    assert distance(projector(one.lora_A.T), projector(other.lora_A.T)) <= EXACT
    assert distance(one.lora_B @ one.lora_A, other.lora_B @ other.lora_A) <= EXACT
    one, other = (solve(t, 4, **{**numbers("reference"), "variance_weight": 0.0}) for t in (s, scaled))
    assert distance(projector(one.lora_A.T), projector(other.lora_A.T)) > 1e-3  # absolute damping is not scale-free


def test_deterministic_and_sign_canonical() -> None:
    s = statistics(50, 200)
    first, second = (solve(s, 6, **numbers("default")) for _ in range(2))
    assert torch.equal(first.lora_A, second.lora_A)
    assert torch.equal(first.lora_B, second.lora_B)
    peak = first.lora_A.gather(1, first.lora_A.abs().argmax(1, keepdim=True))
    assert (peak > 0).all()


def test_more_rank_than_the_gradient_has() -> None:
    """A few tokens leave D with fewer directions than the rank: still orthonormal, nothing of the bias left out."""
    g = torch.Generator().manual_seed(0)
    x, d = (torch.randn(3, k, generator=g, dtype=torch.float64) for k in (300, 40))
    s = LayerStatistics(d.T @ x / 3, x.T @ x / 3, d.square().mean(0), 3)
    ours = solve(s, 8, **{**numbers("paper"), "damping": 0.1})
    gram = ours.lora_A @ ours.lora_A.T
    assert distance(gram, torch.eye(8, dtype=torch.float64)) <= 1e-8
    assert ours.bias_captured == pytest.approx(1.0, abs=1e-8)


def test_condition_number_and_damping_are_reported() -> None:
    cov = torch.diag(torch.logspace(0, -4, 200, dtype=torch.float64))
    damped = damp_input(cov, 1e-6, relative_damping=False)
    assert damped.condition == pytest.approx(1 / (1e-4 + 1e-6), rel=0.1)  # an estimate
    assert damped.damping == 1e-6
    assert damp_input(cov, 0.5, relative_damping=True).damping == pytest.approx(0.5 * cov.diagonal().mean().item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": float("nan")}, "gradient is not finite"),
        ({"input_cov": float("inf")}, "input covariance is not finite"),
        ({"output_fisher": 0.0}, "output Fisher is zero"),
        ({"grad": 0.0}, "gradient is zero"),
    ],
)
def test_impossible_statistics_are_named(change: dict, message: str) -> None:
    s = statistics(10, 12)
    ((name, value),) = change.items()
    broken = {f: getattr(s, f) for f in ("grad", "input_cov", "output_fisher")} | {name: getattr(s, name) * 0 + value}
    with pytest.raises(UnsolvableLayer, match=message):
        solve(LayerStatistics(**broken, n_tokens=1), 2, **numbers("default"))


def test_a_singular_covariance_without_damping_is_named() -> None:
    s = statistics(10, 12)
    singular = LayerStatistics(s.grad, -s.input_cov, s.output_fisher, 1)
    with pytest.raises(UnsolvableLayer, match="not positive definite"):
        solve(singular, 2, **{**numbers("default"), "damping": 0.0})


@pytest.mark.parametrize(("rank", "chosen"), [(8, 4), (5, 3), (1, 1)])
def test_half_of_the_rows_are_solved_for_and_the_others_are_random(rank: int, chosen: int) -> None:
    """The solution of the lower rank, with rows as plain LoRA's beside it that move nothing."""
    s, plain = statistics(40, 2000, n=50), 1 / (3 * 2000)
    settings = {**numbers("default"), "population": 7473.0}
    state = torch.get_rng_state()
    half = solve(s, chosen, plain, **settings)
    ours = solve(s, rank, plain, **settings, chosen_rows=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert ours.lora_A.shape == (rank, 2000) and ours.lora_B.shape == (40, rank)
    assert torch.equal(ours.lora_A[:chosen], half.lora_A) and torch.equal(ours.lora_B[:, :chosen], half.lora_B)
    assert not ours.lora_B[:, chosen:].any() and ours.fisher_length == half.fisher_length
    rest = ours.lora_A[chosen:]
    assert torch.equal(rest, solve(s, rank, plain, **settings, chosen_rows=0.5).lora_A[chosen:])
    if rank > 1:
        assert rest.std().item() == pytest.approx(plain**0.5, rel=0.05)  # of 4,000 numbers or more: 1 %
        assert abs(rest.mean().item()) < 3 * (plain / rest.numel()) ** 0.5


@pytest.mark.parametrize(("share", "rank", "chosen"), [(0.28, 25, 7), (0.5, 5, 3), (1e-9, 8, 1), (1, 8, 8)])
def test_a_share_of_the_rows_is_rounded_up(share: float, rank: int, chosen: int) -> None:
    assert dataclasses.replace(PRESETS["default"], chosen_rows=share).n_chosen(rank) == chosen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_whose_length_is_measured_has_the_same_direction(dtype: torch.dtype) -> None:
    """Its length needs no singular value: any that keeps it in range will do, whatever the size of the loss."""
    s = statistics(40, 200)
    scaled = LayerStatistics(1e-6 * s.grad.to(dtype), s.input_cov.to(dtype), 1e-12 * s.output_fisher.to(dtype), 400)
    settings, plain = numbers("default"), 1 / 600
    exact = solve(scaled, 8, plain, **settings, first_step="gamma")
    measured = solve(scaled, 8, plain, **settings, first_step="measured")
    assert torch.equal(measured.lora_A, exact.lora_A)
    ratio = measured.lora_B.norm() / exact.lora_B.norm()
    assert distance(measured.lora_B / ratio, exact.lora_B) <= EXACT
    assert 8**-0.5 - EXACT <= ratio <= 1 + EXACT  # a Frobenius norm of rank 8 in the place of a spectral one


def test_a_subspace_that_holds_nothing_of_the_step_moves_nothing() -> None:
    """Where the variance decides: the directions of the largest input energy, in none of which there is a gradient."""
    grad = torch.zeros(6, 8, dtype=torch.float64)
    grad[:, 0] = 1.0
    cov = torch.arange(1.0, 9.0, dtype=torch.float64).diag()
    s = LayerStatistics(grad, cov, torch.ones(6, dtype=torch.float64), 10)
    ours = solve(s, 2, 1 / 24, **numbers("default", population=1e-3), first_step="measured")
    assert not ours.lora_B.any() and ours.fisher_length == 0.0
    assert ours.lora_A[:, 6:].norm() == ours.lora_A.norm()
