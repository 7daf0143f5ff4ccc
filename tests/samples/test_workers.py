"""Samplers and workers of the user's loader are not used, but where only a worker can read the rows."""

from __future__ import annotations

import os
import resource

import pytest
import torch
from drawing import DOCUMENTS, ids, loader, seen, take
from models import batches, documents, pad
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, get_worker_info


class Untouchable(SequentialSampler):
    def __iter__(self):
        raise AssertionError("the user's sampler was used")


class Here(list):
    """Rows that are to be read in this process."""

    def __getitem__(self, number):
        assert get_worker_info() is None, "a worker was started"
        return super().__getitem__(number)


def test_samplers_and_workers_are_not_used():
    for options in ({"sampler": Untouchable(DOCUMENTS)}, {"num_workers": 2}):
        assert seen(take(loader(Here(DOCUMENTS), **options), 5)) == ids(DOCUMENTS[:5])
    sampler = BatchSampler(Untouchable(DOCUMENTS), 4, drop_last=False)
    data = take(DataLoader(DOCUMENTS, batch_sampler=sampler, collate_fn=pad), 5)
    assert seen(data) == ids(DOCUMENTS[:5]) and data.population_size == 30


class OpenedInWorkers(Dataset):
    """Rows that are there only where a worker's beginning has opened them."""

    def __init__(self, rows):
        self.closed, self.rows = rows, None

    def __len__(self):
        return len(self.closed)

    def __getitem__(self, number):
        return self.rows[number]


def open_rows(number):
    dataset = get_worker_info().dataset
    dataset = getattr(dataset, "dataset", dataset)
    dataset.rows = dataset.closed


@pytest.mark.parametrize(("context", "seed"), [("fork", None), ("fork", 3), ("spawn", None)])
def test_rows_are_read_where_a_worker_has_opened_them(context, seed):
    dataset = OpenedInWorkers(DOCUMENTS)
    options = {"num_workers": 2, "worker_init_fn": open_rows, "multiprocessing_context": context}
    if context == "fork":  # a spawned worker takes seconds to begin
        assert len(next(iter(loader(dataset, **options)))["input_ids"]) == 4, "the user's own loop works"
    data = take(loader(dataset, **options), 5, seed)
    assert data.n_samples == 5 and data.population_size == 30 and dataset.rows is None
    if seed is None:
        assert seen(data) == ids(DOCUMENTS[:5])


def test_so_are_ready_batches():
    ready = OpenedInWorkers(batches(DOCUMENTS, 2))
    dataloader = DataLoader(ready, batch_size=None, num_workers=1, worker_init_fn=open_rows)
    assert seen(take(dataloader, 4)) == ids(DOCUMENTS[:4])


def test_rows_of_tensors_from_a_worker_keep_no_files_open():
    """A tensor that a worker hands over is an open file for as long as it is kept."""
    rows = [{name: torch.tensor(values) for name, values in row.items()} for row in documents(200, seed=2)]

    def collate(several):
        return pad([{name: values.tolist() for name, values in row.items()} for row in several])

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 150, hard))
    try:
        options = {"num_workers": 1, "worker_init_fn": lambda number: None, "multiprocessing_context": "fork"}
        assert take(loader(rows, collate=collate, **options), 200).n_samples == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
