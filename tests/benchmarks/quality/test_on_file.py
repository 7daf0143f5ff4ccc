"""The sweeps of the quality benchmark can be judged, and its results on file are of today's methods and data."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from pages import pages, table
from quality_results import result

from benchmarks.quality.analysis import PLAIN, Comparison, compare
from benchmarks.quality.goals import verdicts
from benchmarks.quality.intervals import mean
from benchmarks.quality.pairs import same_rate_difference, share_at
from benchmarks.quality.results import Cell, Result, read
from benchmarks.quality.sections import sections
from benchmarks.quality.starts import digest
from benchmarks.quality.sweep import read_sweep

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SWEEPS = sorted((BENCHMARKS / "quality" / "sweeps").glob("*.yml"))
RESULTS = sorted((BENCHMARKS / "results" / "quality").glob("*.jsonl"))

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif("LORA_DA_DATA" not in os.environ, reason="LORA_DA_DATA names no folder with the tasks' files"),
]


def finished(cell: Cell) -> Result:
    """Best at 3.2e-3; plain LoRA ahead."""
    final = 1.0 + 0.1 * abs(math.log10(cell.rate / 3.2e-3)) + 0.01 * (cell.start != "plain") + 0.001 * cell.seed
    return result(final=final, **vars(cell))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_whole_sweep_is_judged_over_all_its_tasks(path: Path) -> None:
    sweep = read_sweep(path)
    found = sections(compare(map(finished, sweep.cells)))
    expected = {(cell.rank, cell.alpha_over_r, cell.steps) for cell in sweep.cells if cell.start == "plain"}
    assert {(at.rank, at.alpha_over_r, at.steps) for at in (section.conditions for section in found)} == expected
    assert len(found) == len(expected)
    for section in found:
        assert section.tasks == sorted(sweep.corpora)
        assert set(section.named(sweep.controls)) <= set(section.labels)
        for label in section.named(sweep.judged):
            assert None not in [verdict.met for verdict in verdicts(section, label) if verdict.goal == 2]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_on_file_are_of_todays_methods_and_data(path: Path) -> None:
    digests = {name: c.digest() for sweep in map(read_sweep, SWEEPS) for name, c in sweep.corpora.items()}
    results = read([path]).results
    assert results
    for cell in (one.cell for one in results):
        assert cell.numbers == digest(cell.method, cell.settings), f"{cell.start} has other settings now: run it again"
        assert cell.data == digests[cell.task], f"{cell.task} has other rows now: run it again"


def on_file(task: str, steps: int, rate: float) -> tuple[Comparison, str]:
    """A task's runs with float32 adapters at a rate, and the label of today's default there."""
    asked, today = ("twin", "float32", task, steps, rate), digest("lora_da", {})
    results = [(one, one.cell) for one in read(RESULTS).results]
    (found,) = compare(one for one, c in results if (c.base, c.adapters, c.task, c.steps, c.rate) == asked)
    (label,) = [name for name, runs in found.starts.items() if runs.cell.numbers == today and not runs.cell.settings]
    return found, label


@pytest.mark.parametrize(("column", "task"), [(1, "nl2bash"), (2, "e2e"), (3, "gsm8k")])
def test_the_figures_of_the_readme_are_those_on_file(column: int, task: str) -> None:
    short, long, shares, tuned = (row[column] for row in table(pages()["README.md"], "| settings | NL2Bash"))
    for told, steps in ((short, 60), (long, 300)):
        runs, default = on_file(task, steps, 2e-4)
        plain, ours = (runs.finals(start, 2e-4) for start in (PLAIN, default))
        finals = [mean(each[seed] for seed in ours) for each in (plain, ours)]
        assert told == " → ".join(f"{loss:.3f}" for loss in finals)
    runs, default = on_file(task, 300, 2e-4)
    assert shares == f"{share_at(runs, default, 2e-4):.2f}"
    runs, default = on_file(task, 60, 3.2e-3)
    differences = same_rate_difference(runs, default)
    assert len(differences) >= 3
    assert tuned == f"{100 * mean(differences.values()):+.1f} %".replace("-", "−")
