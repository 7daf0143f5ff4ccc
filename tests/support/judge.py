"""Whether an adapter starts where LoRA-DA says, judged in float64 by the oracle, whatever the gaps of the spectrum.

Eigenvectors turn freely where eigenvalues are alike, so they are not compared. What is written must be a minimiser of
the oracle's objective, hold the oracle's step within its own subspace, and have plain LoRA's input energy, as far as it
is solved for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from models import PREFIX, Document
from oracle import OracleStatistics, objective, oracle_solve, oracle_statistics
from peft import PeftModel
from torch import Tensor, nn

from lora_da import LoraDAConfig
from lora_da.report import InitReport


def truth(base: nn.Module, rows: Sequence[Document], names: Iterable[str]) -> dict[str, OracleStatistics]:
    """The oracle's statistics of the `default` preset, under the layers' names in the PEFT model."""
    found = oracle_statistics(base, rows, [name.removeprefix(PREFIX) for name in names], "tokens")
    return {PREFIX + name: statistics for name, statistics in found.items()}


def worst_start(
    model: PeftModel,
    report: InitReport,
    statistics: Mapping[str, OracleStatistics],
    population: int,
    adapter: str = "default",
    gaussian: bool = False,
) -> float:
    """The largest relative error of any initialised layer's factors, under the `default` preset.

    Args:
        population: documents in the training set.
        gaussian: whether the adapter's plain start draws from N(0, 1/r²) and not from PEFT's uniform distribution.
    """
    assert report.layers and report.layers.keys() <= statistics.keys()
    return max(
        error
        for name in report.layers
        for error in errors_of(*_factors(model, name, adapter), statistics[name], population, gaussian)
    )


def _factors(model: PeftModel, name: str, adapter: str) -> tuple[Tensor, Tensor]:
    layer: Any = model.get_submodule(name)
    return layer.lora_A[adapter].weight.detach().double(), layer.lora_B[adapter].weight.detach().double()


def errors_of(a: Tensor, b: Tensor, seen: OracleStatistics, population: int, gaussian: bool) -> Iterable[float]:
    """How far the solved rows are off, infinitely where those beside them move anything or one of them is zero."""
    preset, (rank, i) = LoraDAConfig().numbers(), a.shape
    plain_variance = 1 / rank**2 if gaussian else 1 / (3 * i)
    rank = (rank + 1) // 2  # those that are solved for
    yield math.inf if b[:, rank:].any() or not a[rank:].any(1).all() else 0.0
    a, b = a[:rank], b[:, :rank]
    energy = rank * seen.input_cov.trace().item() * plain_variance
    best = oracle_solve(
        seen.grad,
        seen.input_cov,
        seen.output_fisher.diagonal(),
        rank,
        population=population * seen.n_loss_tokens / seen.n_samples,
        variance_weight=preset.variance_weight,
        damping=preset.damping,
        relative_damping=True,
        gamma=preset.gamma,
        normalize_step=True,
        input_energy=energy,
    )
    ours = torch.linalg.qr(a.T).Q  # (i, r)
    scale = best.eigenvalues.abs().max()
    yield ((objective(best.omega, ours) - objective(best.omega, best.subspace)) / scale).item()
    step = (ours @ ours.T @ best.direction).T / preset.gamma
    yield (torch.linalg.norm(b @ a - step) / torch.linalg.norm(step)).item()
    yield abs((a @ seen.input_cov @ a.T).trace().item() / energy - 1)
