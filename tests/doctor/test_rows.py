"""What rows tell without a model: every planted fault is found, in its place, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from lora_da.doctor.rows import look_at
from lora_da.findings import DataReport, Finding
from lora_da.samples.facts import RowFacts, row_facts

pytestmark = pytest.mark.once

END, NEWLINE, IGNORED = 2, 5, -100
LONGEST = 40

Row = tuple[list[int], list[int]]


def written(count: int = 200, closing: Sequence[int] = (END,), seed: int = 0) -> list[Row]:
    """Rows of a prompt and an answer that ends as it should, none of them twice."""
    chance, rows = random.Random(seed), []
    for number in range(count):
        prompt = [10 + number % 7, 1000 + number, *chance.choices(range(10, 90), k=chance.randint(1, 12))]
        answer = [*chance.choices(range(10, 90), k=chance.randint(1, 12)), *closing]
        rows.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    return rows


def read(rows: Sequence[Row]) -> list[RowFacts]:
    return [row_facts(number, ids, labels) for number, (ids, labels) in enumerate(rows)]


def looked_at(rows: Sequence[Row], max_length: int | None = LONGEST, ends: Sequence[int] = (END,)) -> DataReport:
    return look_at(read(rows), max_length, ends)


def test_clean_rows_have_nothing() -> None:
    rows = written()
    found = looked_at(rows)
    assert found.findings == [] and found.unknown == {} and found.line() is None
    assert (found.rows, found.tokens) == (200, sum(len(ids) for ids, _ in rows))
    assert found.loss_tokens == sum(label != IGNORED for _, labels in rows for label in labels)


def test_rows_without_a_loss_token() -> None:
    rows, planted = written(), [3, 50, 199]
    for row in planted:
        rows[row] = (rows[row][0], [IGNORED] * len(rows[row][0]))
    found = looked_at(rows)
    assert found.rows_by("masked") == planted == [finding.row for finding in found.findings]
    assert found.line() == ("LoRA-DA: of 200 rows that were read, 3 have no token that carries loss (rows 3, 50, 199)")


def test_a_label_that_nothing_predicts_is_no_loss_token() -> None:
    """The first token's, and an empty row's."""
    rows = [([7, 8, 9], [7, IGNORED, IGNORED]), ([], []), ([7, 8], [IGNORED, 8])]
    assert looked_at(rows).rows_by("masked") == [0, 1]


def test_rows_that_repeat_others() -> None:
    rows = written()
    for row, of in ((60, 7), (61, 7), (199, 150)):
        rows[row] = rows[of]
    found = looked_at(rows)
    assert found.findings == [Finding(r, "duplicate", {"of": of}) for r, of in ((60, 7), (61, 7), (199, 150))]


def test_the_same_text_with_other_labels_is_another_row() -> None:
    rows = written()
    rows[9] = (rows[8][0], rows[8][0])
    assert looked_at(rows).findings == []


def cut(row: Row, length: int) -> Row:
    return row[0][:length], row[1][:length]


@pytest.mark.parametrize("closing", [(END,), (END, NEWLINE)])
@pytest.mark.parametrize("ends", [(END,), ()])
@pytest.mark.parametrize("known", [True, False])
def test_answers_that_are_cut_off(closing: tuple[int, ...], ends: tuple[int, ...], known: bool) -> None:
    """Told by the tokenizer's end, or by how the other rows end; at a length that is given, or that several share."""
    whole, length = written(closing=closing), 12
    rows = [cut(row, length) for row in whole]
    lost = [n for n, (ids, _) in enumerate(whole) if len(ids) > length and ids[length:] != [NEWLINE]]
    planted = [n for n in lost if rows[n][1][-1] != IGNORED]
    assert 10 < len(planted) < len(lost)
    if not ends:  # what is left of an end in two tokens is not the usual one
        planted += [n for n, (ids, _) in enumerate(whole) if ids[length:] == [NEWLINE]]
    assert looked_at(rows, length if known else None, ends).rows_by("cut") == sorted(planted)


def test_a_whole_row_of_the_maximum_length_is_not_cut() -> None:
    rows = written(closing=(END, NEWLINE))
    answer = [9] * (LONGEST - 3) + [END, NEWLINE]
    rows[4] = ([9, *answer], [IGNORED, *answer])
    rows[5] = ([9] * LONGEST, [IGNORED] * LONGEST)  # and one that has no answer left is masked
    found = looked_at(rows)
    assert found.rows_by("cut") == [] and found.rows_by("masked") == [5]


def test_what_cannot_be_known_is_said() -> None:
    blocks = [([n] * LONGEST, [n] * LONGEST) for n in range(20)]  # as packing makes them
    assert looked_at(blocks, ends=()).unknown == {"cut": "it is not known how an answer ends"}
    assert looked_at(written()[:1], None).unknown == {"cut": "the maximum length is not known"}


def test_below_one_row_in_a_hundred_the_line_says_nothing() -> None:
    rows = written(count=300)
    for row in (1, 2):
        rows[row] = rows[0]
    assert looked_at(rows).rows_by("duplicate") == [1, 2] and looked_at(rows).line() is None
    rows[3] = rows[0]
    assert looked_at(rows).line() == "LoRA-DA: of 300 rows that were read, 3 repeat earlier ones (rows 1, 2, 3)"


def test_one_row_and_many_in_words() -> None:
    rows = written()
    for row in range(20, 30):
        rows[row] = rows[0]
    assert looked_at(rows).sentence("duplicate") == "10 repeat earlier ones (rows 20, 21, 22, 23, 24, …)"
    assert looked_at(rows[:21]).sentence("duplicate") == "1 repeats an earlier one (row 20)"
