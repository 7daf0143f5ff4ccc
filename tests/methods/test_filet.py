"""FILet: the pairs that its formulas choose, at plain LoRA's input energy."""

import pytest
import torch
from collecting import distance
from method_oracles import oracle_filet
from oracle import projector
from solving import solve_filet
from tolerances import EXACT

import lora_da.methods.filet
from lora_da.methods.common import UnsolvableLayer
from lora_da.methods.filet import fisher_energies
from lora_da.statistics import LayerStatistics

pytestmark = pytest.mark.once

ENERGIES = 1e-4  # a quadratic form of float32 sums, relative to itself
SIZES = [(20, 33), (48, 24), (90, 200), (8, 120)]


def layer(o: int, i: int, n: int = 400, seed: int = 0) -> tuple[torch.Tensor, LayerStatistics]:
    """W, and statistics of tokens with strong input channels, one of them huge."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, i, generator=g, dtype=torch.float64) * torch.logspace(1, -1, i, dtype=torch.float64)
    x[:, i // 2] *= 100
    d = 1e-4 * torch.randn(n, o, generator=g, dtype=torch.float64) * torch.logspace(0, -1, o, dtype=torch.float64)
    weight = torch.randn(o, i, generator=g, dtype=torch.float64) / i**0.5
    return weight, LayerStatistics(None, x.T @ x / n, d.T @ d / n, n)


def single(s: LayerStatistics) -> LayerStatistics:
    return LayerStatistics(None, s.input_cov.float(), s.output_fisher.float(), s.n_tokens)


@pytest.mark.parametrize("candidates", [7, 1024])
@pytest.mark.parametrize(("o", "i"), SIZES)
def test_it_chooses_the_oracles_directions(o: int, i: int, candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_da.methods.filet, "CANDIDATES", candidates)
    weight, s = layer(o, i)
    rank, plain = 4, 1 / (3 * i)
    energies, directions = oracle_filet(weight, s.input_cov, s.output_fisher, rank)
    ours = fisher_energies(weight, s.input_cov, s.output_fisher)
    unit = s.input_cov.abs().max() * s.output_fisher.abs().max()
    assert distance(ours * unit, energies) <= EXACT
    found = solve_filet(s, weight, rank, plain_variance=plain)
    # row by row: in the order of their energies, all by one factor
    scale = found.lora_A.norm() / directions.norm()
    cosines = (found.lora_A / scale * directions.T).sum(1)
    assert torch.allclose(cosines.abs(), torch.ones(rank, dtype=torch.float64), atol=EXACT)
    assert distance(projector(found.lora_A.T), projector(directions)) <= 1e-8
    assert found.lora_B.shape == (o, rank) and not found.lora_B.any()


def test_lora_a_has_plain_loras_input_energy() -> None:
    weight, s = layer(30, 40)
    found = solve_filet(s, weight, 6, plain_variance=1 / 120)
    energy = torch.trace(found.lora_A @ s.input_cov @ found.lora_A.T).item()
    g = torch.Generator().manual_seed(0)
    plain = [(torch.rand(6, 40, generator=g, dtype=torch.float64) * 2 - 1) * 40**-0.5 for _ in range(3000)]
    drawn = sum(torch.trace(a @ s.input_cov @ a.T).item() for a in plain) / len(plain)
    assert energy == pytest.approx(drawn, rel=0.03)  # the mean of 3000 draws of PEFT's default A


def test_no_other_pairs_have_less_energy() -> None:
    weight, s = layer(30, 40)
    energies, directions = oracle_filet(weight, s.input_cov, s.output_fisher, 5)
    found = solve_filet(s, weight, 5, plain_variance=1 / 120)
    chosen = (found.lora_A @ directions).abs() / found.lora_A.norm(dim=1, keepdim=True)
    assert (chosen.amax(1) > 1 - EXACT).all()
    largest = oracle_filet(weight, -s.input_cov, s.output_fisher, 5)[1]  # a wrong sign would choose others
    assert distance(projector(found.lora_A.T), projector(largest)) > 0.1
    candidates = weight.T @ weight / torch.linalg.norm(weight.T @ weight, dim=0)
    pairs = (found.lora_A @ candidates).abs().argmax(1)
    others = [k for k in range(40) if k not in pairs]
    assert len(others) == 35 and energies[pairs].max() <= energies[others].min()


@pytest.mark.parametrize(("o", "i"), SIZES)
def test_float32_sums_give_the_energies(o: int, i: int) -> None:
    weight, s = layer(o, i)
    ours = fisher_energies(weight.float(), single(s).input_cov, single(s).output_fisher).double()
    unit = s.input_cov.abs().max() * s.output_fisher.abs().max()
    energies, _ = oracle_filet(weight, s.input_cov, s.output_fisher, 4)
    assert ((ours * unit - energies).abs() <= ENERGIES * energies).all()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_units_of_weight_loss_and_inputs_change_nothing(scale: float) -> None:
    weight, s = layer(30, 40)
    one = solve_filet(single(s), weight.float(), 4, plain_variance=1 / 120)
    scaled = LayerStatistics(None, s.input_cov.float() * scale, s.output_fisher.float() * scale, s.n_tokens)
    other = solve_filet(scaled, (weight * scale).float(), 4, plain_variance=1 / 120)
    assert distance(other.lora_A, one.lora_A) <= 1e-4


def test_columns_of_zeros_are_no_candidates() -> None:
    """A column that is zero in W has no pair; it would have no energy, and be chosen first."""
    weight, s = layer(20, 33)
    weight[:, 5:25] = 0
    found = solve_filet(s, weight, 4, plain_variance=1 / 99)
    kept = [k for k in range(33) if not 5 <= k < 25]
    _, directions = oracle_filet(weight[:, kept], s.input_cov[kept][:, kept], s.output_fisher, 4)
    assert distance(projector(found.lora_A[:, kept].T), projector(directions)) <= 1e-8
    assert not found.lora_A[:, 5:25].any()
    weight[:, :30] = 0
    with pytest.raises(UnsolvableLayer, match="its weight has 3 columns that are not zero, below the rank 4"):
        solve_filet(s, weight, 4, plain_variance=1 / 99)


def test_directions_without_input_energy_are_named() -> None:
    """Two tokens only, neither of which W's directions see."""
    weight, s = layer(4, 33)
    weight[:, 16:] = 0
    silent = torch.zeros(33, 33, dtype=torch.float64)
    silent[20, 20] = 1.0
    with pytest.raises(UnsolvableLayer, match="of the mean input energy over the samples, .*take more samples"):
        solve_filet(LayerStatistics(None, silent, s.output_fisher, 2), weight, 2, plain_variance=1 / 99)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_cov", float("inf"), "input covariance is not finite"),
        ("output_fisher", 0.0, "output Fisher is zero"),
        ("weight", float("nan"), "weight is not finite"),
        ("weight", 0.0, "weight is zero$"),
    ],
)
def test_what_is_impossible_is_named(name: str, value: float, message: str) -> None:
    weight, s = layer(10, 12)
    given = {"weight": weight, "input_cov": s.input_cov, "output_fisher": s.output_fisher}
    given[name] = torch.full_like(given[name], value)
    with pytest.raises(UnsolvableLayer, match=message):
        solve_filet(
            LayerStatistics(None, given["input_cov"], given["output_fisher"], 1), given["weight"], 2, plain_variance=1.0
        )


def test_the_weight_is_left_as_it_is() -> None:
    weight, s = layer(10, 12)
    before = weight.clone()
    solve_filet(s, weight, 2, plain_variance=1.0)
    assert torch.equal(weight, before)
