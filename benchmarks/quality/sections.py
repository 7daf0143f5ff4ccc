"""The tasks of one tier side by side, and the means over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.quality.analysis import PLAIN, Comparison, Conditions
from benchmarks.quality.intervals import mean
from benchmarks.quality.pairs import Seeds, over_tasks, share_of_steps

Difference = Callable[[Comparison, str, str], dict[int, float]]


# What may differ within a section; where a task would be in it twice, the next one counts.
OF_A_TASK: tuple[dict[str, Any], ...] = (
    {"task": "", "data": "", "length": 0, "heldout_rows": 0, "curve_rows": 0},
    {"task": "", "data": "", "curve_rows": 0},
    {},
)


@dataclass(frozen=True)
class Section:
    """The comparisons that differ in their task only (and in what belongs to it: its data, its length and its held-out
    rows). `alone`: one that others equal but for its data or the rows of its curve."""

    comparisons: tuple[Comparison, ...]
    alone: bool = False

    @property
    def conditions(self) -> Conditions:
        """The first task's."""
        return self.comparisons[0].conditions

    @property
    def title(self) -> str:
        """What no other section is called."""
        at = self.conditions
        rows = {(c.conditions.length, c.conditions.heldout_rows) for c in self.comparisons}
        shared = f"up to {at.length} tokens, {at.heldout_rows} rows held out, " if len(rows) == 1 else ""
        own = f", {at.task} of data {at.data}, a curve of {at.curve_rows} rows" if self.alone else ""
        how = f"{at.steps} steps of {at.batch}, {at.adapters} adapters, alpha/r {at.alpha_over_r:g}"
        return f"{at.split}, rank {at.rank}: {how}, {shared}{at.model} on {at.base}{own}"

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
    """Put comparisons together that differ in their task only; the held-out test first, then development.

    Where a task is there twice, with other lengths, rows or data, its comparisons get sections of their own: no task
    may count twice in a mean.
    """
    found: list[Section] = []
    arms = {comparison.shorter.conditions for comparison in comparisons if comparison.shorter is not None}
    left = [c for c in comparisons if PLAIN in c.starts or c.conditions not in arms]  # arms stand beside whole runs
    for of_a_task in OF_A_TASK:
        shared: dict[Conditions, list[Comparison]] = {}
        for comparison in left:
            shared.setdefault(replace(comparison.conditions, **of_a_task), []).append(comparison)
        left = []
        for members in shared.values():
            if len({comparison.conditions.task for comparison in members}) == len(members):
                found.append(Section(tuple(members), alone=not of_a_task))
            else:
                left += members
    return sorted(found, key=lambda section: (section.conditions.split != "test", section.conditions))
