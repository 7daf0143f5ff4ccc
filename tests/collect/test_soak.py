"""Many initialisations in one process, and many tokens in one: what is used is given back.

Resident memory is what counts. It moves by what allocators keep for themselves, a few MiB; each bound says what a leak
would come to.
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from models import batches, documents, pad
from processes import launch
from soaking import initialize, long_documents, resident, wide
from torch.utils.data import DataLoader

from lora_da.collect.plan import in_segments

pytestmark = [pytest.mark.once, pytest.mark.slow]

MIB = 2**20
ALLOCATORS = 24 * MIB  # what they may keep more, late in the work than early in it


@pytest.mark.parametrize("cuts", [1, 2], ids=["one pass", "streamed"])
def test_two_hundred_initialisations(cuts: int) -> None:
    """A leak of one layer's sums alone would be 75 MiB, one of a Python object 150 objects."""
    model = wide(2, 256, target_modules=["q_proj", "down_proj"])
    data = batches(documents(8), 4)
    starts = [p for name, p in model.named_parameters() if "lora_B" in name]
    seen = {}
    for number in range(1, 201):
        with torch.no_grad():
            for parameter in starts:
                parameter.zero_()
        assert initialize(model, data, 8, in_segments(cuts)).initialized == 4
        if number in (50, 200):
            gc.collect()
            seen[number] = resident(), len(gc.get_objects())
    assert seen[200][0] - seen[50][0] <= ALLOCATORS
    assert seen[200][1] - seen[50][1] < 100


def test_a_million_tokens() -> None:
    """In five hundred batches; the activations of each, were they kept, would be gigabytes by the end."""
    rows, length = 2000, 512
    model = wide(1, 32)
    seen: list[int] = []
    model.get_base_model().get_input_embeddings().register_forward_hook(lambda *_: seen.append(resident()))
    report = initialize(model, DataLoader(long_documents(rows, length), collate_fn=pad), rows)
    assert report.tokens == rows * length and report.initialized == 7
    assert len(seen) >= 500
    assert max(seen[50:]) - seen[50] <= ALLOCATORS


def test_borders_take_the_memory_that_was_forecast(tmp_path: Path) -> None:
    """In a process of its own, in which the C library gives back at once what is larger than a few pages."""
    environment = {f"MALLOC_{name}_": "0" for name in ("TOP_PAD", "TRIM_THRESHOLD")}  # whatever is set outside
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    run = launch(1, "soaking.growth", tmp_path, **environment)
    assert run.code == 0, run.output
    for grown, borders, beside in run.results[0].values():
        assert borders - ALLOCATORS <= grown <= borders + beside + ALLOCATORS
