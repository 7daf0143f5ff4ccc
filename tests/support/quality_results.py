"""Made-up results of the quality benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.quality.analysis import Comparison, compare
from benchmarks.quality.results import Cell, Result, has_diverged

STEPS = 100
BASE_LOSS = 1.5


def cell(start: str = "plain", rate: float = 1e-3, seed: int = 0, **changes: Any) -> Cell:
    """A cell on the development rows unless told otherwise; the start's name is its method too."""
    fields: dict[str, Any] = {
        "task": "gsm8k",
        "split": "development",
        "data": f"digest of {changes.get('task', 'gsm8k')}",
        "method": start,
        "numbers": "",
        "settings": {},
        "rank": 8,
        "steps": STEPS,
        "batch": 8,
        "length": 128,
        "heldout_rows": 128,
        "curve_rows": 32,
        "init_samples": 64,
        "model": "tiny",
        "base": "nf4",
    }
    return Cell(start=start, rate=rate, seed=seed, **(fields | changes))


def result(
    start: str = "plain",
    rate: float = 1e-3,
    seed: int = 0,
    final: float = 1.0,
    curve: list[tuple[int, float]] | None = None,
    own_base: bool = False,
    **changes: Any,
) -> Result:
    """A run that ends at `final`, by way of `curve` if there is one; `changes` are the cell's or the result's."""
    heldout = [*(curve or [(0, BASE_LOSS)]), (STEPS, final)]
    train = [BASE_LOSS, final]
    fields: dict[str, Any] = {
        "base_loss": BASE_LOSS,
        "accuracy": None,
        "init_seconds": 2.0,
        "train_seconds": 60.0,
        "from_cache": False,
        "peak_memory_gib": 1.5,
        "memory_of": "process",
        "initialized": None,
        "prediction": None,
        "full": [],
        "step_seconds": None,
        "exact_match": None,
        "movement": [],
        "environment": {"versions": {"torch": "2"}, "hardware": "two cores", "command": "run", "commit": "abc"},
    }
    fields |= {name: changes.pop(name) for name in list(changes) if name in fields}
    diverged = has_diverged(train, heldout, final, BASE_LOSS)
    return Result(
        cell(start, rate, seed, **changes), train, heldout, final=final, diverged=diverged, own_base=own_base, **fields
    )


def grid(start: str, finals: dict[float, list[float]], **changes: Any) -> list[Result]:
    """By rate the final losses of seeds 0, 1, …"""
    return [
        result(start, rate, seed, final, **changes)
        for rate, losses in finals.items()
        for seed, final in enumerate(losses)
    ]


def compared(results: Sequence[Result]) -> Comparison:
    """Compare what was run under one set of conditions."""
    (comparison,) = compare(results)
    return comparison
