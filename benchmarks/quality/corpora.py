"""The corpus of each task: questions with their answers from the user's files, split once and for all."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.errors import BenchmarkError
from benchmarks.tokenized_rows import Row, data_file
from lora_da.export.files import load_rows
from lora_da.export.rows import TokenizedRows
from lora_da.samples.tokens import IGNORED

SPLIT_SEED = 0  # of the development rows: the same for every seed of a sweep
DIGEST = 12  # characters
SPLITS = ("development", "test")


@dataclass(frozen=True)
class Corpus:
    """The files of a task.

    Args:
        name: the task's, as reports call it.
        train, test: files that `python -m lora_da` reads; relative paths begin at LORA_DA_DATA.
        input, output: names of the fields that hold what is asked and what is to be answered, which then become a chat;
            without them, rows are read by the fields that `python -m lora_da` knows.
        choices: the answers to rank against each other where the task is a choice; none otherwise.
        exact_match_rows: held-out rows whose answers are generated at the end and compared with the true ones.

    Raises:
        BenchmarkError: one of `input` and `output` is there and not the other.
    """

    name: str
    train: str
    test: str
    input: str | None = None
    output: str | None = None
    choices: tuple[str, ...] = ()
    exact_match_rows: int = 0

    def __post_init__(self) -> None:
        if (self.input is None) != (self.output is None):
            raise BenchmarkError(f"{self.name}: has one of `input` and `output`; set both or none")

    def digest(self) -> str:
        """Digest rows, fields and choices: other rows are another task."""
        found = hashlib.sha256(repr(self.choices).encode())
        if self.input is not None:
            found.update(repr((self.input, self.output)).encode())
        for name in (self.train, self.test):
            found.update(data_file(name).read_bytes())
        return found.hexdigest()[:DIGEST]


@dataclass(frozen=True)
class SeedRows:
    """What a seed trains on, in order, and what it is judged by."""

    train: list[Row]
    heldout: list[Row]


def split_rows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, split: str, length: int, heldout: int, train: int, seed: int
) -> SeedRows:
    """Split a corpus into the rows that one seed trains on and those it is judged by.

    The development rows are cut from the training file before anything is drawn from it, and what is left is without
    their inputs and those of the test file, so that no input of a held-out row is ever trained on.

    Args:
        split: `development` or `test`: where the held-out rows come from.
        length: tokens; longer rows are left out, none is cut.
        heldout: held-out rows.
        train: training rows, drawn with `seed`, anew each time all have been drawn.

    Raises:
        BenchmarkError: the files hold too few rows.
    """
    pool = _tokenized(corpus, corpus.train, tokenizer, length)
    development, pool = _taken(pool, heldout, SPLIT_SEED)
    test = _tokenized(corpus, corpus.test, tokenizer, length)
    held = development if split == "development" else _taken(test, heldout, SPLIT_SEED)[0]
    never = {input_of(row) for row in development + test}
    pool = [row for row in pool if input_of(row) not in never]
    if len(held) < heldout or not pool:
        raise BenchmarkError(f"{corpus.name}: {len(held)} held-out rows of up to {length} tokens, {heldout} asked for")
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < train:
        order += torch.randperm(len(pool), generator=generator).tolist()
    return SeedRows([pool[n] for n in order[:train]], sorted(held, key=lambda row: len(row["input_ids"])))


def input_of(row: Row) -> tuple[int, ...]:
    """Give the tokens of a row that the answer follows: what it is asked."""
    first = next((n for n, label in enumerate(row["labels"]) if label != IGNORED), 0)
    return tuple(row["input_ids"][:first])


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """Take `count` of the rows, at even distances."""
    return [rows[n * len(rows) // count] for n in range(count)]


def _taken(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Take `count` random rows; return them and the others."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[n] for n in order[:count]], [rows[n] for n in order[count:]]


def _tokenized(corpus: Corpus, name: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Row]:
    rows = load_rows(data_file(name))
    if corpus.input is not None:
        rows = [_as_chat(corpus, name, row) for row in rows]
    tokenized = TokenizedRows(rows, tokenizer, sys.maxsize)
    return [row for row in map(tokenized.__getitem__, range(len(tokenized))) if len(row["input_ids"]) <= length]


def _as_chat(corpus: Corpus, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    for field in (corpus.input, corpus.output):
        if field not in row:
            raise BenchmarkError(f"{corpus.name}: rows of {name} have no {field!r}, but {', '.join(row)}")
    return {"question": row[corpus.input], "answer": row[corpus.output]}  # type: ignore[index]
