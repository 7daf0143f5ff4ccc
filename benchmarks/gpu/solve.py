"""The solve of one layer alone, on statistics of a decaying spectrum: seconds, kernels, decompositions, memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.parts import Figures, Part, Place
from benchmarks.measure import measured
from lora_da.memory import GIB
from lora_da.methods import METHODS
from lora_da.methods.common import LayerSpec
from lora_da.products import full_float32
from lora_da.statistics import LayerStatistics

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))  # inputs, outputs
RANKS = (16, 64)
REPEATS = 3
TOKENS = 4096  # that the statistics are of: fewer than the widest layer has inputs
POPULATION = 1e6
DECAY = 1.5  # of the standard deviations of the inputs' directions, as a power of their number
LISTED = 8  # kernels, the longest first

# As torch names them; those with an underscore before are what the others call.
DECOMPOSITIONS = ("linalg_qr", "linalg_eigh", "linalg_svd", "linalg_cholesky_ex", "cholesky_inverse", "geqrf")
TRIANGULAR = ("cholesky_solve", "linalg_solve_triangular", "triangular_solve")


def parts(place: Place) -> list[Part]:
    shapes = ((64, 192),) if place.toy else SHAPES
    ranks = (4,) if place.toy else RANKS
    return [Part(f"{i}→{o}, rank {r}", partial(_solved, place.device, i, o, r)) for i, o in shapes for r in ranks]


def _solved(device: torch.device, i: int, o: int, rank: int) -> Figures:
    method = METHODS["lora_da"]
    preset, statistics = method.presets["default"], _statistics(i, o, device)
    assert method.prepare is not None

    def prepared() -> Any:
        return method.prepare(statistics.input_cov, preset)  # type: ignore[misc]

    def solved(prepared: Any) -> Any:
        return method.solve(
            statistics, LayerSpec(f"{i} × {rank}", rank, 1 / (3 * i), POPULATION, None, prepared), preset
        )

    with full_float32():
        factors, _ = measured(lambda: solved(prepared()), device)  # handles and kernels are made
        _, whole = measured(lambda: solved(prepared()), device)
        figures: Figures = {"bias_captured": factors.bias_captured, "condition": factors.condition}
        if whole.gpu_increase is not None:
            figures["peak_gib"] = whole.gpu_increase / GIB
            figures["forecast_gib"] = method.needs.solving(i, o) / GIB
        of_Z = prepared()
        for name, work in (("of_Z", prepared), ("of_layer", lambda: solved(of_Z))):
            figures[f"{name}_seconds"] = median(measured(work, device)[1].seconds for _ in range(REPEATS))
            figures |= {f"{name}_{what}": value for what, value in _profiled(work, device).items()}
    return figures


def _statistics(i: int, o: int, device: torch.device) -> LayerStatistics:
    """Means over random tokens, inputs and gradients with a few strong directions."""
    generator = torch.Generator(device).manual_seed(0)

    def rows(width: int) -> Tensor:  # (n, width)
        sizes = torch.arange(1, width + 1, device=device).pow(-DECAY / 2)
        return torch.randn(min(TOKENS, 4 * i), width, device=device, generator=generator) * sizes

    x, d = rows(i), rows(o)
    n = len(x)
    return LayerStatistics(d.T @ x / n, x.T @ x / n, d.square().mean(0), n)


def _profiled(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Count what one run does: kernels, decompositions and triangular solves, and the kernels that take the longest."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=activities) as profile:
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
    seen = profile.key_averages()

    def count(names: tuple[str, ...]) -> int:
        return sum(event.count for event in seen if event.key in {f"aten::{name}" for name in names})

    found: dict[str, Any] = {"decomposition_calls": count(DECOMPOSITIONS), "triangular_calls": count(TRIANGULAR)}
    if on_gpu:
        found["launches"] = sum(event.count for event in seen if "LaunchKernel" in event.key)
        found["synchronisation_calls"] = sum(event.count for event in seen if "Synchronize" in event.key)
        longest = sorted(seen, key=lambda event: -event.self_device_time_total)[:LISTED]
        found["longest"] = [[e.key[:80], e.count, e.self_device_time_total / 1e6] for e in longest]
    return found
