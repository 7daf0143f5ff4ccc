"""Cells of the quality benchmark's sweeps, as many as the time allows; each is a line of JSONL too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.gpu import toy
from benchmarks.gpu.parts import Figures, NotRun, Part, Place
from benchmarks.quality.made_with import environment_of
from benchmarks.quality.results import Cell, Result, append, read
from benchmarks.quality.run import Runner
from benchmarks.quality.sweep import Sweep, read_sweep

SWEEPS = Path(__file__).parents[1] / "quality" / "sweeps"
FIRST = "settings_60"


def parts(place: Place, sweeps: Sequence[Path]) -> list[Part]:
    """Each cell of each sweep, `settings_60` first."""
    if place.toy and not sweeps:
        folder = place.output / "toy"
        folder.mkdir(exist_ok=True)
        sweeps = [toy.sweep(folder)]
        os.environ["LORA_DA_DATA"] = str(folder)
    chosen = list(dict.fromkeys([*([] if place.toy else [SWEEPS / f"{FIRST}.yml"]), *sweeps]))
    try:
        read_all = {path.stem: read_sweep(path) for path in chosen}
    except BenchmarkError as error:  # read when the part runs, and said there
        return [Part("sweeps", partial(_absent, str(error)))]
    cells = Cells(place)
    return [
        Part(f"{name} {number}: {describe(cell)}", partial(cells.run, sweep, cell))
        for name, sweep in read_all.items()
        for number, cell in enumerate(sweep.cells)
    ]


def describe(cell: Cell) -> str:
    """Name a cell by what differs most."""
    return f"{cell.task} {cell.start} r {cell.rank} rate {cell.rate:.2g} {cell.steps} steps seed {cell.seed}"


class Cells:
    """Runs cells, each base loaded once, and keeps their results in one file."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._runner: tuple[tuple[str, str], Runner] | None = None

    @cached_property
    def path(self) -> Path:
        return self._place.file("quality").with_suffix(".jsonl")

    def run(self, sweep: Sweep, cell: Cell) -> Figures:
        results = read([self.path]).results if self.path.exists() else ()
        result = next((found for found in results if found.cell == cell), None)
        if result is None:
            result = self._trained(sweep, cell)
            append(self.path, result)
        return {
            "train_seconds": result.train_seconds,
            "init_seconds": result.init_seconds,
            "peak_gib": result.peak_memory_gib,
            "base_loss": result.base_loss,
            "final_loss": result.final,
        }

    def _trained(self, sweep: Sweep, cell: Cell) -> Result:
        device, base = self._place.device, (cell.model, cell.base)
        if self._runner is None or self._runner[0] != base:
            self._runner = None
            self._runner = base, Runner(*base, device)
        return self._runner[1].run(cell, sweep.corpora[cell.task], environment_of(device), sweep.prediction)


def _absent(message: str) -> Figures:
    raise NotRun(message.partition(";")[0].removeprefix("there is "))
