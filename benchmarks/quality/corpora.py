"""The corpus of each task: questions with their answers from the user's files, split once and for all."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.errors import BenchmarkError
from benchmarks.tokenized_rows import Row, data_file
from lora_da.export.files import load_rows
from lora_da.export.rows import TokenizedRows

SPLIT_SEED = 0  # of the development rows: the same for every seed of a sweep
DIGEST = 12  # characters
SPLITS = ("development", "test")


@dataclass(frozen=True)
class Corpus:
    """The files of a task.

    Args:
        name: the task's, as reports call it.
        train, test: files that `python -m lora_da` reads; relative paths begin at LORA_DA_DATA.
        choices: the answers to rank against each other where the task is a choice; none otherwise.
    """

    name: str
    train: str
    test: str
    choices: tuple[str, ...] = ()

    def digest(self) -> str:
        """Digest rows and choices: other rows are another task."""
        found = hashlib.sha256(repr(self.choices).encode())
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
    rows that also are in the test file, so neither are ever trained on.

    Args:
        split: `development` or `test`: where the held-out rows come from.
        length: tokens; longer rows are left out, none is cut.
        heldout: held-out rows.
        train: training rows, drawn with `seed`, anew each time all have been drawn.

    Raises:
        BenchmarkError: the files hold too few rows.
    """
    pool = _tokenized(corpus.train, tokenizer, length)
    development, pool = _taken(pool, heldout, SPLIT_SEED)
    test = _tokenized(corpus.test, tokenizer, length)
    held = development if split == "development" else _taken(test, heldout, SPLIT_SEED)[0]
    never = {tuple(row["input_ids"]) for row in development + test}
    pool = [row for row in pool if tuple(row["input_ids"]) not in never]
    if len(held) < heldout or not pool:
        raise BenchmarkError(f"{corpus.name}: {len(held)} held-out rows of up to {length} tokens, {heldout} asked for")
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < train:
        order += torch.randperm(len(pool), generator=generator).tolist()
    return SeedRows([pool[n] for n in order[:train]], sorted(held, key=lambda row: len(row["input_ids"])))


def _taken(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Take `count` random rows; return them and the others."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[n] for n in order[:count]], [rows[n] for n in order[count:]]


def _tokenized(name: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Row]:
    rows = TokenizedRows(load_rows(data_file(name)), tokenizer, sys.maxsize)
    return [row for row in map(rows.__getitem__, range(len(rows))) if len(row["input_ids"]) <= length]
