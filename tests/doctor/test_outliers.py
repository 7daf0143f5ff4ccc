"""Which losses stand out: planted ones do, those of clean rows do not, however long the answers are."""

from __future__ import annotations

import numpy as np
import pytest

from lora_da.doctor.outliers import standing_out, with_large_gradients
from lora_da.findings import RowLoss
from lora_da.samples.facts import RowFacts

pytestmark = pytest.mark.once


def losses(count: int = 1000, seed: int = 0) -> list[RowLoss]:
    """Rows whose tokens' losses are alike: the mean of few varies more than that of many."""
    chance, found = np.random.default_rng(seed), []
    for row in range(count):
        n = int(chance.integers(4, 200))
        own = chance.gamma(2.0, 1.5, n).sum()
        found.append(RowLoss(row, n, own, own + n * chance.normal(1.0, 0.2) + chance.normal(0, 2)))
    return found


def rows_for(found: list[RowLoss], reason: str) -> list[int]:
    findings, why_not = standing_out(found)
    assert not why_not
    return [finding.row for finding in findings if finding.reason == reason]


@pytest.mark.parametrize("seed", range(5))
def test_at_most_one_clean_row_in_a_hundred_is_named(seed: int) -> None:
    findings, why_not = standing_out(losses(seed=seed))
    assert not why_not and len(findings) <= 10


def test_a_planted_loss_stands_out() -> None:
    found = losses()
    for row in (3, 500, 999):
        found[row] = RowLoss(row, 150, 150 * 12.0, 150 * 13.0)
    assert set(rows_for(found, "loss")) >= {3, 500, 999}


def test_a_short_answer_is_compared_with_short_ones() -> None:
    """A mean that is usual among four tokens, and is not among two hundred."""
    found = losses()
    short = [row for row in found if row.loss_tokens < 12]
    usual = max(row.mean for row in short)
    assert not set(rows_for(found, "loss")) & {row.row for row in short}
    found[7] = RowLoss(7, 198, 198 * usual, 198 * (usual + 1))
    assert 7 in rows_for(found, "loss")


def test_a_prompt_that_does_not_help_stands_out() -> None:
    found = losses()
    for row in (5, 300):
        found[row] = RowLoss(row, 100, 310.0, 305.0)
    assert set(rows_for(found, "prompt")) >= {5, 300} and not {5, 300} & set(rows_for(found, "loss"))


def test_where_prompts_help_little_nothing_is_told_by_them() -> None:
    """Rounding of a help that is nothing for all has lowest rows too."""
    chance = np.random.default_rng(0)
    found = [RowLoss(row.row, row.loss_tokens, row.loss, row.loss + chance.normal(5, 10)) for row in losses()]
    assert rows_for(found, "prompt") == []


def test_a_prompt_that_helps_less_is_no_prompt_that_does_not_help() -> None:
    found = losses()
    found[5] = RowLoss(5, 100, 310.0, 350.0)
    assert 5 not in rows_for(found, "prompt")


def test_rows_without_prompts_are_told_by_their_loss_alone() -> None:
    bare = [RowLoss(row.row, row.loss_tokens, row.loss, None) for row in losses()]
    assert rows_for(bare, "prompt") == []


def test_rows_that_are_all_alike_do_not_stand_out() -> None:
    assert standing_out([RowLoss(row, 8, 8.0 + row * 1e-6, 16.0) for row in range(100)]) == ([], "")


def test_few_rows_tell_nothing() -> None:
    found, why_not = standing_out(losses(12))
    assert found == [] and why_not == "12 rows with different losses are too few to tell a usual one by"


def norms_among(rows: list[RowFacts], norms: dict[int, float]) -> list[int]:
    findings, why_not = with_large_gradients(rows, norms)
    assert not why_not and all(finding.reason == "gradient" for finding in findings)
    return [finding.row for finding in findings]


def test_a_large_gradient_is_told_among_rows_of_its_size() -> None:
    """One that is usual among short answers, and is not among long ones; too few rows tell nothing."""
    chance = np.random.default_rng(0)
    rows = [RowFacts(n, 0, 5 if n < 150 else 100, bytes(n), ()) for n in range(300)]
    norms = {n: float(chance.lognormal(1.0 if n < 150 else 0.0, 0.2)) for n in range(300)}
    assert norms_among(rows, norms) == []
    norms[200] = norms[3]
    assert norms_among(rows, norms) == [200]
    few = with_large_gradients(rows[190:208], norms)
    assert few == ([], "18 rows whose gradients are known are too few to tell a usual one by")


@pytest.mark.parametrize("seed", range(5))
def test_few_short_answers_among_long_ones_do_not_stand_out(seed: int) -> None:
    """A mean over three tokens varies eight times as much as one over two hundred."""
    chance = np.random.default_rng(seed)
    rows = [RowFacts(n, 0, 3 if n % 8 == 0 else 200, bytes(n), ()) for n in range(64)]
    norms = {row.row: float(chance.lognormal(0.0, 1 / row.loss_tokens**0.5)) for row in rows}
    assert norms_among(rows, norms) == []
    assert norms_among(rows, norms | {7: 3.0}) == [7]
