"""Results by the conditions they were made under, and the learning rate that suits each start there."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.quality.intervals import mean
from benchmarks.quality.results import Cell, Result

PLAIN = "plain"  # the start everything is compared with
DEVELOPMENT = "development"
FEWEST_POINTS = 5  # of a grid of learning rates
SHORTER = 0.7  # of the steps: a run with a complete schedule of its own, held against plain LoRA's whole run


@dataclass(frozen=True, order=True)
class Conditions:
    """What is equal for all starts that are compared with each other; see `Cell`."""

    split: str
    rank: int
    steps: int
    batch: int
    model: str
    base: str
    adapters: str
    alpha_over_r: float
    task: str
    data: str
    length: int
    heldout_rows: int
    curve_rows: int

    @classmethod
    def of(cls, cell: Cell) -> Conditions:
        return cls(**{name: getattr(cell, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Runs:
    """All runs of one start under one set of conditions: `by_rate[rate][seed]`, rates ascending."""

    label: str
    by_rate: Mapping[float, Mapping[int, Result]]

    @property
    def cell(self) -> Cell:
        """One of the cells."""
        return self.all[0].cell

    @property
    def all(self) -> list[Result]:
        return [result for results in self.by_rate.values() for result in results.values()]

    @property
    def own_base(self) -> bool:
        return any(result.own_base for result in self.all)

    def at(self, rate: float | None) -> Mapping[int, Result]:
        """Give the results by seed; none where nothing has finished at this rate."""
        return {} if rate is None else self.by_rate.get(rate, {})

    def finals(self, rate: float | None) -> dict[int, float]:
        """Give the final held-out loss by seed."""
        return {seed: result.final for seed, result in self.at(rate).items()}

    def best_rate(self) -> float | None:
        """Find the rate of the lowest mean final loss, over the seeds that all rates have finished; over all seeds of
        each while there is no such seed. Rates with a loss that is no number are out of it; None if all are."""
        seeds = set.intersection(*(set(results) for results in self.by_rate.values()))
        means = {}
        for rate in self.by_rate:
            finals = self.finals(rate)
            means[rate] = mean(finals[seed] for seed in (seeds or finals))
        finite = [rate for rate, loss in means.items() if math.isfinite(loss)]
        return min(finite, key=means.__getitem__, default=None)


@dataclass(frozen=True)
class ChosenRate:
    """The learning rate a start is judged at: on which rows it was chosen, from how many, and whether it is the grid's
    end."""

    rate: float | None
    split: str
    length: int
    points: int
    at_edge: bool


@dataclass(frozen=True)
class Comparison:
    """All starts under one set of conditions, plain LoRA first, and the rate chosen for each. `shorter`: what was run
    with `SHORTER` of the steps and under the same conditions otherwise; None without any."""

    conditions: Conditions
    starts: Mapping[str, Runs]
    chosen: Mapping[str, ChosenRate]
    shorter: Comparison | None = None

    def rate(self, label: str) -> float | None:
        """Give the start's own best rate; None without one."""
        return self.chosen[label].rate if label in self.chosen else None

    def results(self, label: str, rate: float | None) -> Mapping[int, Result]:
        """Give the results by seed; none where nothing has finished."""
        return self.starts[label].at(rate) if label in self.starts else {}

    def finals(self, label: str, rate: float | None) -> dict[int, float]:
        """Give the final held-out loss by seed."""
        return {seed: result.final for seed, result in self.results(label, rate).items()}


def compare(results: Iterable[Result]) -> list[Comparison]:
    """Put the results by conditions, in a fixed order.

    On another split than development, the rates are those that development has chosen under the same conditions, or
    with rows of another length; only a start that was not run there is judged at its best rate on the split itself.
    What was chosen says which.
    """
    results = list(results)
    names = labels(result.cell for result in results)
    found: dict[Conditions, dict[str, dict[float, dict[int, Result]]]] = {}
    for result in results:
        cell = result.cell
        starts = found.setdefault(Conditions.of(cell), {})
        starts.setdefault(names[cell], {}).setdefault(cell.rate, {}).setdefault(cell.seed, result)
    runs = {}
    for conditions, starts in sorted(found.items()):
        ordered = sorted(starts, key=lambda label: label != PLAIN)  # the others as they came
        runs[conditions] = {label: Runs(label, dict(sorted(starts[label].items()))) for label in ordered}
    found_at = {at: Comparison(at, starts, _chosen_rates(at, runs)) for at, starts in runs.items()}
    return [replace(comparison, shorter=found_at.get(shorter(at))) for at, comparison in found_at.items()]


def shorter(conditions: Conditions) -> Conditions:
    """The same, with `SHORTER` of the steps."""
    return replace(conditions, steps=round(SHORTER * conditions.steps))


def labels(cells: Iterable[Cell]) -> dict[Cell, str]:
    """Name each cell's start: the sweep's, and what tells starts apart that have the same name there."""
    knobs = {cell: _knobs(cell) for cell in cells}
    named: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell, its_knobs in knobs.items():
        if its_knobs not in named[cell.start]:
            named[cell.start].append(its_knobs)
    found = {}
    for cell, its_knobs in knobs.items():
        others = named[cell.start]
        apart = [name for name in its_knobs if any(other.get(name, ...) != its_knobs[name] for other in others)]
        text = ", ".join(f"{name} {its_knobs[name]}" for name in sorted(apart))
        if not text and len(others) > 1:
            text = "as preset"
        found[cell] = f"{cell.start} ({text})" if text else cell.start
    return found


def _knobs(cell: Cell) -> dict[str, Any]:
    # Plain LoRA looks at no samples, whatever the sweep says for all.
    if cell.start == PLAIN:
        return {}
    return {"init_samples": cell.init_samples, "method": cell.method, **cell.settings, "numbers": cell.numbers}


def _chosen_rates(conditions: Conditions, runs: Mapping[Conditions, Mapping[str, Runs]]) -> dict[str, ChosenRate]:
    twins = [other for other in runs if other.split == DEVELOPMENT and _unsplit(other) == _unsplit(conditions)]
    if conditions.split == DEVELOPMENT:
        twins = [conditions]
    # of several, the same length and then the most rows
    twin = max(twins, key=lambda other: (other.length == conditions.length, other), default=conditions)
    found = {}
    for label, own in runs[conditions].items():
        chosen_on = twin if label in runs[twin] else conditions
        start = runs[twin].get(label, own)
        rate, rates = start.best_rate(), list(start.by_rate)
        at_edge = rate in (rates[0], rates[-1])
        found[label] = ChosenRate(rate, chosen_on.split, chosen_on.length, len(rates), at_edge)
    return found


def _unsplit(conditions: Conditions) -> Conditions:
    return replace(conditions, split="", length=0, heldout_rows=0, curve_rows=0)
