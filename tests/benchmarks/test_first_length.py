"""The replayed search chooses by the rows that it was given, and is judged by the others."""

from __future__ import annotations

import pytest
import torch
from models import documents, tiny_llama

pytest.importorskip("trl", reason="TRL is not installed")

from benchmarks.first_length import CHOICES, DOCUMENTS, FIRST, markdown, replayed, row_losses
from benchmarks.step_length import lengths
from lora_da.samples.rows import collate
from lora_da.samples.tokens import IGNORED

pytestmark = pytest.mark.once

BEST = 1 / 4


def losses_with(best: list[float]) -> tuple[dict[float, torch.Tensor], torch.Tensor]:
    """Rows of two loss tokens, each with the parabola of its own best length, 1 lower there than at 0."""
    counts = torch.full((len(best),), 2)
    at = torch.tensor(best, dtype=torch.float64)
    return {length: 2 * (3 + ((length - at) / at) ** 2 - 1) for length in (0.0, *lengths())}, counts


def test_rows_that_agree_lose_nothing_and_cost_what_was_tried() -> None:
    found = {(s["first"], s["documents"]): s for s in replayed(*losses_with([BEST] * 64))}
    assert set(found) == {(first, n) for first in FIRST for n in DOCUMENTS}
    assert all(s["lost"] == 0 for (first, _), s in found.items() if first <= BEST)
    for n in DOCUMENTS:
        assert found[1 / 8, n]["forwards"] == 4 * n  # 0, 1/8, 1/4, and 1/2, which is worse
        assert found[1 / 4, n]["forwards"] == 3 * n
        assert found[1 / 2, n]["forwards"] == 3 * n  # as bad as 0, so a quarter of it: 1/8
        assert found[1 / 2, n]["lost"] == pytest.approx(0.25)  # of the parabola, half of its way from 1/4


def test_fewer_rows_lose_more_where_rows_differ() -> None:
    """Half of the rows would go a quarter as far as the others."""
    found = {(s["first"], s["documents"]): s["lost"] for s in replayed(*losses_with([1 / 8, 1 / 2] * 40))}
    assert found[1 / 16, 4] > found[1 / 16, 32] >= 0
    assert CHOICES >= 100


def test_row_losses_are_the_models_own() -> None:
    model, rows = tiny_llama(), [dict(row) for row in documents(5)]
    for row in rows:
        row["labels"] = [IGNORED] * 2 + list(row["labels"][2:])
    found = row_losses(model, rows, torch.device("cpu"))
    for loss, row in zip(found, rows, strict=True):
        n = sum(label != IGNORED for label in row["labels"][1:])
        assert float(loss) == pytest.approx(n * model(**collate([row])).loss.item(), rel=1e-5)


def test_the_tables_have_a_line_for_each_first_length() -> None:
    losses, counts = losses_with([BEST] * 64)
    result = {
        "task": "a task",
        "losses": [(length, float(found.sum() / counts.sum())) for length, found in losses.items()],
        "searches": replayed(losses, counts),
        "command": "python",
        "date": "today",
        "hardware": {"cpu": "a CPU", "threads": 1},
    }
    written = markdown(result)
    assert "| 0.25 | 0.0000 (12) | 0.0000 (24) | 0.0000 (48) | 0.0000 (96) |" in written and "2.000" in written
