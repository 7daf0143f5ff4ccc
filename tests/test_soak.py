"""Many initialisations in one process, and many tokens in one: what is used is given back.

Resident memory is what counts. It moves by what allocators keep for themselves, a few MiB; each bound says what a leak
would come to.
"""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import psutil
import pytest
import torch
from models import Document, batches, documents, pad, tiny_llama, with_lora
from peft import PeftModel
from torch.utils.data import DataLoader

import lora_da.initialize
from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.borders import Border
from lora_da.plan import make_plan
from lora_da.report import InitReport

pytestmark = [pytest.mark.once, pytest.mark.slow]

MIB = 2**20
ALLOCATORS = 24 * MIB  # what they may keep more, late in the work than early in it
# Hidden states are kept between activations that go; the C library gives such gaps back late. Plans leave half free.
GAPS = 1.5


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def wide(blocks: int, width: int, **lora: Any) -> PeftModel:
    """`blocks` blocks of one attention head; at 256, one layer's sums are 0.5 MiB."""
    return with_lora(
        tiny_llama(
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=1024,
        ),
        **lora,
    )


def long_documents(count: int, length: int) -> list[Document]:
    return documents(count, shortest=length, longest=length)


def initialize(model: PeftModel, data: Any, samples: int) -> InitReport:
    config = LoraDAConfig(samples=samples, population_size=samples)
    return initialize_lora_da_weights(model, data, config, show_progress=False)


@pytest.mark.parametrize("cuts", [1, 2], ids=["one pass", "streamed"])
def test_two_hundred_initialisations(cuts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leak of one layer's sums alone would be 75 MiB, one of a Python object 150 objects."""
    monkeypatch.setattr(lora_da.initialize, "make_plan", partial(make_plan, n_segments=cuts))
    model = wide(2, 256, target_modules=["q_proj", "down_proj"])
    data = batches(documents(8), 4)
    starts = [p for name, p in model.named_parameters() if "lora_B" in name]
    seen = {}
    for number in range(1, 201):
        with torch.no_grad():
            for parameter in starts:
                parameter.zero_()
        assert initialize(model, data, 8).initialized == 4
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


@pytest.mark.parametrize("cuts", [2, 4])
def test_borders_take_the_memory_that_was_forecast(cuts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100,000 tokens in a stream: what the process really grows by, activations of one batch included."""
    rows, length = 200, 512
    seen: list[int] = []
    original = Border.put

    def put(border: Border, number: int, tensor: torch.Tensor) -> None:
        original(border, number, tensor)
        seen.append(resident())

    monkeypatch.setattr(Border, "put", put)
    plans = []

    def planned(*args: Any, **named: Any) -> Any:
        plans.append(make_plan(*args, n_segments=cuts, **named))
        return plans[-1]

    monkeypatch.setattr(lora_da.initialize, "make_plan", planned)
    model = wide(4, 128, target_modules=["q_proj"])
    # what the first run of all brings into the process, libraries' own buffers, is no matter of plans
    initialize(wide(4, 128, target_modules=["q_proj"]), DataLoader(long_documents(8, length), collate_fn=pad), 8)
    plans.clear()
    seen.clear()
    report = initialize(model, DataLoader(long_documents(rows, length), collate_fn=pad), rows)
    assert report.tokens == rows * length and report.initialized == 4
    grown, borders, beside = max(seen) - seen[0], plans[0].cpu_bytes, plans[0].device_bytes
    assert borders >= (cuts - 1) * rows * length * 128 * 4  # hidden states alone, without a gradient
    assert borders - ALLOCATORS <= grown <= GAPS * (borders + beside) + ALLOCATORS
