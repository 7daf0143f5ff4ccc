"""What the passes over the samples gave, whether that is good enough to be written, and the report of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lora_da.adapter import Adapter, AdapterLayer, describe_left
from lora_da.collect import Collected, HandedOver
from lora_da.errors import LoraDAError
from lora_da.methods.common import LoraFactors
from lora_da.needs import Needs
from lora_da.report import InitReport, LayerReport
from lora_da.samples.draw import InitData
from lora_da.statistics import NotServed

MAX_FAILED_SHARE = 0.05  # more layers than this without a solution mean that something is wrong with the model or data

# `gradient_size` of a layer beside the largest: below, it is what float32 leaves of nothing. On questions of GSM8K the
# smallest of SmolLM2-135M's is 2e-3 of the largest. On rows of two tokens its queries and keys have no gradient: theirs
# is 2e-8 at most, the smallest of the others 2e-4. Tiny models leave up to 2e-7 of nothing.
MIN_GRADIENT = 1e-6


@dataclass(frozen=True)
class Solution:
    """What is to be written, and the report of how it came about.

    Args:
        factors: lora_A (r, i) and lora_B (o, r) by layer, on the CPU, in the parameters' dtypes.
        report: of the run that solved them; its time and memory are not stored.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    report: InitReport


def solution_of(collected: Collected[LoraFactors], adapter: Adapter, data: InitData, needs: Needs) -> Solution:
    """The factors and the report of what is good enough to be written.

    Raises:
        LoraDAError: too many layers have no solution, or no expert of a mixture was seen with a token.
    """
    outcomes = collected.layers.outcomes | _of_rounding(collected.layers) | _unseen(adapter, collected)
    kept = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, NotServed)}
    factors = {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, NotServed)}
    failed = {name: outcome.why for name, outcome in kept.items() if outcome.failed}
    left = {name: outcome.why for name, outcome in kept.items() if not outcome.failed}
    _check_failed(failed, len(adapter.layers))
    _check_experts(left, collected)
    if not factors:
        raise LoraDAError(f"no layer can be started from data: {describe_left(left)}; target others")
    plan = collected.plan
    report = InitReport(
        initialized=len(factors),
        targeted=len(adapter.layers) + len(adapter.left),
        failed=failed,
        left=adapter.left | left,
        samples=data.n_samples,
        sample_unit=data.unit,
        tokens=data.n_tokens,
        loss_tokens=data.n_loss_tokens,
        population_size=data.population_size,
        loss=collected.loss,
        gradient_norms=_of_rows(collected, data),
        plan=plan.line(),
        forecast={"device": plan.used + plan.device_bytes, "cpu": plan.cpu_bytes},
        timings=collected.timings,
        layers={
            layer.name: _layer_report(layer, factors[layer.name], collected.layers.tokens[layer.name], needs)
            for layer in adapter.layers
            if layer.name in factors
        },
    )
    return Solution({name: (f.lora_A, f.lora_B) for name, f in factors.items()}, report)


def _of_rows(collected: Collected[LoraFactors], data: InitData) -> list[tuple[int, float]]:
    """Gradient norms by row; one that is not finite overflowed, and tells nothing."""
    norms = {row.row: collected.gradient_norms.get(row.digest, math.nan) for row in data.looked_at}
    return [(row, norm) for row, norm in norms.items() if math.isfinite(norm)]


def _of_rounding(layers: HandedOver[LoraFactors]) -> dict[str, NotServed]:
    """The solved layers whose gradient is rounding."""
    largest = max(filter(math.isfinite, layers.gradients.values()), default=0.0)
    return {
        name: NotServed(
            f"its gradient is zero but for rounding, {size / largest:.1e} of another layer's; does it take part in the "
            "loss?"
        )
        for name, size in layers.gradients.items()
        if isinstance(layers.outcomes[name], LoraFactors) and size < MIN_GRADIENT * largest
    }


def _unseen(adapter: Adapter, collected: Collected[LoraFactors]) -> dict[str, NotServed]:
    """The slices of parameters of which no slice was seen with a token: more than idle experts."""
    slices = {layer.name: layer.slice for layer in adapter.layers if layer.slice is not None}
    seen = {slices[name].stack for name in collected.layers.tokens if name in slices}
    return {name: NotServed(s.why_unseen, failed=False) for name, s in slices.items() if s.stack not in seen}


def _layer_report(layer: AdapterLayer, factors: LoraFactors, tokens: int, needs: Needs) -> LayerReport:
    return LayerReport(
        rank=layer.rank,
        tokens=tokens,
        bias_captured=factors.bias_captured,
        damping_input=factors.damping_input,
        damping_output=factors.damping_output,
        full_fisher=needs.full_fisher(layer.out_features),
        condition=factors.condition,
        residual=factors.residual,
        relative_step=layer.relative_step(factors.lora_A, factors.lora_B),
        fisher_length=None if factors.fisher_length is None else abs(layer.scaling) * factors.fisher_length,
    )


def _check_failed(failed: dict[str, str], n_layers: int) -> None:
    if len(failed) > MAX_FAILED_SHARE * n_layers:
        name, reason = next(iter(failed.items()))
        raise LoraDAError(f"{len(failed)} of {n_layers} layers have no solution; {name}: {reason}")


def describe_kept(report: InitReport, adapter: Adapter) -> list[str]:
    """Sentences naming the layers that could not be solved, and those left since, beside what the adapter has named."""
    sentences = []
    if report.failed:
        name, reason = next(iter(report.failed.items()))
        sentences.append(f"LoRA-DA: {len(report.failed)} layers keep PEFT's init; {name}: {reason}")
    left = {name: reason for name, reason in report.left.items() if name not in adapter.left}
    return [*sentences, describe_left(left)] if left else sentences


def _check_experts(left: Mapping[str, str], collected: Collected[LoraFactors]) -> None:
    """Refuse a mixture of which no expert was seen with a token: all of them idle means that nothing was seen."""
    routed = {name: r.mixture for name, r in collected.routed.items() if isinstance(r.expert, nn.Module)}
    seen = {routed[name] for name in collected.layers.tokens if name in routed}
    for name in left:
        if name in routed and routed[name] not in seen:
            raise LoraDAError(
                f"layer {name} and all other experts beside it were never seen with a token: their forward is replaced "
                "(a fused kernel?); switch the kernel off or take them out of target_modules"
            )
