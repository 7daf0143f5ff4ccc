"""Which samples are drawn, what they stand for, and that the user's data stay where they were."""

from __future__ import annotations

import copy
import functools
import logging
import os
import random
import resource
import weakref
from collections.abc import Mapping

import numpy as np
import pytest
import torch
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
from picture import differences, random_picture
from settings import as_solved
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    get_worker_info,
)

from lora_da import LoraDAError, initialize_lora_da_weights
from lora_da.model.state import estimation_mode
from lora_da.samples.draw import Size, draw, read_causal

DOCUMENTS = documents(30, seed=1)
ROWS = [DOCUMENTS[first : first + 3] for first in range(0, 30, 3)]  # ten packed rows of three documents


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


def test_a_shuffling_loader_is_not_moved():
    """Training draws the order it would have drawn: generators and samplers are as before."""

    def shuffled():
        generator = torch.Generator().manual_seed(3)
        sampler = RandomSampler(DOCUMENTS, generator=generator)
        return loader(sampler=sampler, generator=generator), generator

    untouched, _ = shuffled()
    torch.manual_seed(4)
    wanted = [batch["input_ids"].tolist() for batch in untouched]

    used, generator = shuffled()
    state = generator.get_state()
    sampler, model = used.sampler, with_lora(tiny_llama())
    torch.manual_seed(4)
    before = random_picture()
    with estimation_mode(model):
        take(used, 6)
        take(used, 6, seed=1)
    assert differences(before, random_picture()) == []
    assert torch.equal(generator.get_state(), state) and used.sampler is sampler
    assert [batch["input_ids"].tolist() for batch in used] == wanted

    next(iter(used))  # what must not happen can be seen
    assert not torch.equal(generator.get_state(), state)


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


GENERATORS = {
    "random": (lambda: random.Random(0), lambda g: g.random()),
    "numpy": (lambda: np.random.default_rng(0), lambda g: float(g.random())),
    "numpy's old": (lambda: np.random.RandomState(0), lambda g: float(g.rand())),
    "torch": (lambda: torch.Generator().manual_seed(0), lambda g: torch.rand((), generator=g).item()),
}


class Changing(Dataset):
    """Each row is one of the documents, as a generator decides that `hold` puts somewhere."""

    def __init__(self, kind, hold):
        make, self.draw = GENERATORS[kind]
        self.held, self.take_out = hold(make())

    def __len__(self):
        return len(DOCUMENTS)

    def __getitem__(self, number):
        return DOCUMENTS[int(self.draw(self.take_out(self.held)) * len(DOCUMENTS))]


class Holder:
    def __init__(self, generator):
        self.generator = generator

    def get(self):
        return self.generator


class Slotted:
    __slots__ = ("generator", "never_set")

    def __init__(self, generator):
        self.generator = generator


def enclosed(generator):
    return lambda: generator


HOLDERS = {
    "attribute": lambda generator: (generator, lambda held: held),
    "dictionary": lambda generator: ({"a": [generator]}, lambda held: held["a"][0]),
    "object": lambda generator: (Holder(generator), lambda held: held.generator),
    "slot": lambda generator: (Slotted(generator), lambda held: held.generator),
    "method": lambda generator: (Holder(generator).get, lambda held: held()),
    "function": lambda generator: (enclosed(generator), lambda held: held()),
    "partial": lambda generator: (functools.partial(lambda g: g, generator), lambda held: held()),
}


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: Subset(rows, range(20))], ids=["whole", "part"])
@pytest.mark.parametrize("hold", HOLDERS)
@pytest.mark.parametrize("kind", GENERATORS)
def test_training_is_handed_the_same_rows_by_a_generator_of_the_datasets_own(kind, hold, wrap):
    def batches_of(drawn):
        dataset = wrap(Changing(kind, HOLDERS[hold]))
        if drawn:
            take(loader(dataset), 7)
        return [batch["input_ids"].tolist() for batch in loader(dataset)]

    assert batches_of(drawn=True) == batches_of(drawn=False)


def test_and_by_one_of_the_collators():
    def batches_of(drawn):
        generator = random.Random(0)

        def collate(rows):
            return pad(generator.sample(rows, 1) * len(rows))

        dataloader = loader(collate=collate)
        if drawn:
            take(dataloader, 7)
        return [batch["input_ids"].tolist() for batch in dataloader]

    assert batches_of(drawn=True) == batches_of(drawn=False)


def test_what_has_no_state_is_passed_by():
    """The system's randomness, what is gone, and a mapping that would read a file for each of its values."""

    class Lazy(Mapping):
        def __len__(self):
            return 1

        def __iter__(self):
            return iter("a")

        def __getitem__(self, name):
            raise AssertionError("it was read")

    rows = Changing("random", HOLDERS["attribute"])
    gone = Holder(None)
    rows.others = [random.SystemRandom(), weakref.proxy(gone), weakref.ref(gone), Lazy()]
    del gone
    before = rows.held.getstate()
    assert take(loader(rows), 3).n_samples == 3 and rows.held.getstate() == before


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


def test_generators_are_left_where_they_were_by_an_error_too():
    dataset = Changing("random", HOLDERS["attribute"])
    before = dataset.held.getstate()
    with pytest.raises(LoraDAError):
        take(loader(dataset, collate=lambda rows: {"labels": None}), 3)
    assert dataset.held.getstate() == before


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
