"""How the final loss depends on one setting, all else equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.quality.analysis import PLAIN, ChosenRate, Comparison, Conditions
from benchmarks.quality.pairs import Seeds, own_difference

KNOBS = ("init_samples", "damping", "gamma")  # beside the rank
PRESET = "preset's"  # the value of a setting that is not set


@dataclass(frozen=True)
class Point:
    """One value of a setting: its best rate, final losses by seed there, paired differences to plain LoRA's best."""

    value: Any
    chosen: ChosenRate
    finals: Seeds
    differences: Seeds


@dataclass(frozen=True)
class Line:
    """One start along one setting, over the seeds that all points have finished; `conditions` are the first point's."""

    knob: str
    conditions: Conditions
    start: str
    points: tuple[Point, ...]


def lines(comparisons: Sequence[Comparison]) -> list[Line]:
    """Find all starts run with several ranks, and all sets of starts that differ in one other setting only.

    Without those whose points share no seed yet: they cannot be compared.
    """
    found = [*_along_rank(comparisons), *(line for knob in KNOBS for c in comparisons for line in _along(c, knob))]
    return [line for line in found if any(point.finals for point in line.points)]


def _along_rank(comparisons: Sequence[Comparison]) -> Iterator[Line]:
    found: dict[tuple[Conditions, str], list[Comparison]] = {}
    for comparison in sorted(comparisons, key=lambda comparison: comparison.conditions.rank):
        for label in comparison.starts:
            found.setdefault((replace(comparison.conditions, rank=0), label), []).append(comparison)
    for (_, label), members in found.items():
        if len(members) > 1:
            points = [_point(c.conditions.rank, c, label) for c in members]
            yield Line("rank", members[0].conditions, label, _of_shared_seeds(points))


def _along(comparison: Comparison, knob: str) -> Iterator[Line]:
    families: list[tuple[Any, dict[Any, str]]] = []  # what is equal, and by value the start's label
    for label, runs in comparison.starts.items():
        if label == PLAIN:
            continue
        everything = {"init_samples": runs.cell.init_samples, "method": runs.cell.method, **runs.cell.settings}
        value = everything.pop(knob, PRESET)
        for equal, by_value in families:
            if equal == everything:
                by_value.setdefault(value, label)
                break
        else:
            families.append((everything, {value: label}))
    for _, by_value in families:
        if len(by_value) > 1:
            values = sorted(by_value, key=lambda value: (value == PRESET, value if value != PRESET else 0))
            names = dict.fromkeys(comparison.starts[by_value[value]].cell.start for value in values)
            points = [_point(value, comparison, by_value[value]) for value in values]
            yield Line(knob, comparison.conditions, " / ".join(names), _of_shared_seeds(points))


def _point(value: Any, comparison: Comparison, label: str) -> Point:
    finals = comparison.finals(label, comparison.rate(label))
    return Point(value, comparison.chosen[label], finals, own_difference(comparison, label))


def _of_shared_seeds(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points are compared with each other, so over the same seeds; one that has none (yet) is left out of that."""
    finished = [set(point.finals) for point in points if point.finals]
    seeds = set.intersection(*finished) if finished else set()
    return tuple(
        replace(
            point,
            finals={seed: point.finals[seed] for seed in seeds if seed in point.finals},
            differences={seed: point.differences[seed] for seed in seeds if seed in point.differences},
        )
        for point in points
    )
