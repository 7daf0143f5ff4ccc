"""The order in which training reads its rows, and what it draws from, are as if nothing had been drawn."""

from __future__ import annotations

import functools
import random
import weakref
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from drawing import DOCUMENTS, loader, take
from models import pad, tiny_llama, with_lora
from picture import differences, random_picture
from torch.utils.data import Dataset, RandomSampler, Subset

from lora_da import LoraDAError
from lora_da.model.state import estimation_mode


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


def test_generators_are_left_where_they_were_by_an_error_too():
    dataset = Changing("random", HOLDERS["attribute"])
    before = dataset.held.getstate()
    with pytest.raises(LoraDAError):
        take(loader(dataset, collate=lambda rows: {"labels": None}), 3)
    assert dataset.held.getstate() == before
