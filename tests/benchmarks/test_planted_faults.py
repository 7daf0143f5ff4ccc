"""What is counted of planted faults, on losses that are made up."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from models import documents

from benchmarks.planted_faults import planted, with_other_answers
from lora_da.findings import RowLoss
from lora_da.samples.facts import row_facts

pytestmark = pytest.mark.once

ROWS = documents(100, shortest=20, longest=40)


def losses(loss: float, alone: float) -> list[RowLoss]:
    """Per loss token, with a little between the rows."""
    facts = [row_facts(n, row["input_ids"], row["labels"]) for n, row in enumerate(ROWS)]
    factors = [1 + n % 10 / 100 for n in range(len(ROWS))]
    return [
        RowLoss(row.row, row.loss_tokens, row.loss_tokens * loss * by, row.loss_tokens * alone * by)
        for row, by in zip(facts, factors, strict=True)
    ]


def norms(mean: float) -> list[float]:
    return [mean * (1 + n % 10 / 100) for n in range(len(ROWS))]


def test_answers_whose_prompt_does_not_help_are_named() -> None:
    found = planted(ROWS, losses(2.0, 3.0), losses(2.0, 2.0), (norms(1.0), norms(1.0)), random.Random(0))
    assert found["counts_exact"] == 1 and found["precision_by_help"] == 1 and found["precision_by_loss"] < 0.5
    assert (found["named_of_other_answers"], found["named_of_clean"]) == (1, 0)
    assert found["precision_by_gradient"] < 0.5 and found["named_by_gradient_of_other_answers"] == 0


def test_answers_that_are_no_worse_are_not() -> None:
    found = planted(ROWS, losses(2.0, 3.0), losses(2.0, 3.0), (norms(1.0), norms(3.0)), random.Random(0))
    assert found["counts_exact"] == 1 and found["precision_by_help"] < 0.5
    assert (found["named_of_other_answers"], found["named_of_clean"]) == (0, 0)
    assert found["precision_by_gradient"] == found["named_by_gradient_of_other_answers"] == 1
    assert found["named_by_gradient_of_clean"] == 0


def test_every_row_gets_the_answer_of_another_one() -> None:
    rows = [{"question": n, "answer": n} for n in range(50)]
    changed = with_other_answers(rows, "answer")
    assert all(row["question"] != row["answer"] for row in changed)
    assert sorted(row["answer"] for row in changed) == list(range(50))
