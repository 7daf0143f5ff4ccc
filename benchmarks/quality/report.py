"""The report of a sweep, Markdown and charts, from nothing but its finished cells."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.markdown import table
from benchmarks.quality import charts, sensitivity, tables
from benchmarks.quality.analysis import compare
from benchmarks.quality.results import Cell, Finished, Result
from benchmarks.quality.sections import Section, sections

READING = """\
Losses are on held-out rows, mean ± standard deviation (number of seeds). Differences are (start − plain) ÷ plain of the
final losses of the same seed, negative is better, with the 95 % interval of their mean (Student's t over seeds). They
speak of these tasks and this model; the mean over tasks is taken seed by seed. Steps to plain's final loss: where the
mean curve first gets there, over all steps of the run; each start at its own best rate unless a rate is named; on all
held-out rows where those were looked at during training, before that on the curve's. Wall time to it: the start's
initialisation included, evaluations left out, over that of plain LoRA's whole run. Best rates are those of the
lowest mean loss on the development rows, on the test rows too; on the development rows themselves the loss at a best
rate is therefore a little too good, for every start. Diverged: a loss that is no number, or an end above the
untouched base; a rate is listed if one seed did. †: started on the unquantised model, so on a base of its own, and
left out of the differences. twin: dense, with the weights that nf4 dequantises to. Adapters: Axolotl and Unsloth train
them in float32, TRL casts those of a 4-bit base to bf16. Users train at 2e-4 with alpha/r 0.5 or 2 (Axolotl) and at
1e-4 with alpha/r 2 (LLaMA-Factory)."""


def report(
    finished: Finished,
    expected: Mapping[str, Sequence[Cell]],
    folder: Path,
    judged: Sequence[str] = ("default",),
    controls: Sequence[str] = (),
) -> str:
    """Write `report.md` and its charts into the folder; the Markdown.

    Args:
        finished: as `results.read` gives it.
        expected: all cells of each sweep by its name; those without a result are listed as not finished.
        judged: names of the starts that are held against the goals.
        controls: names of the starts that get a table of their own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    comparisons = compare(finished.results)
    found = sections(comparisons)
    settings = sensitivity.lines(comparisons)
    lines = ["# Data-aware starts against plain LoRA", "", *_extent(finished, expected), READING, ""]
    lines += ["## Goals", "", *tables.goals(found, judged)]
    for section in found:
        lines += _section(section, controls, folder)
    if settings:
        charts.sensitivity(settings, folder / "sensitivity.png")
        lines += ["## Sensitivity", "", "![sensitivity](sensitivity.png)", "", *tables.sensitivity(settings)]
    predicted = tables.predictions(comparisons)
    if predicted:
        lines += ["## Best rates predicted before training", "", *predicted]
    lines += _made_with(finished.results)
    if finished.notes:
        lines += ["## Lines that do not count", "", *(f"- {note}" for note in finished.notes), ""]
    markdown = "\n".join(lines)
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    return markdown


def _extent(finished: Finished, expected: Mapping[str, Sequence[Cell]]) -> list[str]:
    """How much of the sweeps there is; of those that were begun, by start what is missing."""
    there = {result.cell for result in finished.results}
    wanted = {cell for cells in expected.values() for cell in cells}
    sweeps = "the sweep" if len(expected) == 1 else f"{len(expected)} sweeps"
    lines = [f"{len(wanted & there)} of {len(wanted)} cells of {sweeps} are finished."]
    beside = len(there - wanted)
    if beside:
        lines += [f"{beside} more cells are in the files and in no sweep; they are in the tables too."]
    not_run = [f"`{name}` ({len(set(cells))})" for name, cells in expected.items() if not there & set(cells)]
    if not_run:
        lines += ["", f"**Not run**, with their cells: {', '.join(not_run)}."]
    rows = []
    for name, cells in expected.items():
        of = Counter(map(_kind, dict.fromkeys(cells)))
        missing = Counter(_kind(cell) for cell in dict.fromkeys(cells) if cell not in there)
        if there & set(cells):
            rows += [[name, *kind, f"{count} of {of[kind]}"] for kind, count in missing.items()]
    if rows:
        header = ["sweep", "split", "task", "rank", "start", "steps", "alpha/r", "cells missing"]
        lines += ["", "**Not finished:**", "", *table(header, rows)]
    return [*lines, ""]


def _kind(cell: Cell) -> tuple[str, ...]:
    return cell.split, cell.task, str(cell.rank), cell.start, str(cell.steps), f"{cell.alpha_over_r:g}"


def _section(section: Section, controls: Sequence[str], folder: Path) -> list[str]:
    name = re.sub(r"[^\w.-]+", "_", section.title)
    lines = [f"## {section.title}", ""]
    control = section.named(controls)
    shown = [label for label in section.labels if label not in control]
    for comparison in section.comparisons:
        at = comparison.conditions
        lines += [f"### {at.task}: up to {at.length} tokens, {at.heldout_rows} rows held out", ""]
        lines += [*tables.finals(comparison, shown), *tables.majority(comparison)]
        if control:
            lines += ["Controls:", "", *tables.finals(comparison, control)]
    lines += tables.means(section, [*shown, *control])
    charts.rates(section, folder / f"{name}_rates.png")
    charts.steps(section, folder / f"{name}_steps.png")
    lines += [f"![loss against rate]({name}_rates.png)", "", f"![loss against step]({name}_steps.png)", ""]
    for comparison in section.comparisons:
        lines += [f"{comparison.conditions.task}, final loss at every rate:", "", *tables.rates(comparison)]
        lines += [f"{comparison.conditions.task}, each rate by itself:", "", *tables.settings(comparison)]
        lines += [*tables.costs(comparison), *tables.movement(comparison)]
    return lines


def _made_with(results: Iterable[Result]) -> list[str]:
    """The machines, versions and commands, with the number of cells of each."""
    counts: Counter[tuple[str, ...]] = Counter()
    for result in results:
        made = result.environment
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        counts[(made["hardware"], versions, made["commit"], f"`{made['command']}`")] += 1
    rows = [[str(count), *made] for made, count in counts.items()]
    return ["## Made with", "", *table(["cells", "hardware", "versions", "commit", "command"], rows)]
