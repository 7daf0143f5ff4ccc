"""The tasks of one tier side by side, and the means over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.quality.analysis import PLAIN, Comparison, Conditions
from benchmarks.quality.intervals import mean
from benchmarks.quality.pairs import Seeds, over_tasks, share_of_steps

Difference = Callable[[Comparison, str, str], dict[int, float]]


@dataclass(frozen=True)
class Section:
    """The comparisons that differ in their task only (and in what belongs to it: its length and its held-out rows)."""

    comparisons: tuple[Comparison, ...]

    @property
    def conditions(self) -> Conditions:
        """Of the first task."""
        return self.comparisons[0].conditions

    @property
    def title(self) -> str:
        at = self.conditions
        rows = {(c.conditions.length, c.conditions.heldout_rows) for c in self.comparisons}
        shared = f"up to {at.length} tokens, {at.heldout_rows} rows held out, " if len(rows) == 1 else ""
        return f"{at.split}, rank {at.rank}: {at.steps} steps of {at.batch}, {shared}{at.model} on {at.base}"

    @property
    def labels(self) -> list[str]:
        """The starts of all tasks, plain LoRA first."""
        return list(dict.fromkeys(label for comparison in self.comparisons for label in comparison.starts))

    def named(self, names: Sequence[str]) -> list[str]:
        """The labels of the starts that the sweep gives one of these names."""
        cells = {label: runs.cell for comparison in self.comparisons for label, runs in comparison.starts.items()}
        return [label for label in self.labels if cells[label].start in names]

    @property
    def tasks(self) -> list[str]:
        return [comparison.conditions.task for comparison in self.comparisons]

    def average(self, difference: Difference, label: str, to: str = PLAIN) -> Seeds:
        """The mean over tasks of paired differences, by seed; empty unless every task has it."""
        return over_tasks([difference(comparison, label, to) for comparison in self.comparisons])

    def average_share(self, label: str) -> float | None:
        """The mean over tasks of `share_of_steps`; None unless every task has it."""
        shares = [share_of_steps(comparison, label) for comparison in self.comparisons]
        known = [share for share in shares if share is not None]
        if len(known) < len(shares):
            return None
        return math.inf if math.inf in known else mean(known)


def sections(comparisons: Sequence[Comparison]) -> list[Section]:
    """By everything but the task; the held-out test first, then development.

    Where a task is there twice, with other lengths or rows, its comparisons get sections of their own: no task may
    count twice in a mean.
    """
    found: dict[Conditions, list[Comparison]] = {}
    for comparison in comparisons:
        found.setdefault(replace(comparison.conditions, task="", length=0, heldout_rows=0), []).append(comparison)
    by_tasks: dict[Conditions, list[Comparison]] = {}
    for shared, members in found.items():
        once = len({comparison.conditions.task for comparison in members}) == len(members)
        for comparison in members:
            by_tasks.setdefault(shared if once else replace(comparison.conditions, task=""), []).append(comparison)
    return sorted(
        (Section(tuple(members)) for members in by_tasks.values()),
        key=lambda section: (section.conditions.split != "test", section.conditions),
    )
