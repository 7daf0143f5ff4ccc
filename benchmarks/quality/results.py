"""Finished cells of a sweep: one line of JSONL each, appended as they finish, merged over files and machines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.quality.movement import Figures

ADAPTERS = ("float32", "bf16")  # as Axolotl and Unsloth, and as TRL trains them on a 4-bit base


@dataclass(frozen=True)
class Cell:
    """One training run as the sweep asks for it. Two runs are of the same cell only if all of this is equal.

    Args:
        task: name of the task; split: `development` or `test`, the held-out rows' part of it; data: digest of its files
            and choices.
        start: name of the adapter's start in the sweep; method and settings: what it stands for; numbers: digest of
            what these resolve to, for a start of this project's.
        rank, rate, seed: of the adapter and its training.
        steps, batch: optimiser steps, and rows in each.
        length: tokens in a row at most; heldout_rows: rows the final held-out loss is the mean of; curve_rows: those of
            them that are looked at during training.
        init_samples: documents that a data-aware start may look at.
        model, base: the model's name, and how its weights are stored while training (`nf4`, or its dense `twin`).
        adapters: what they are trained in, `float32` or `bf16`; alpha_over_r: their scaling.
        full_at: shares of the steps after which the loss on all held-out rows is measured, beside the end.
        exact_match_rows: held-out rows whose answers are generated at the end.

    The fields with a default are younger than the first results on file, which were run so.
    """

    task: str
    split: str
    data: str
    start: str
    method: str
    settings: Mapping[str, Any]
    numbers: str
    rank: int
    rate: float
    seed: int
    steps: int
    batch: int
    length: int
    heldout_rows: int
    curve_rows: int
    init_samples: int
    model: str
    base: str
    adapters: str = "bf16"
    alpha_over_r: float = 2.0
    full_at: tuple[float, ...] = ()
    exact_match_rows: int = 0

    def __hash__(self) -> int:  # a mapping has none; what equal cells share is enough
        return hash((self.task, self.split, self.start, self.rank, self.rate, self.seed))


@dataclass(frozen=True)
class Result:
    """One finished cell. Losses are means over loss tokens, in nats.

    Args:
        cell: what was run.
        train_loss: of each step.
        heldout: (step, loss) on the rows of the curve; step 0 is the start itself, the last one the end.
        final: loss on all held-out rows after the last step.
        base_loss: the same of the model without an adapter.
        accuracy: `heldout`, and `majority`, that of always answering the most frequent class; None if not measured.
        diverged: see `has_diverged`.
        own_base: started on the unquantised model, whose remaining base was then quantised: not the base of the others.
        init_seconds, train_seconds: wall time of the start and of the training; from_cache: the start was solved by an
            earlier cell.
        peak_memory_gib: highest memory of start and training; memory_of: whose it is, `GPU` or `process`.
        initialized: layers the start was written to; None for a start that is PEFT's own.
        prediction: learning rate that suits the start by `best_first_step`, before training; None without one.
        environment: `versions`, `hardware`, `command` and `commit`.
        full: (step, loss) on all held-out rows, the last one the end; empty in old results.
        step_seconds: median wall time of a step, no evaluation in it; None in old results.
        exact_match: share of the generated answers that are the true ones; None if not asked for.
        movement: (step, figures) of the adapter, see `Movement.figures`; empty in old results.
    """

    cell: Cell
    train_loss: Sequence[float]
    heldout: Sequence[tuple[int, float]]
    final: float
    base_loss: float
    accuracy: Mapping[str, float] | None
    diverged: bool
    own_base: bool
    init_seconds: float
    train_seconds: float
    from_cache: bool
    peak_memory_gib: float
    memory_of: str
    initialized: int | None
    prediction: float | None
    environment: Mapping[str, Any]
    full: Sequence[tuple[int, float]] = field(default_factory=list)
    step_seconds: float | None = None
    exact_match: float | None = None
    movement: Sequence[tuple[int, Figures]] = field(default_factory=list)


@dataclass(frozen=True)
class Finished:
    """The results of some files, each cell once, and what is to be known about the files: torn lines, cells twice."""

    results: tuple[Result, ...]
    notes: tuple[str, ...]


def has_diverged(
    train_loss: Iterable[float], heldout: Iterable[tuple[int, float]], final: float, base_loss: float
) -> bool:
    """Tell whether a loss is no number, or the training ends above the loss of the untouched base."""
    losses = [*train_loss, *(loss for _, loss in heldout), final]
    return not all(map(math.isfinite, losses)) or final > base_loss


def append(path: Path, result: Result) -> None:
    """Add one line, on the disk when this returns. A killed run leaves at most its own line torn.

    Raises:
        BenchmarkError: the disk has no room for it.
    """
    line = (json.dumps(asdict(result)) + "\n").encode()  # NaN as Python writes and reads it
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            line = b"\n" + line  # after a torn line, which stays as it is
        if file.write(line) != len(line):
            raise BenchmarkError(
                f"{path}: the disk took a part of the line only: is it full? The cell has to run again."
            )
        os.fsync(file.fileno())


def read(paths: Iterable[Path]) -> Finished:
    """Read all results of the files, in their order. Of a cell that is there twice the first counts.

    Raises:
        BenchmarkError: a line is JSON and no result: the file, the line and what is wrong with it.
    """
    found: dict[Cell, tuple[Result, str]] = {}
    notes = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
            if not line:
                continue
            where = f"{path.name}, line {number}"
            try:
                fields = json.loads(line)
            except json.JSONDecodeError:
                notes.append(f"{where}: not whole, as a killed run leaves it; ignored.")
                continue
            result = _result(fields, where)
            if result.cell in found:
                notes.append(f"{where}: the same cell as {found[result.cell][1]}, which counts; this one is ignored.")
            else:
                found[result.cell] = (result, where)
    return Finished(tuple(result for result, _ in found.values()), tuple(notes))


def _result(fields: Any, where: str) -> Result:
    try:
        cell = Cell(**{**fields["cell"], "full_at": tuple(fields["cell"].get("full_at", ()))})
        heldout, full = (
            [(int(step), float(loss)) for step, loss in curve] for curve in (fields["heldout"], fields.get("full", ()))
        )
        movement = [(int(step), figures) for step, figures in fields.get("movement", ())]
        result = Result(**{**fields, "cell": cell, "heldout": heldout, "full": full, "movement": movement})
        if not heldout:
            raise ValueError("heldout is empty")
    except (TypeError, KeyError, ValueError) as error:
        raise BenchmarkError(
            f"{where}: no result of this benchmark: {error}. Take the file out, or report it with the version that "
            "wrote it."
        ) from error
    return result
