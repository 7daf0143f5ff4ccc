"""What a row tells by its token ids and labels alone, in a few numbers, so that all rows of a dataset can be kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lora_da.samples.batch import NOT_TEXT, Batch
from lora_da.samples.tokens import IGNORED

END = 4  # tokens that the end of an answer is told by


@dataclass(frozen=True)
class RowFacts:
    """One row.

    Args:
        row: its index in the data.
        tokens: in it.
        loss_tokens: labels that a token before them predicts.
        digest: the same for the same ids and labels.
        end: the last tokens, as far back as they carry loss without a gap; `END` at most.
    """

    row: int
    tokens: int
    loss_tokens: int
    digest: bytes
    end: tuple[int, ...]


def row_facts(row: int, ids: Sequence[int], labels: Sequence[int]) -> RowFacts:
    """Look at one row, without its padding."""
    numbers = _numbers(ids, labels)
    carries = numbers[1] != IGNORED
    gap = np.flatnonzero(~carries[-END:])
    end = numbers[0, -END:][gap[-1] + 1 if len(gap) else 0 :]
    return RowFacts(row, numbers.shape[1], int(carries[1:].sum()), _digest(numbers), tuple(end.tolist()))


def digests_in(batch: Batch) -> dict[int, bytes]:
    """The digest of the row that each counted document of a batch is, by its number; of none where rows hold several
    documents or more than text."""
    rows = list(rows_in(batch.inputs))
    if batch.tokens.boundaries != "row" or len(rows) != batch.tokens.rows:
        return {}
    numbers = batch.tokens.document.view(batch.shape).amax(1).tolist()
    return {number: _digest(_numbers(*row)) for number, row in zip(numbers, rows, strict=True) if number >= 0}


def _numbers(ids: Sequence[int], labels: Sequence[int]) -> np.ndarray[Any, Any]:
    return np.asarray([ids, labels], dtype=np.int64)  # (2, tokens)


def _digest(numbers: np.ndarray[Any, Any]) -> bytes:
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()


def rows_in(inputs: Mapping[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of each row of a batch, without what its mask calls padding.

    None where not every token has a label, or where rows hold more than text.

    Args:
        inputs: the collator's output.
    """
    ids, labels, mask = (inputs.get(name) for name in ("input_ids", "labels", "attention_mask"))
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.dim() != 2 or labels.shape != ids.shape:
        return
    if any(NOT_TEXT.match(name) for name in inputs):
        return
    masked = isinstance(mask, Tensor) and mask.shape == ids.shape
    for row in range(len(ids)):
        real = mask[row] != 0 if masked else slice(None)  # type: ignore[index]
        yield ids[row][real].tolist(), labels[row][real].tolist()
