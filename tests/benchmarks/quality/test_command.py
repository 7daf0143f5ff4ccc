"""`python -m benchmarks.quality`: what is there is not run again, and shares are parts of one sweep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from quality_results import result

from benchmarks.quality import __main__ as command
from benchmarks.quality.results import Cell, read
from benchmarks.quality.sweep import read_sweep

pytestmark = pytest.mark.once

SWEEP = {
    "split": "development",
    "model": "none",
    "base": "nf4",
    "steps": 100,
    "batch": 8,
    "length": 128,
    "heldout_rows": 128,
    "curve_rows": 32,
    "tasks": {"letters": {"train": "train.jsonl", "test": "test.jsonl"}},
    "starts": {"plain": {"method": "plain"}, "default": {"method": "lora_da"}},
    "judged": ["default"],
    "rates": [0.001, 0.01, 0.1],
    "ranks": 8,
    "seeds": [0, 1],
    "init_samples": 64,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_DA_DATA", str(tmp_path))
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "sweep.yml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    return tmp_path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells that were trained, by nobody."""
    cells: list[Cell] = []

    class Runner:
        def __init__(self, *_: Any) -> None: ...

        def run(self, cell: Cell, task: Any, environment: dict[str, Any], predict: bool) -> Any:
            cells.append(cell)
            return result(**vars(cell), environment=environment)

    monkeypatch.setattr(command, "Runner", Runner)
    return cells


def run(folder: Path, *more: str, results: str = "results.jsonl") -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["quality", str(folder / "sweep.yml"), "--results", str(folder / results), *more])
        command.main()


def test_what_is_there_is_not_run_again(folder: Path, trained: list[Cell]) -> None:
    run(folder)
    cells = read_sweep(folder / "sweep.yml").cells
    assert trained == cells and len(cells) == 12
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[:5]) + lines[5][:40])  # killed in the sixth
    trained.clear()
    run(folder)
    assert trained == cells[5:]
    assert {one.cell for one in read([folder / "results.jsonl"]).results} == set(cells)
    assert "12 of 12 cells of the sweep are finished" in (folder / "report.md").read_text()


def test_several_sweeps_are_run_in_turn_and_reported_together(folder: Path, trained: list[Cell]) -> None:
    other = SWEEP | {"seeds": [2], "judged": [], "prediction": False, "adapters": "float32"}
    (folder / "other.yml").write_text(yaml.safe_dump(other, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        files = [str(folder / name) for name in ("sweep.yml", "other.yml")]
        patch.setattr(sys, "argv", ["quality", *files, "--results", str(folder / "results.jsonl")])
        command.main()
    assert trained == [*read_sweep(folder / "sweep.yml").cells, *read_sweep(folder / "other.yml").cells]
    assert "18 of 18 cells of 2 sweeps are finished" in (folder / "report.md").read_text()
    assert [cell.adapters for cell in trained] == ["bf16"] * 12 + ["float32"] * 6


def test_sweeps_of_one_name_are_refused(folder: Path, trained: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["quality", *[str(folder / "sweep.yml")] * 2, "--results", str(folder / "r.jsonl")])
        command.main()
    assert "called the same: sweep, sweep" in capsys.readouterr().err and trained == []


def test_shares_are_parts_of_the_sweep(folder: Path, trained: list[Cell]) -> None:
    for share in ("0/3", "1/3", "2/3"):
        run(folder, "--share", share, results=f"{share[0]}.jsonl")
    assert not (folder / "report.md").exists()
    assert sorted(map(repr, trained)) == sorted(map(repr, read_sweep(folder / "sweep.yml").cells))
    trained.clear()
    run(folder, "--merge", str(folder / "0.jsonl"), "--merge", str(folder / "1.jsonl"), results="2.jsonl")
    assert trained == [] and "12 of 12" in (folder / "report.md").read_text()


def test_processes_divide_a_share_further(folder: Path, trained: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []

    class Process:
        def __init__(self, arguments: list[str]) -> None:
            shares.append(arguments[arguments.index("--share") + 1])

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(command.subprocess, "Popen", Process)
    for share in ("0/2", "1/2"):
        run(folder, "--share", share, "--processes", "3")
    parts = [range(*slice(int(s.split("/")[0]), None, int(s.split("/")[1])).indices(12)) for s in shares]
    assert sorted(n for part in parts for n in part) == list(range(12))


@pytest.mark.parametrize("more", [[], ["--processes", "2"]])
def test_a_report_trains_nothing(folder: Path, trained: list[Cell], more: list[str]) -> None:
    run(folder, "--report-only", *more)
    assert trained == [] and "0 of 12 cells" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [(["--merge", "nowhere"], "there is no nowhere to merge"), (["--share", "2/2"], "is no share")],
)
def test_what_cannot_be_meant_is_refused(
    folder: Path, trained: list[Cell], more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(folder, *more)
    assert sentence in capsys.readouterr().err and trained == []
