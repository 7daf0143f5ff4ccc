"""The quality benchmark's report says what its results say, and what is missing of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from quality_results import BASE_LOSS, cell, grid, result

from benchmarks.quality.movement import FIGURES
from benchmarks.quality.results import Finished, Result

pytest.importorskip("matplotlib")

from benchmarks.quality.report import report

pytestmark = pytest.mark.once

PNG = b"\x89PNG\r\n\x1a\n"


def row(markdown: str, *starts: str) -> list[str]:
    """The cells of the first table row that begins so."""
    for line in markdown.splitlines():
        cells = [part.strip() for part in line.strip("|").split("|")]
        if tuple(cells[: len(starts)]) == starts:
            return cells
    raise AssertionError(f"no row {starts}:\n{markdown}")


def written(folder: Path, results: list[Result], **changes: object) -> str:
    expected = [one.cell for one in results]
    return report(Finished(tuple(results), ()), {"sweep": expected}, folder, **changes)  # type: ignore[arg-type]


def behind() -> list[Result]:
    """`default` best at 3e-3 and worse than plain LoRA, whose best rate is 1e-3."""
    return [
        *grid("plain", {3e-4: [1.2, 1.2], 1e-3: [1.0, 0.8], 3e-3: [1.1, 1.1]}),
        *grid("default", {3e-4: [1.3, 1.3], 1e-3: [1.2, 1.2], 3e-3: [1.1, 0.92]}, initialized=210),
        *grid("pissa", {1e-3: [0.7, 0.7]}, own_base=True),
        *grid("lora_ga", {1e-3: [1.05, math.nan], 3e-3: [math.nan, 1.6]}),
    ]


def test_losses_are_stated_as_they_are(tmp_path: Path) -> None:
    markdown = written(tmp_path, behind())
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == markdown
    # 1.1 and 0.92 over 1.0 and 0.8: +10 % and +15 %, t of one degree 12.706, so 12.5 ± 12.706 · 2.5; at plain's rate
    # +20 % and +50 %, so 35 ± 12.706 · 15. Standard deviations: half the distance times √2.
    found = row(markdown, "default")
    assert found[1:] == [
        "0.003 (the grid's end, of 3)",
        "1.0100 ± 0.1273 (2)",
        "+12.50% [-19.27%, +44.27%]",
        "1.2000 ± 0.0000 (2)",
        "+35.00% [-155.59%, +225.59%]",
        "never",
        "–",
        "–",
    ]
    assert row(markdown, "plain")[1:3] == ["0.001 (of 3)", "0.9000 ± 0.1414 (2)"]
    assert row(markdown, "(1)", "default", "gsm8k at 0.0003")[3:] == [
        "never of the steps, – of the time",
        "undecided",
    ]
    assert row(markdown, "(2)", "default", "gsm8k")[3:] == ["+35.00% [-155.59%, +225.59%]", "no"]
    assert row(markdown, "(2)", "default", "mean over tasks")[4] == "no"
    assert row(markdown, "(3)", "default", "gsm8k at 0.0003")[3:] == ["–", "undecided"]
    assert row(markdown, "(4)", "default", "eva")[3:] == ["not run", "undecided"]


def test_a_start_on_its_own_base_is_marked_and_not_compared(tmp_path: Path) -> None:
    found = row(written(tmp_path, behind()), "pissa †")
    assert found[2] == "0.7000 ± 0.0000 (2)"
    assert (found[3], found[5]) == ("–", "–")


def test_what_is_no_number_is_said(tmp_path: Path) -> None:
    markdown = written(tmp_path, behind())
    found = row(markdown, "lora_ga")
    assert found[1:6] == ["none: NaN at all 2", "–", "–", "NaN (2)", "NaN"]
    assert found[8] == "0.001, 0.003"
    assert "| lora_ga | – | NaN (2), 1 diverged | NaN (2), 2 diverged |" in markdown


def test_every_chart_is_there(tmp_path: Path) -> None:
    results = [*behind(), *grid("plain", {1e-3: [1.0]}, task="arc"), *grid("plain", {1e-3: [1.0]}, rank=32)]
    markdown = written(tmp_path, results)
    charts = sorted(tmp_path.glob("*.png"))
    assert len(charts) == 5  # rates and steps of two ranks, sensitivity
    assert all(chart.read_bytes().startswith(PNG) for chart in charts)
    assert sorted(line.split("(")[1].strip(")") for line in markdown.splitlines() if line.startswith("![")) == [
        chart.name for chart in charts
    ]


def test_what_is_not_finished_is_listed(tmp_path: Path) -> None:
    expected = [cell(seed=seed) for seed in range(4)] + [cell("eva", seed=seed, rank=32) for seed in range(3)]
    finished = Finished((result(), result(seed=3), result("beside")), ("cells.jsonl, line 7: not whole",))
    markdown = report(finished, {"begun": expected, "later": [cell(rate=5e-3)]}, tmp_path)
    assert "2 of 8 cells of 2 sweeps are finished." in markdown
    assert "1 more cells are in the files and in no sweep" in markdown
    assert row(markdown, "begun", "development", "gsm8k", "8", "plain")[5:] == ["100", "2", "2 of 4"]
    assert row(markdown, "begun", "development", "gsm8k", "32", "eva")[5:] == ["100", "2", "3 of 3"]
    assert "**Not run**, with their cells: `later` (1)." in markdown and "| later |" not in markdown
    assert "- cells.jsonl, line 7: not whole" in markdown
    assert "No result of a start named `default`" in markdown


def test_a_finished_sweep_has_no_such_list(tmp_path: Path) -> None:
    assert "Not finished" not in written(tmp_path, behind())


def test_nothing_finished_is_a_report_too(tmp_path: Path) -> None:
    markdown = report(Finished((), ()), {"sweep": [cell()]}, tmp_path)
    assert "0 of 1 cells of the sweep are finished." in markdown
    assert "**Not run**, with their cells: `sweep` (1)." in markdown


@pytest.mark.parametrize(("majority", "verdict"), [(0.2, "beats it"), (0.4, "does not beat it")])
def test_accuracies_are_held_against_the_majority(tmp_path: Path, majority: float, verdict: str) -> None:
    results = [result(seed=seed, accuracy={"heldout": 0.3 + 0.1 * seed, "majority": majority}) for seed in (0, 1)]
    results += [result("default", seed=seed, accuracy={"heldout": 0.5, "majority": majority}) for seed in (0, 1)]
    markdown = written(tmp_path, [one for one in results if one.cell.seed == 0 or majority == 0.2])
    mean = "0.350 ± 0.071" if majority == 0.2 else "0.300"
    assert row(markdown, "plain")[7] == mean
    assert f"most frequent class: {majority:.3f}; plain LoRA, {mean[:5]}, {verdict}" in markdown


def test_controls_have_a_table_of_their_own(tmp_path: Path) -> None:
    markdown = written(tmp_path, [*behind(), *grid("random_a", {1e-3: [1.0, 0.8]})], controls=["random_a"])
    before, after = markdown.split("Controls:")
    assert row(after, "random_a")[3] == "+0.00% [+0.00%, +0.00%]"
    assert "| random_a |" not in before


def test_each_rate_is_shown_by_itself(tmp_path: Path) -> None:
    timed = {"init_seconds": 0.0, "step_seconds": 2.0}
    results = [
        *grid("plain", {1e-3: [1.0], 3e-3: [0.9]}, **timed, exact_match=0.04),
        result("default", 1e-3, 0, 0.8, [(0, 1.5), (50, 1.0)], init_seconds=20.0, step_seconds=2.0, exact_match=0.06),
        result("default", 1e-3, 0, 1.05, steps=70, train_seconds=1.0),
        result("alone", 5e-3, 0, 0.8),
    ]
    markdown = written(tmp_path, results)
    _, table = markdown.split("each rate by itself")
    assert row(table, "0.001", "plain")[2:] == ["1.0000 (1)", "–", "1.00 ×", "1.00 ×", "–", "0.040"]
    expected = ["0.8000 (1)", "-20.00%, one seed", "0.50 ×", "0.60 ×", "+5.00%, one seed", "0.060"]
    assert row(table, "0.001", "default")[2:] == expected
    assert row(table, "0.003", "plain")[2] == "0.9000 (1)"
    assert "| 0.005 | alone" not in table and "| 0.003 | default" not in table
    assert markdown.count("each rate by itself") == 1  # the shorter run has no section of its own


def test_predicted_rates_stand_beside_those_found(tmp_path: Path) -> None:
    results = [
        *grid("plain", {3e-4: [1.2, 1.2], 1e-3: [1.0, 0.8], 3e-3: [1.1, 1.1]}, prediction=2e-3),
        *grid("default", {3e-4: [1.3, 1.3], 1e-3: [1.2, 1.2], 3e-3: [1.1, 0.92]}, prediction=1e-3),
    ]
    section = written(tmp_path, results).split("## Best rates predicted before training")[1]
    assert row(section, "development", "gsm8k", "8", "plain")[4:] == ["0.002", "0.001", "1", "1"]
    assert row(section, "development", "gsm8k", "8", "default")[4:] == ["0.001", "0.003", "0.5", "3"]


def test_what_a_start_takes_is_said(tmp_path: Path) -> None:
    results = [
        result(),
        result("default", seed=0, curve=[(0, 1.4)], init_seconds=1.0, train_seconds=9.0, initialized=7),
        result("default", seed=1, curve=[(0, 1.6)], init_seconds=4.0, train_seconds=9.0, initialized=7),
    ]
    _, costs = written(tmp_path, results).split(f"loss of the untouched base {BASE_LOSS:.4f}")
    assert row(costs, "default")[1:] == ["1.5000", "2.5", "9.0", "1.50 (process)", "7"]
    assert row(costs, "plain")[1:] == ["1.5000", "2.0", "60.0", "1.50 (process)", "–"]
    assert row(costs, "3")[1:] == ["two cores", "torch 2", "abc", "`run`"]


def test_movement_is_a_mean_over_seeds_and_kinds(tmp_path: Path) -> None:
    def figures(of_q: float, of_k: float) -> dict[str, dict[str, float]]:
        return {name: {"q_proj": of_q, "k_proj": of_k} for name in FIGURES}

    results = [
        result("plain", seed=0, movement=[(15, figures(1, 2)), (30, figures(0, 0))]),
        result("plain", seed=1, movement=[(15, figures(3, 4))]),
        result("default", seed=0),
    ]
    markdown = written(tmp_path, results)
    _, found = markdown.split("gsm8k, how the adapters move:")
    assert row(found, "0.001", "plain", "15")[3:] == ["2.5"] * len(FIGURES)
    assert row(found, "0.001", "plain", "30")[3:] == ["0"] * len(FIGURES)
    assert "default" not in found.split("## Made with")[0]
    assert "how the adapters move" not in written(tmp_path, [result()])
