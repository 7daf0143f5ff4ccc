"""What rows tell without a loss of each: those that train nothing, that repeat earlier ones, whose answers are cut off,
and, of those that were run, which ones' gradients stand out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lora_da.doctor.outliers import with_large_gradients
from lora_da.findings import DataReport, Finding
from lora_da.samples.facts import END, RowFacts

ENOUGH = 8  # rows below the longest, to learn from how answers end


def look_at(
    rows: Sequence[RowFacts],
    max_length: int | None,
    ends: Iterable[int],
    gradient_norms: Mapping[int, float] | None = None,
) -> DataReport:
    """What is found in rows.

    Args:
        rows: to look at, in the order of the data.
        max_length: at which longer rows were cut off. If None, the longest row's where several are as long.
        ends: the tokenizer's tokens that end an answer, if they are known.
        gradient_norms: of the rows that were run, by row; see `InitReport.gradient_norms`. None were asked for if None.
    """
    repeated, unknown = _repeated(rows), {}
    cut, unknown["cut"] = _cut(rows, max_length, set(ends))
    large: list[Finding] = []
    if gradient_norms is not None:
        again = {finding.row for finding in repeated}
        large, unknown["gradient"] = with_large_gradients([row for row in rows if row.row not in again], gradient_norms)
    return DataReport(
        rows=len(rows),
        tokens=sum(row.tokens for row in rows),
        loss_tokens=sum(row.loss_tokens for row in rows),
        findings=[*_masked(rows), *repeated, *cut, *large],
        unknown={reason: why_not for reason, why_not in unknown.items() if why_not},
    )


def _masked(rows: Sequence[RowFacts]) -> list[Finding]:
    return [Finding(row.row, "masked", {"tokens": row.tokens}) for row in rows if not row.loss_tokens]


def _repeated(rows: Sequence[RowFacts]) -> list[Finding]:
    """Rows with the ids and labels of an earlier one, each with the first of its kind."""
    first: dict[bytes, int] = {}
    found = []
    for row in rows:
        earlier = first.setdefault(row.digest, row.row)
        if earlier != row.row:
            found.append(Finding(row.row, "duplicate", {"of": earlier}))
    return found


def _cut(rows: Sequence[RowFacts], max_length: int | None, ends: set[int]) -> tuple[list[Finding], str]:
    """Rows of the maximum length that do not end as an answer does; and why that cannot be told, if so."""
    lengths = Counter(row.tokens for row in rows)
    longest = max(lengths, default=0)
    if max_length is None:
        if lengths[longest] < 2:
            return [], "the maximum length is not known"
        max_length = longest
    full = [row for row in rows if row.tokens >= max_length and row.end]
    usual = _usual_end([row.end for row in rows if row.tokens < max_length and row.end])
    if full and not ends and not usual:
        return [], "it is not known how an answer ends"
    cut = [row for row in full if row.end[-1] not in ends and not (usual and row.end[-len(usual) :] == usual)]
    return [Finding(row.row, "cut", {"tokens": row.tokens}) for row in cut], ""


def _usual_end(seen: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest end that more than half of the rows have, where there are enough; what a chat template writes behind
    an answer is more than one token."""
    usual: tuple[int, ...] = ()
    for length in range(1, END + 1):
        ((end, count),) = Counter(end[-length:] for end in seen if len(end) >= length).most_common(1) or [((), 0)]
        if len(seen) < ENOUGH or 2 * count <= len(seen):
            break
        usual = end
    return usual
