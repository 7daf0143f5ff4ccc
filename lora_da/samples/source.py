"""The user's data, read by a loader of our own, which leaves the user's samplers and workers alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset, Subset

from lora_da.errors import LoraDAError

T = TypeVar("T")
Collate = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class OwnRows:
    """The user's data, read by a loader of our own.

    Args:
        rows: of the dataset, or ready batches.
        collate: makes batches of rows; None where they are ready.
        count: how many the whole dataset has; None where that is unknown.
        unit: what `count` counts: each `item` of the dataset, or each `row` of its batches.
        order: the rows' indices in the dataset, as they are read; ascending from 0 if None.
    """

    rows: Iterable[Any]
    collate: Collate | None
    count: int | None
    unit: str
    order: Sequence[int] | None = None


def own_rows(dataloader: Iterable[Any], seed: int | None) -> OwnRows:
    """Read the same data with a loader of our own."""
    dataset = getattr(dataloader, "dataset", None)
    while isinstance(dataset, IterableDatasetShard):  # accelerate's, of which each process sees a part
        dataset = dataset.dataset
    n_rows = len(dataset) if isinstance(dataset, Sized) else None
    if seed is not None and (n_rows is None or isinstance(dataset, IterableDataset)):
        raise LoraDAError(
            f"`seed: {seed}` asks for random samples, which needs a DataLoader over a dataset with a length, not "
            f"{type(dataset if dataset is not None else dataloader).__name__}: leave `seed` unset"
        )
    if dataset is None or not hasattr(dataloader, "collate_fn"):
        n_rows = sum(map(n_rows_of, dataloader)) if isinstance(dataloader, (list, tuple)) else None
        return OwnRows(dataloader, None, n_rows, "row")
    if n_rows is not None and not isinstance(dataset, IterableDataset):
        if seed is None:
            order: Any = range(n_rows)
        else:
            order = torch.randperm(n_rows, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").tolist()
        dataset = Subset(dataset, order)
    elif isinstance(dataset, Iterable) and iter(dataset) is iter(dataset):
        raise LoraDAError(
            "the dataset can be iterated over only once: samples taken from it would be missing in training; "
            "use one that starts anew with each iteration"
        )
    # Rows are copied before they are collated: many collators pad the ones they are given in place.
    collate = dataloader.collate_fn
    worker = _own_worker(dataloader)
    if getattr(dataloader, "batch_sampler", dataloader) is None:  # the dataset's items are batches already
        ready = DataLoader(dataset, None, collate_fn=copy.deepcopy if worker else _as_it_is, **worker)
        return OwnRows((collate(copy.deepcopy(batch)) for batch in ready), None, n_rows, "item")
    # In batches of one: Axolotl's packing replaces the part of torch that fetches single rows.
    order = dataset.indices if isinstance(dataset, Subset) else None
    rows: Iterable[Any] = DataLoader(dataset, 1, collate_fn=_copy_of_the_only if worker else _the_only, **worker)
    if worker:
        rows = map(copy.deepcopy, rows)
    return OwnRows(rows, collate, n_rows, "item", order)


def _own_worker(dataloader: Any) -> dict[str, Any]:
    """Arguments for a loader that reads the rows where the user's does, if something is set up there; else in this
    process.

    What a worker hands over is in shared memory, an open file for each tensor as long as either side keeps it: both
    copy what they keep.
    """
    if not isinstance(dataloader, DataLoader) or not dataloader.num_workers or dataloader.worker_init_fn is None:
        return {}
    shared = ("worker_init_fn", "multiprocessing_context", "timeout", "prefetch_factor")
    return {"num_workers": 1, **{name: getattr(dataloader, name) for name in shared}}


def _as_it_is(item: T) -> T:
    return item


def _the_only(rows: list[T]) -> T:
    return rows[0]


def _copy_of_the_only(rows: list[T]) -> T:
    return copy.deepcopy(rows[0])


def n_rows_of(batch: Any) -> int:
    """The rows of a batch; 0 for a malformed one, which is refused when it is read."""
    inputs = batch if isinstance(batch, Mapping) else {}
    rows = next((inputs[key] for key in ("labels", "input_ids") if inputs.get(key) is not None), None)
    return len(rows) if isinstance(rows, torch.Tensor) and rows.dim() > 0 else 0
