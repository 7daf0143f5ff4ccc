"""Starts against plain LoRA: paired differences, steps to the same loss, divergences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.quality.analysis import PLAIN, Comparison
from benchmarks.quality.intervals import mean
from benchmarks.quality.results import Cell, Result
from benchmarks.quality.starts import A_TIMES, UNCLIPPED

Seeds = Mapping[int, float]  # a number for each seed
SOLVED_ALIKE = (A_TIMES, UNCLIPPED, "match_rate")  # settings that change neither the solution nor the time of a step


def relative(values: Seeds, to: Seeds) -> dict[int, float]:
    """values / to − 1 by seed, where both are there."""
    return {seed: values[seed] / to[seed] - 1 for seed in values if seed in to}


def own_difference(comparison: Comparison, label: str, to: str = PLAIN) -> dict[int, float]:
    """Relative difference of the final losses by seed, each at its own best rate. Empty where they do not pair."""
    return _difference(comparison, label, comparison.rate(label), to, comparison.rate(to))


def same_rate_difference(comparison: Comparison, label: str, to: str = PLAIN) -> dict[int, float]:
    """Relative difference of the final losses by seed, both at plain LoRA's best rate. Empty where they do not pair."""
    rate = comparison.rate(PLAIN)
    return _difference(comparison, label, rate, to, rate)


def over_tasks(by_task: Sequence[Seeds]) -> dict[int, float]:
    """The mean over tasks, by seed: of the seeds that all tasks have."""
    seeds = set.intersection(*map(set, by_task)) if by_task else set()
    return {seed: mean(values[seed] for values in by_task) for seed in sorted(seeds)}


def mean_curve(results: Mapping[int, Result], seeds: Iterable[int]) -> list[tuple[int, float]]:
    """(step, held-out loss), the mean over these seeds at the steps that all of them have."""
    return _mean_of([results[seed].heldout for seed in seeds])


def first_step_at(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """The first step, interpolated, at which a curve is down at a loss; None if it never is."""
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value <= loss:
            if before is None or not math.isfinite(before[1]):
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (step, value)
    return None


def share_of_steps(comparison: Comparison, label: str) -> float | None:
    """Steps until plain LoRA's final loss, over all steps; each at its own best rate, mean curves over shared seeds.

    Infinite if the start never gets there, None if nothing can be said yet.
    """
    return _share(comparison, label, comparison.rate(label), comparison.rate(PLAIN))


def share_at(comparison: Comparison, label: str, rate: float) -> float | None:
    """`share_of_steps` with both at one rate."""
    return _share(comparison, label, rate, rate)


def wall_share_at(comparison: Comparison, label: str, rate: float) -> float | None:
    """Wall time until plain LoRA's final loss, over that of plain LoRA's whole run; both at one rate, the start's
    initialisation included, no evaluation. None where the time of a step was not measured."""
    share, own, plain = share_at(comparison, label, rate), init_steps(comparison, label), init_steps(comparison, PLAIN)
    if share is None or own is None or plain is None:
        return None
    return (share * comparison.conditions.steps + own) / (comparison.conditions.steps + plain)


def init_steps(comparison: Comparison, label: str) -> float | None:
    """How many training steps a start takes the time of: the mean over runs that solved it, or the same but for the
    scale of its lora_A, and timed their steps."""
    if label not in comparison.starts:
        return None
    asked = _solved(comparison.starts[label].cell)
    runs = [run for runs in comparison.starts.values() if _solved(runs.cell) == asked for run in runs.all]
    found = [run.init_seconds / run.step_seconds for run in runs if run.step_seconds and not run.from_cache]
    return mean(found) if found else None


def _solved(cell: Cell) -> tuple[str, dict[str, Any], int]:
    """What a start is solved by, whatever its lora_A is multiplied by then."""
    settings = {name: value for name, value in cell.settings.items() if name not in SOLVED_ALIKE}
    return cell.method, settings, cell.init_samples


def shorter_difference(comparison: Comparison, label: str, rate: float) -> dict[int, float]:
    """Relative difference by seed of a start's final loss after `SHORTER` of the steps to plain LoRA's after all."""
    if comparison.shorter is None or comparison.starts[label].own_base:
        return {}
    return relative(comparison.shorter.finals(label, rate), comparison.finals(PLAIN, rate))


def diverged(comparison: Comparison, label: str) -> list[float]:
    """The rates at which a seed of the start has diverged."""
    by_rate = comparison.starts[label].by_rate
    return [rate for rate, results in by_rate.items() if any(result.diverged for result in results.values())]


def diverged_alone(comparison: Comparison, label: str) -> list[float]:
    """The rates at which a seed of the start has diverged, and none of plain LoRA's, which were run there too."""
    if PLAIN not in comparison.starts:
        return []
    plain = set(comparison.starts[PLAIN].by_rate) - set(diverged(comparison, PLAIN))
    return [rate for rate in diverged(comparison, label) if rate in plain]


def _share(comparison: Comparison, label: str, rate: float | None, plain_rate: float | None) -> float | None:
    if label not in comparison.starts or comparison.starts[label].own_base:
        return None
    plain, own = comparison.results(PLAIN, plain_rate), comparison.results(label, rate)
    seeds = sorted(set(plain) & set(own))
    if not seeds:
        return None
    step = _crossing([own[seed] for seed in seeds], [plain[seed] for seed in seeds])
    return math.inf if step is None else step / comparison.conditions.steps


def _crossing(own: Sequence[Result], plain: Sequence[Result]) -> float | None:
    """The first step at which the mean loss is down at plain LoRA's final one; None if it never is.

    On all held-out rows from where these were first looked at during training; before that, on the curve's rows.
    """
    full = _mean_of([run.full for run in own])
    end = mean(run.final for run in plain)
    if len(full) > 1 and full[0][1] > end:
        return first_step_at(full, end)
    step = first_step_at(_mean_of([run.heldout for run in own]), mean(run.heldout[-1][1] for run in plain))
    if len(full) > 1 and full[0][1] <= end:  # by then at the latest
        return min(full[0][0], math.inf if step is None else step)
    return step


def _mean_of(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Average at the steps that all curves have."""
    by_step = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    return [(step, mean(curve[step] for curve in by_step)) for step in steps]


def _difference(
    comparison: Comparison, label: str, rate: float | None, to: str, to_rate: float | None
) -> dict[int, float]:
    if any(comparison.starts[name].own_base for name in (label, to) if name in comparison.starts):
        return {}
    return relative(comparison.finals(label, rate), comparison.finals(to, to_rate))
