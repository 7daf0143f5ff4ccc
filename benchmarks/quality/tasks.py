"""What is learned: questions with their answers from a file of the user's, split once and for all."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lora_da.export.files import load_rows as read_file
from lora_da.export.rows import TokenizedRows

Row = dict[str, list[int]]  # input_ids and labels

SPLIT_SEED = 0  # of the development rows: the same for every seed of a sweep
DIGEST = 12  # characters
SPLITS = ("development", "test")


@dataclass(frozen=True)
class Task:
    """A task by path.

    Args:
        name: as reports call it.
        train, test: files that `python -m lora_da` reads; relative paths begin at LORA_DA_DATA.
        choices: the answers to rank against each other where the task is a choice; none otherwise.
    """

    name: str
    train: str
    test: str
    choices: tuple[str, ...] = ()

    def digest(self) -> str:
        """Hash its rows and choices: other rows are another task."""
        found = hashlib.sha256(repr(self.choices).encode())
        for name in (self.train, self.test):
            found.update(_path(name).read_bytes())
        return found.hexdigest()[:DIGEST]


@dataclass(frozen=True)
class Rows:
    """What a seed trains on, in order, and what it is judged by."""

    train: list[Row]
    heldout: list[Row]


def read_rows(
    task: Task, tokenizer: PreTrainedTokenizerBase, split: str, length: int, heldout: int, train: int, seed: int
) -> Rows:
    """The rows of one seed.

    The development rows are cut from the training file before anything is drawn from it, and what is left is without
    rows that also are in the test file, so neither are ever trained on.

    Args:
        split: `development` or `test`: where the held-out rows come from.
        length: tokens; longer rows are left out, none is cut.
        heldout: held-out rows.
        train: training rows, drawn with `seed`, anew each time all have been drawn.

    Raises:
        ValueError: the files hold too few rows.
    """
    pool = _encoded(task.train, tokenizer, length)
    development, pool = _taken(pool, heldout, SPLIT_SEED)
    test = _encoded(task.test, tokenizer, length)
    held = development if split == "development" else _taken(test, heldout, SPLIT_SEED)[0]
    never = {tuple(row["input_ids"]) for row in development + test}
    pool = [row for row in pool if tuple(row["input_ids"]) not in never]
    if len(held) < heldout or not pool:
        raise ValueError(f"{task.name}: {len(held)} held-out rows of up to {length} tokens, {heldout} asked for")
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < train:
        order += torch.randperm(len(pool), generator=generator).tolist()
    return Rows([pool[n] for n in order[:train]], sorted(held, key=lambda row: len(row["input_ids"])))


def _taken(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """`count` random rows, and the others."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[n] for n in order[:count]], [rows[n] for n in order[count:]]


def _encoded(name: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Row]:
    rows = TokenizedRows(read_file(_path(name)), tokenizer, sys.maxsize)
    return [row for row in map(rows.__getitem__, range(len(rows))) if len(row["input_ids"]) <= length]


def _path(name: str) -> Path:
    return Path(os.environ.get("LORA_DA_DATA", "."), name)
