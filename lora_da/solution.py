"""What the passes over the samples gave, whether that is good enough to be written, and the report of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_da.adapter import Adapter, AdapterLayer, describe_left
from lora_da.cache.store import Solution
from lora_da.collect.plan import Plan
from lora_da.errors import LoraDAError
from lora_da.methods.common import LoraFactors
from lora_da.model.experts import Routed
from lora_da.report import InitReport, LayerReport
from lora_da.samples.draw import InitData

logger = logging.getLogger(__name__)

MAX_FAILED_SHARE = 0.05  # more layers than this without a solution mean that something is wrong with the model or data


@dataclass
class Estimate:
    """What the passes over the samples gave, by layer."""

    plan: Plan
    full_fisher: frozenset[str]
    routed: Mapping[str, Routed]
    factors: dict[str, LoraFactors] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    loss: float = math.nan

    def add(
        self, factors: dict[str, LoraFactors], failed: dict[str, str], left: dict[str, str], tokens: dict[str, int]
    ) -> None:
        """What one process has solved."""
        self.factors |= factors
        self.failed |= failed
        self.left |= left
        self.tokens |= tokens


def solution_of(estimate: Estimate, adapter: Adapter, data: InitData) -> Solution:
    """The factors and the report of an estimate that is good enough to be written."""
    _check_failed(estimate.failed, len(adapter.layers))
    if estimate.left:
        _check_experts(estimate)
    report = InitReport(
        initialized=len(estimate.factors),
        targeted=len(adapter.layers) + len(adapter.left),
        failed=estimate.failed,
        left=adapter.left | estimate.left,
        samples=data.n_samples,
        sample_unit=data.unit,
        tokens=data.n_tokens,
        loss_tokens=data.n_loss_tokens,
        population_size=data.population_size,
        loss=estimate.loss,
        plan=estimate.plan.line(),
        forecast={"device": estimate.plan.used + estimate.plan.device_bytes, "cpu": estimate.plan.cpu_bytes},
        timings=estimate.timings,
        layers={a.name: _layer_report(a, estimate) for a in adapter.layers if a.name in estimate.factors},
    )
    return Solution({name: (f.lora_A, f.lora_B) for name, f in estimate.factors.items()}, report)


def _layer_report(layer: AdapterLayer, estimate: Estimate) -> LayerReport:
    factors = estimate.factors[layer.name]
    return LayerReport(
        rank=layer.rank,
        tokens=estimate.tokens[layer.name],
        bias_captured=factors.bias_captured,
        damping_input=factors.damping_input,
        damping_output=factors.damping_output,
        full_fisher=layer.name in estimate.full_fisher,
        condition=factors.condition,
        residual=factors.residual,
        relative_step=layer.relative_step(factors.lora_A, factors.lora_B),
    )


def _check_failed(failed: dict[str, str], n_layers: int) -> None:
    if len(failed) > MAX_FAILED_SHARE * n_layers:
        name, reason = next(iter(failed.items()))
        raise LoraDAError(f"{len(failed)} of {n_layers} layers have no solution; {name}: {reason}")


def warn_of_kept(report: InitReport, adapter: Adapter) -> None:
    """Of the layers that could not be solved, and of those left since, beside what the adapter itself has named."""
    if report.failed:
        name, reason = next(iter(report.failed.items()))
        logger.warning("LoRA-DA: %d layers keep PEFT's init; %s: %s", len(report.failed), name, reason)
    left = {name: reason for name, reason in report.left.items() if name not in adapter.left}
    if left:
        logger.warning(describe_left(left))


def _check_experts(estimate: Estimate) -> None:
    """That some expert of every mixture was seen with tokens: all of them idle means that nothing was seen."""
    seen = {estimate.routed[name].mixture for name in (*estimate.factors, *estimate.failed) if name in estimate.routed}
    for name in estimate.left:
        if estimate.routed[name].mixture not in seen:
            raise LoraDAError(
                f"layer {name} and all other experts beside it were never seen with a token: their forward is replaced "
                "(a fused kernel?); switch the kernel off or take them out of target_modules"
            )
