"""Samples drawn from documents: what `draw` is asked, and what it gave."""

from __future__ import annotations

from models import IGNORED, documents, pad
from torch.utils.data import DataLoader

from lora_da.samples.draw import Size, draw, read_causal

DOCUMENTS = documents(30, seed=1)


def loader(rows=DOCUMENTS, batch_size=4, collate=pad, **options):
    return DataLoader(rows, batch_size, collate_fn=collate, **options)


def take(dataloader, samples, seed=None, population=None):
    return draw(dataloader, Size(samples), seed, population, read_causal, True)


def seen(data):
    """The drawn documents, as lists of token ids, in an order of their own: batches are made by length."""
    found = []
    for batch in data.batches:
        ids, tokens = batch.inputs["input_ids"].flatten(), batch.tokens
        found += [ids[tokens.document == number].tolist() for number in range(tokens.n_documents)]
    return sorted(found)


def ids(rows):
    return sorted(row["input_ids"] for row in rows)


def masked(row):
    return {**row, "labels": [IGNORED] * len(row["labels"])}
