"""What the default start is to reach against plain LoRA and its neighbours, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.quality.analysis import PLAIN, Comparison
from benchmarks.quality.formatting import learning_rate, percent, share
from benchmarks.quality.intervals import interval
from benchmarks.quality.pairs import (
    diverged,
    diverged_alone,
    own_difference,
    same_rate_difference,
    share_of_steps,
)
from benchmarks.quality.sections import Section

NOT_WORSE = 0.005  # relative loss difference at plain LoRA's best rate
FEWER_STEPS = 0.7  # of plain LoRA's
RIVALS = ("eva", "lora_one", "lora_ga")  # methods
AVERAGE = "mean over tasks"
GOALS = {
    1: "at plain LoRA's best rate, the 95 % interval of the loss difference lies below +0.5 % (task), below 0 (mean)",
    2: "each at its own best rate, the final loss is better on average",
    3: "plain LoRA's final loss in at most 0.7 × its steps, each at its own best rate",
    4: "no divergence at a rate where plain LoRA does not diverge",
    5: "better than EVA, LoRA-One and LoRA-GA by all four measures",
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
        *_not_worse(section, label),
        _better(section, label),
        *_fewer_steps(section, label),
        *_no_divergence(section, label),
        *_rivals(section, label),
    ]


def _not_worse(section: Section, label: str) -> Iterator[Verdict]:
    differences = {c.conditions.task: same_rate_difference(c, label) for c in section.comparisons}
    for of, seeds, limit in (
        *((task, seeds, NOT_WORSE) for task, seeds in differences.items()),
        (AVERAGE, section.average(same_rate_difference, label), 0.0),
    ):
        found = interval(seeds.values())
        yield Verdict(1, of, percent(found), None if found is None or found.n < 2 else found.high < limit)


def _better(section: Section, label: str) -> Verdict:
    found = interval(section.average(own_difference, label).values())
    return Verdict(2, AVERAGE, percent(found), None if found is None or found.n < 2 else found.mean < 0)


def _fewer_steps(section: Section, label: str) -> Iterator[Verdict]:
    for comparison in section.comparisons:
        found = share_of_steps(comparison, label)
        few = len(own_difference(comparison, label)) < 2
        yield Verdict(
            3, comparison.conditions.task, share(found), None if found is None or few else found <= FEWER_STEPS
        )


def _no_divergence(section: Section, label: str) -> Iterator[Verdict]:
    for comparison in section.comparisons:
        task = comparison.conditions.task
        if PLAIN not in comparison.starts or label not in comparison.starts:
            yield Verdict(4, task, "not run", None)
            continue
        sound = set(comparison.starts[PLAIN].by_rate) - set(diverged(comparison, PLAIN))
        run = sound & set(comparison.starts[label].by_rate)
        alone = diverged_alone(comparison, label)
        value = f"{', '.join(map(learning_rate, alone)) or 'none'}; run at {len(run)} of {len(sound)} such rates"
        seeds = set.intersection(
            *(set(comparison.starts[name].at(r)) for r in run for name in (PLAIN, label)), *[set()] * (not run)
        )
        decided = run == sound and len(seeds) > 1
        yield Verdict(4, task, value, False if alone else (True if decided else None))


def _rivals(section: Section, label: str) -> Iterator[Verdict]:
    for method in RIVALS:
        rivals = [other for other in section.labels if method in _methods(section, other) and other != label]
        for rival in rivals:
            yield _against(section, label, rival)
        if not rivals:
            yield Verdict(5, method, "not run", None)


def _methods(section: Section, label: str) -> set[str]:
    return {c.starts[label].cell.method for c in section.comparisons if label in c.starts}


def _against(section: Section, label: str, rival: str) -> Verdict:
    same = interval(section.average(same_rate_difference, label, rival).values())
    own = interval(section.average(own_difference, label, rival).values())
    steps, its_steps = section.average_share(label), section.average_share(rival)
    alone, its_alone = (_divergences(section.comparisons, name) for name in (label, rival))
    value = (
        f"at plain LoRA's rate {percent(same)}; at the best rates {percent(own)}; steps {share(steps)} against "
        f"{share(its_steps)}; diverges alone at {alone} rates against {its_alone}"
    )
    if same is None or own is None or steps is None or its_steps is None or min(same.n, own.n) < 2:
        return Verdict(5, rival, value, None)
    return Verdict(5, rival, value, same.mean < 0 and own.mean < 0 and steps < its_steps and alone <= its_alone)


def _divergences(comparisons: tuple[Comparison, ...], label: str) -> int:
    return sum(len(diverged_alone(comparison, label)) for comparison in comparisons if label in comparison.starts)
