"""The tables of a report, as lines of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from benchmarks.markdown import table
from benchmarks.quality.analysis import (
    DEVELOPMENT,
    FEWEST_POINTS,
    PLAIN,
    SHORTER,
    ChosenRate,
    Comparison,
    Conditions,
)
from benchmarks.quality.formatting import NOTHING, average, learning_rate, loss, percent, share
from benchmarks.quality.goals import GOALS, Verdict, verdicts
from benchmarks.quality.intervals import interval, mean, spread
from benchmarks.quality.movement import FIGURES
from benchmarks.quality.pairs import (
    diverged,
    own_difference,
    relative,
    same_rate_difference,
    share_at,
    share_of_steps,
    shorter_difference,
    wall_share_at,
)
from benchmarks.quality.sections import Section
from benchmarks.quality.sensitivity import Line

OWN_BASE = " †"
MET = {True: "yes", False: "no", None: "undecided"}


def goals(sections: Sequence[Section], judged: Sequence[str]) -> list[str]:
    """Every goal held against the judged starts, in every section that has them."""
    header = ["goal", "start", "of", "measured", "met"]
    lines = []
    for section in sections:
        rows = [_verdict(label, verdict) for label in section.named(judged) for verdict in verdicts(section, label)]
        if rows:
            lines += [f"### {section.title}", "", *table(header, rows)]
    missing = [name for name in judged if not any(section.named([name]) for section in sections)]
    lines += [f"No result of a start named `{name}`: it is not judged." for name in missing]
    return [*(f"{number}. {text}" for number, text in GOALS.items()), "", *lines, ""]


def _verdict(label: str, verdict: Verdict) -> list[str]:
    return [f"({verdict.goal})", label, verdict.of, verdict.value, MET[verdict.met]]


def finals(comparison: Comparison, labels: Sequence[str]) -> list[str]:
    """Final losses at the chosen rates, and what they are against plain LoRA's."""
    header = [
        *("start", "best rate", "final loss", "to plain, both at their best", "final loss at plain's rate"),
        *("to plain, both at plain's rate", "steps to plain's final loss", "accuracy", "diverged at"),
    ]
    rows = []
    for label in labels:
        if label not in comparison.starts:
            continue
        own, plain = (comparison.finals(label, comparison.rate(name)) for name in (label, PLAIN))
        differences = [
            NOTHING if label == PLAIN else percent(interval(difference(comparison, label).values()))
            for difference in (own_difference, same_rate_difference)
        ]
        rows.append(
            [
                _marked(comparison, label),
                _chosen(comparison.chosen[label], comparison.conditions),
                loss(own.values()),
                differences[0],
                loss(plain.values()),
                differences[1],
                share(share_of_steps(comparison, label)),
                _accuracy(comparison, label),
                ", ".join(map(learning_rate, diverged(comparison, label))) or NOTHING,
            ]
        )
    return table(header, rows)


def _marked(comparison: Comparison, label: str) -> str:
    return label + OWN_BASE * comparison.starts[label].own_base


def _chosen(chosen: ChosenRate, at: Conditions) -> str:
    if chosen.rate is None:
        return f"none: NaN at all {chosen.points}"
    remarks = []
    if chosen.at_edge:
        remarks.append("the grid's end")
    if chosen.points < FEWEST_POINTS:
        remarks.append(f"of {chosen.points}")
    if at.split != DEVELOPMENT and chosen.split == at.split:
        remarks.append("chosen on these rows")
    if chosen.length != at.length:
        remarks.append(f"chosen on rows of up to {chosen.length} tokens")
    return learning_rate(chosen.rate) + (f" ({', '.join(remarks)})" if remarks else "")


def _accuracy(comparison: Comparison, label: str) -> str:
    found = [result.accuracy for result in comparison.starts[label].at(comparison.rate(label)).values()]
    measured = [accuracy["heldout"] for accuracy in found if accuracy]
    return f"{mean(measured):.3f} ± {spread(measured):.3f}" if len(measured) > 1 else average(measured, 3)


def majority(comparison: Comparison) -> list[str]:
    """A line on what the accuracies are to be held against; none where plain LoRA has none."""
    plain = comparison.starts.get(PLAIN)
    found = [] if plain is None else [result.accuracy for result in plain.at(comparison.rate(PLAIN)).values()]
    measured = [accuracy for accuracy in found if accuracy]
    if not measured:
        return []
    heldout, most = (mean(accuracy[name] for accuracy in measured) for name in ("heldout", "majority"))
    verdict = "beats it" if heldout > most else "does not beat it, so the accuracies say nothing and the loss has to"
    return [f"Always the most frequent class: {most:.3f}; plain LoRA, {heldout:.3f}, {verdict}.", ""]


def means(section: Section, labels: Sequence[str]) -> list[str]:
    """The mean over tasks of each start that has one, against plain LoRA; nothing for a single task."""
    if len(section.comparisons) < 2:
        return []
    header = ["start", "to plain, both at their best", "to plain, both at plain's rate", "steps to plain's final loss"]
    rows = []
    for label in labels:
        own, same = (interval(section.average(d, label).values()) for d in (own_difference, same_rate_difference))
        if label != PLAIN and own is not None:
            rows.append([label, percent(own), percent(same), share(section.average_share(label))])
    return [f"Mean over {', '.join(section.tasks)}:", "", *table(header, rows)]


def rates(comparison: Comparison) -> list[str]:
    """The final loss at every rate that was run."""
    grid = sorted({rate for runs in comparison.starts.values() for rate in runs.by_rate})
    rows = []
    for label, runs in comparison.starts.items():
        cells = []
        for rate in grid:
            found = runs.at(rate).values()
            bad = sum(result.diverged for result in found)
            cells.append((loss(r.final for r in found) + (f", {bad} diverged" if bad else "")) if found else NOTHING)
        rows.append([_marked(comparison, label), *cells])
    return table(["start", *map(learning_rate, grid)], rows)


def settings(comparison: Comparison) -> list[str]:
    """A row for each rate and start, all held against plain LoRA at the same rate."""
    grid = sorted(comparison.starts[PLAIN].by_rate) if PLAIN in comparison.starts else []
    header = ["rate", "start", "final loss", "to plain", "steps to plain's final loss", "wall time to it"]
    header += [f"final loss after {SHORTER} × the steps, to plain's whole run", "exact match"]
    rows = []
    for rate, (label, runs) in product(grid, comparison.starts.items()):
        found = runs.finals(rate)
        if found:
            plain = {} if runs.own_base or label == PLAIN else relative(found, comparison.finals(PLAIN, rate))
            exact = [result.exact_match for result in runs.at(rate).values() if result.exact_match is not None]
            rows.append(
                [
                    learning_rate(rate),
                    _marked(comparison, label),
                    loss(found.values()),
                    percent(interval(plain.values())),
                    share(share_at(comparison, label, rate)),
                    share(wall_share_at(comparison, label, rate)),
                    percent(interval(shorter_difference(comparison, label, rate).values())),
                    average(exact, 3),
                ]
            )
    return table(header, rows)


def costs(comparison: Comparison) -> list[str]:
    """Loss of the start itself, and what it takes: means over all runs, of `init` over those that solved it."""
    header = ["start", "step-0 loss", "init, s", "training, s", "peak memory, GiB", "layers from data"]
    rows = []
    for label, runs in comparison.starts.items():
        found = runs.all
        layers = sorted({result.initialized for result in found if result.initialized is not None})
        owner = ", ".join(sorted({result.memory_of for result in found}))
        rows.append(
            [
                _marked(comparison, label),
                average((result.heldout[0][1] for result in found), 4),
                average((result.init_seconds for result in found if not result.from_cache), 1),
                average((result.train_seconds for result in found), 1),
                f"{average((result.peak_memory_gib for result in found), 2)} ({owner})",
                ", ".join(map(str, layers)) or NOTHING,
            ]
        )
    base = average((r.base_loss for runs in comparison.starts.values() if not runs.own_base for r in runs.all), 4)
    return [
        f"{comparison.conditions.task}, what the starts themselves are and take; loss of the untouched base {base}:",
        "",
        *table(header, rows),
    ]


def movement(comparison: Comparison) -> list[str]:
    """How the adapters have moved, a row for each rate, start and looked-at step; nothing where no run was looked at.
    Means over seeds of what is a median over layers, and of that over their kinds."""
    rows = []
    rates = sorted({rate for runs in comparison.starts.values() for rate in runs.by_rate})
    for rate, (label, runs) in product(rates, comparison.starts.items()):
        seen = [dict(result.movement) for result in runs.at(rate).values() if result.movement]
        for step in sorted(set[int]().union(*seen)):
            told = [of[step] for of in seen if step in of]
            figures = [mean(mean(figures[name].values()) for figures in told) for name in FIGURES]
            rows.append([learning_rate(rate), label, str(step), *(f"{figure:.3g}" for figure in figures)])
    if not rows:
        return []
    header = ["rate", "start", "step", "‖sBA‖ ÷ ‖W‖", "from the start ÷ ‖W‖", "effective rank"]
    header += ["share of A turned away", "‖A‖ ÷ at the start"]
    return [f"{comparison.conditions.task}, how the adapters move:", "", *table(header, rows)]


def predictions(comparisons: Sequence[Comparison]) -> list[str]:
    """The predicted best rates beside those found, and both as factors of plain LoRA's."""
    rows = []
    for comparison in comparisons:
        at = comparison.conditions
        predicted = {
            label: mean(known)
            for label, runs in comparison.starts.items()
            if (known := [result.prediction for result in runs.all if result.prediction is not None])
        }
        for label, rate in predicted.items():
            found = comparison.rate(label)
            factors = [_factor(rate, predicted.get(PLAIN)), _factor(found, comparison.rate(PLAIN))]
            best = NOTHING if found is None else learning_rate(found)
            rows.append([at.split, at.task, str(at.rank), label, learning_rate(rate), best, *factors])
    header = ["split", "task", "rank", "start", "predicted", "found", "predicted ÷ plain's", "found ÷ plain's"]
    return table(header, rows)


def _factor(rate: float | None, of: float | None) -> str:
    return NOTHING if rate is None or of is None else f"{rate / of:.2g}"


def sensitivity(found: Sequence[Line]) -> list[str]:
    """A row for each value: the loss at the best rate, and the difference to plain LoRA at its best."""
    rows = []
    for line in found:
        at = line.conditions
        where = f"{at.split}, {at.task}" + (f", rank {at.rank}" if line.knob != "rank" else "")
        for point in line.points:
            against = NOTHING if line.start == PLAIN else percent(interval(point.differences.values()))
            value = f"{line.knob} {point.value}"
            rows.append([where, line.start, value, _chosen(point.chosen, at), loss(point.finals.values()), against])
    return table(["where", "start", "setting", "best rate", "final loss", "to plain, both at their best"], rows)
