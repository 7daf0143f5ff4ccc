"""What the default start is to reach against plain LoRA and its neighbours, and whether it does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.quality.analysis import PLAIN, Comparison
from benchmarks.quality.formatting import learning_rate, percent, share
from benchmarks.quality.intervals import interval, mean
from benchmarks.quality.pairs import same_rate_difference, share_at, shorter_difference, wall_share_at
from benchmarks.quality.sections import Section
from benchmarks.quality.starts import A_TIMES

NOT_WORSE = 0.005  # relative loss difference at plain LoRA's best rate
FEWER_STEPS, LESS_TIME = 0.6, 0.7  # of plain LoRA's
FEWEST_SEEDS = 2
RIVALS = ("eva", "lora_one", "lora_ga")  # methods; plain LoRA with another A beside them
AXOLOTLS = (0.5, 2e-4)  # alpha/r and rate
A_THIRD = (0.28, 0.38)  # of plain LoRA's best rate, by grids of quarters of a decade
AVERAGE = "mean over tasks"
GOALS = {
    1: "at users' settings (Axolotl's, and a third of plain LoRA's best rate) plain LoRA's final loss in at most 0.6 × "
    "its steps and 0.7 × its wall time, the initialisation counted",
    2: "at plain LoRA's best rate, the 95 % interval of the loss difference lies below +0.5 % (task), below 0 (mean)",
    3: "at users' settings, trained with a schedule of 0.7 × the steps, not behind plain LoRA's whole run",
    4: "ahead of EVA, LoRA-One, LoRA-GA and plain LoRA with its A rescaled in (1), (2) and (3)",
}


@dataclass(frozen=True)
class Verdict:
    """One goal (a key of `GOALS`) held against one start: what of, the number, and whether met (None: undecided)."""

    goal: int
    of: str
    value: str
    met: bool | None


def verdicts(section: Section, label: str) -> list[Verdict]:
    """Every goal of one start in one section. Undecided is what has not been run, or for one seed only."""
    return [
        *_fewer_steps(section, label),
        *_not_worse(section, label),
        *_shorter(section, label),
        *_rivals(section, label),
    ]


def users_rates(comparison: Comparison) -> list[float]:
    """The rates of users' settings among those that plain LoRA was run at."""
    rates = list(comparison.starts[PLAIN].by_rate) if PLAIN in comparison.starts else []
    best = comparison.rate(PLAIN)
    if comparison.conditions.alpha_over_r == AXOLOTLS[0]:
        return [rate for rate in rates if math.isclose(rate, AXOLOTLS[1])]
    return [rate for rate in rates if best is not None and A_THIRD[0] <= rate / best <= A_THIRD[1]]


def _at_users_settings(section: Section) -> Iterator[tuple[Comparison, float, str]]:
    for comparison in section.comparisons:
        for rate in users_rates(comparison):
            yield comparison, rate, f"{comparison.conditions.task} at {learning_rate(rate)}"


def _fewer_steps(section: Section, label: str) -> Iterator[Verdict]:
    for comparison, rate, of in _at_users_settings(section):
        steps, time = share_at(comparison, label, rate), wall_share_at(comparison, label, rate)
        met = None
        if steps is not None and time is not None and _seeds(comparison, label, rate) >= FEWEST_SEEDS:
            met = steps <= FEWER_STEPS and time <= LESS_TIME
        yield Verdict(1, of, f"{share(steps)} of the steps, {share(time)} of the time", met)


def _not_worse(section: Section, label: str) -> Iterator[Verdict]:
    if section.conditions.alpha_over_r == AXOLOTLS[0]:  # run at one rate
        return
    differences = {c.conditions.task: same_rate_difference(c, label) for c in section.comparisons}
    for of, seeds, limit in (
        *((task, seeds, NOT_WORSE) for task, seeds in differences.items()),
        (AVERAGE, section.average(same_rate_difference, label), 0.0),
    ):
        found = interval(seeds.values())
        yield Verdict(2, of, percent(found), None if found is None or found.n < FEWEST_SEEDS else found.high < limit)


def _shorter(section: Section, label: str) -> Iterator[Verdict]:
    for comparison, rate, of in _at_users_settings(section):
        found = interval(shorter_difference(comparison, label, rate).values())
        yield Verdict(3, of, percent(found), None if found is None or found.n < FEWEST_SEEDS else found.mean <= 0)


def _rivals(section: Section, label: str) -> Iterator[Verdict]:
    cells = {name: c.starts[name].cell for c in section.comparisons for name in c.starts}
    for method in RIVALS:
        rivals = [name for name, cell in cells.items() if cell.method == method and name != label]
        yield from (_against(section, label, rival) for rival in rivals)
        if not rivals:
            yield Verdict(4, method, "not run", None)
    rescaled = [name for name, cell in cells.items() if cell.method == PLAIN and A_TIMES in cell.settings]
    yield from (_against(section, label, rival) for rival in rescaled)
    if not rescaled:
        yield Verdict(4, "plain LoRA, A rescaled", "not run", None)


def _against(section: Section, label: str, rival: str) -> Verdict:
    """Steps and the shorter run at users' settings, final losses at plain LoRA's best rate: what both were run for."""
    ahead: list[bool] = []
    told: list[str] = []
    few = False
    for comparison, rate, of in _at_users_settings(section):
        steps, its_steps = (share_at(comparison, name, rate) for name in (label, rival))
        if steps is not None and its_steps is not None:
            ahead.append(steps < its_steps)
            told.append(f"{of} {share(steps)} against {share(its_steps)} of the steps")
            few |= min(_seeds(comparison, name, rate) for name in (label, rival)) < FEWEST_SEEDS
        shorter = [shorter_difference(comparison, name, rate) for name in (label, rival)]
        if all(shorter):
            ahead.append(mean(shorter[0].values()) < mean(shorter[1].values()))
    if section.conditions.alpha_over_r != AXOLOTLS[0]:
        found = interval(section.average(same_rate_difference, label, rival).values())
        if found is not None:
            ahead.append(found.mean < 0)
            told.append(f"at plain LoRA's best rate {percent(found)}")
            few |= found.n < FEWEST_SEEDS
    return Verdict(4, rival, "; ".join(told) or "not run", all(ahead) if ahead and not few else None)


def _seeds(comparison: Comparison, label: str, rate: float) -> int:
    """How many seeds of a start have a run of plain LoRA beside them."""
    return len(set(comparison.results(label, rate)) & set(comparison.results(PLAIN, rate)))
