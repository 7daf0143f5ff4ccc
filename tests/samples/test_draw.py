"""Which samples are drawn, and what they stand for."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from drawing import DOCUMENTS, ids, loader, masked, seen, take
from models import (
    IGNORED,
    HeldIterator,
    OwnIterator,
    Stream,
    batches,
    documents,
    packed,
    pad,
    tiny_llama,
    with_lora,
)
from settings import as_solved
from torch.utils.data import DataLoader

from lora_da import LoraDAError, initialize_lora_da_weights
from lora_da.samples.draw import Size, draw, read_causal

ROWS = [DOCUMENTS[first : first + 3] for first in range(0, 30, 3)]  # ten packed rows of three documents


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
@pytest.mark.parametrize("samples", [1, 7, 30])
def test_the_first_samples(samples, batch_size, shuffle):
    """The first documents, however they are batched or shuffled in training, and counted exactly."""
    data = take(loader(batch_size=batch_size, shuffle=shuffle), samples)
    assert seen(data) == ids(DOCUMENTS[:samples])
    assert data.n_samples == samples and data.unit == "row"
    assert data.n_tokens == sum(len(row["input_ids"]) for row in DOCUMENTS[:samples])
    assert data.n_loss_tokens == sum(label != IGNORED for row in DOCUMENTS[:samples] for label in row["labels"][1:])


def test_documents_without_loss_are_passed_over():
    """They are no samples: the next document takes their place."""
    rows = [masked(row) if i % 3 == 0 else row for i, row in enumerate(DOCUMENTS)]
    data = take(loader(rows), 8)
    assert seen(data) == ids([row for i, row in enumerate(DOCUMENTS) if i % 3][:8])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_empty_documents_are_passed_over(batch_size):
    empty = {"input_ids": [], "labels": []}
    rows = [empty, *DOCUMENTS[:3], empty, *DOCUMENTS[3:]]
    for data in (take(loader(rows, batch_size), 6), take(batches(rows, batch_size), 6)):
        assert seen(data) == ids(DOCUMENTS[:6])


def test_samples_of_packed_rows_are_documents():
    data = take(loader(ROWS, 1, collate=lambda rows: packed(rows[0])), 7)
    assert seen(data) == ids(DOCUMENTS[:7])
    assert data.unit == "document (from position_ids)"


@pytest.mark.parametrize("batch_size", [1, 5])
def test_random_samples(batch_size):
    """Drawn with the seed alone: other than the first, without repetition, the same whatever the global state."""
    torch.manual_seed(1)
    found = seen(take(loader(batch_size=batch_size), 12, seed=5))
    torch.manual_seed(2)
    assert seen(take(loader(batch_size=batch_size, shuffle=True), 12, seed=5)) == found
    assert seen(take(loader(batch_size=3), 12, seed=5)) == found
    assert seen(take(loader(batch_size=batch_size), 12, seed=6)) != found
    assert found != ids(DOCUMENTS[:12])
    assert len({tuple(row) for row in found}) == 12 and all(row in ids(DOCUMENTS) for row in found)


@pytest.mark.parametrize(
    "dataloader",
    [loader(Stream(DOCUMENTS)), batches(DOCUMENTS, 4), iter(batches(DOCUMENTS, 4))],
    ids=["stream", "list", "iterator"],
)
def test_random_samples_need_a_sized_dataset(dataloader):
    with pytest.raises(LoraDAError, match="`seed: 3` asks for random samples.*leave `seed` unset"):
        take(dataloader, 4, seed=3, population=30)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
@pytest.mark.parametrize("samples", [1, 5, 10, 30])
@pytest.mark.parametrize("seed", [None, 2])
def test_the_population_is_the_training_set(samples, batch_size, seed):
    """N is the length of the training set, wherever in a batch the last sample lies."""
    assert take(loader(batch_size=batch_size), samples, seed).population_size == 30


@pytest.mark.parametrize("samples", [1, 4, 9, 30])
@pytest.mark.parametrize("rows_per_batch", [1, 2, 4])
def test_the_population_of_packed_rows_is_in_documents(samples, rows_per_batch):
    """Ten rows of three documents stand for thirty, wherever in a row the last sample lies."""

    def collate(rows):
        return packed([row for packed_row in rows for row in packed_row])

    assert take(loader(ROWS, rows_per_batch, collate), samples).population_size == 30


def test_the_population_counts_documents_that_carry_loss():
    """Every third document of those seen carries none, and so of the rest."""
    rows = [masked(row) if i % 3 == 0 else row for i, row in enumerate(DOCUMENTS)]
    assert take(loader(rows, 6), 4).population_size == 20


@pytest.mark.parametrize("shape", ["stream", "iterator"])
def test_data_without_a_length(shape):
    """The population has to be given; then the first samples are taken."""

    def make():
        return loader(Stream(DOCUMENTS)) if shape == "stream" else iter(batches(DOCUMENTS, 4))

    with pytest.raises(LoraDAError, match="no length.*`population_size`"):
        take(make(), 4)
    data = take(make(), 6, population=1000)
    assert seen(data) == ids(DOCUMENTS[:6]) and data.population_size == 1000


@pytest.mark.parametrize("kind", [OwnIterator, HeldIterator])
def test_data_that_can_be_read_once_are_refused(kind):
    """Samples taken from them would be missing in training."""
    dataset = kind(DOCUMENTS)
    with pytest.raises(LoraDAError, match="only once.*starts anew"):
        take(loader(dataset), 4, population=30)
    assert list(dataset) == DOCUMENTS


def test_an_iterator_is_read_no_further_than_needed():
    iterator = iter(batches(DOCUMENTS, 4))
    take(iterator, 6, population=30)
    assert torch.equal(next(iterator)["input_ids"], pad(DOCUMENTS[8:12])["input_ids"])


def grabbing(rows):
    """A collator that pads, pops and replaces in the rows that it is given, and in their lists."""
    width = max(len(row["input_ids"]) for row in rows)
    for row in rows:
        row["labels"] += [IGNORED] * (width - len(row["labels"]))
        row["labels"][0] = IGNORED
    labels = [row.pop("labels") for row in rows]
    return {**pad([{**row, "labels": row["input_ids"]} for row in rows]), "labels": torch.tensor(labels)}


def test_rows_that_the_collator_takes_only_alone_go_alone():
    """Axolotl's streamed packing: its loader asks for single rows, and its collator does not pad them."""

    def stack(rows):
        if len({len(row["input_ids"]) for row in rows}) > 1:
            raise ValueError("expected sequence of length 12 at dim 1 (got 9)")
        return pad(rows)

    data = take(loader(batch_size=1, collate=stack), 9)
    assert seen(data) == ids(DOCUMENTS[:9])
    assert (data.n_samples, data.population_size) == (9, 30)


def test_a_collator_that_writes_into_its_rows_leaves_the_dataset_alone():
    dataset = copy.deepcopy(DOCUMENTS)
    data = take(loader(dataset, collate=grabbing), 9)
    assert seen(data) == ids(DOCUMENTS[:9])
    assert dataset == DOCUMENTS

    grabbing(dataset)  # what must not happen can be seen
    assert dataset != DOCUMENTS


@pytest.mark.parametrize("wrap", [list, lambda ready: DataLoader(ready, batch_size=None)], ids=["list", "loader"])
def test_ready_batches(wrap):
    """They hold the training set; a loader with `batch_size=None` hands them out as they are."""
    data = take(wrap(batches(DOCUMENTS, 5)), 9)
    assert seen(data) == ids(DOCUMENTS[:9]) and data.population_size == 30


def test_datasets_of_hugging_face():
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    table = datasets.Dataset.from_list(DOCUMENTS)
    data = take(loader(table, shuffle=True), 9)
    assert seen(data) == ids(DOCUMENTS[:9]) and data.population_size == 30
    assert seen(take(loader(table), 9, seed=5)) == seen(take(loader(), 9, seed=5))

    stream = table.to_iterable_dataset()
    with pytest.raises(LoraDAError, match="`population_size`"):
        take(loader(stream), 9)
    assert seen(take(loader(stream), 9, population=30)) == ids(DOCUMENTS[:9])
    assert ids(stream) == ids(DOCUMENTS)


@pytest.mark.parametrize("dataloader", [loader(DOCUMENTS[:3]), batches(DOCUMENTS[:3], 2)], ids=["loader", "list"])
def test_fewer_samples_than_asked(dataloader, caplog):
    """It goes on with what there is, with a warning."""
    data = take(dataloader, 10)
    caplog.clear()
    assert seen(data) == ids(DOCUMENTS[:3]) and data.population_size == 3
    with caplog.at_level(logging.WARNING, "lora_da"):
        report = initialize_lora_da_weights(
            with_lora(tiny_llama()), dataloader, as_solved(samples=10), show_progress=False
        )
    assert report.samples == 3 and report.initialized == report.targeted
    assert [record.getMessage() for record in caplog.records] == ["LoRA-DA: the data hold 3 samples, 10 were asked for"]


@pytest.mark.parametrize("empty", [loader([]), [], loader(Stream([]))], ids=["loader", "list", "stream"])
def test_no_data(empty):
    with pytest.raises(LoraDAError, match="the dataset is empty"):
        take(empty, 4, population=None if not isinstance(getattr(empty, "dataset", None), Stream) else 5)


def test_no_loss():
    with pytest.raises(LoraDAError, match="none of the first 30 rows.*all labels are -100.*chat template"):
        take(loader([masked(row) for row in DOCUMENTS]), 4)


@pytest.mark.parametrize(
    "malformed",
    [
        [torch.ones(2, 3)],
        [{"input_ids": torch.ones(2, 3)}],
        [{"labels": None}],
        [{"labels": torch.tensor(1)}],
    ],
)
def test_batches_that_are_none(malformed):
    """They are refused, as a list and from a loader over ready batches."""
    for dataloader in (malformed, DataLoader(malformed, batch_size=1, collate_fn=lambda rows: rows[0])):
        with pytest.raises(LoraDAError, match="label"):
            take(dataloader, 4)


@pytest.mark.parametrize("sized", [True, False])
def test_a_stream_that_accelerate_shards_is_read_whole(sized):
    """Each process would see a part of it, and its length is not the stream's."""
    from accelerate.data_loader import IterableDatasetShard

    class Sized(Stream):
        def __len__(self):
            return len(self.rows)

    rows = documents(8)
    shard = IterableDatasetShard((Sized if sized else Stream)(rows), batch_size=2, num_processes=2)
    data = draw(DataLoader(shard, 2, collate_fn=pad), Size(6), None, None if sized else 100, read_causal, True)
    assert data.n_samples == 6 and data.population_size == (8 if sized else 100)
    assert data.n_tokens == sum(len(row["input_ids"]) for row in rows[:6])
