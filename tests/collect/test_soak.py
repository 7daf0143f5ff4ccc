"""Many initialisations in one process, and many tokens in one: what is used is given back.

Resident memory is what counts. It moves by what allocators keep for themselves, a few MiB; each bound says what a leak
would come to.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from models import Document, batches, documents, pad, tiny_llama, with_lora
from peft import PeftModel
from processes import launch
from torch.utils.data import DataLoader

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.collect.borders import Border
from lora_da.collect.plan import Plan, Planner, in_segments, make_plan
from lora_da.report import InitReport

pytestmark = [pytest.mark.once, pytest.mark.slow]

MIB = 2**20
ALLOCATORS = 24 * MIB  # what they may keep more, late in the work than early in it


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


def initialize(model: PeftModel, data: Any, samples: int, plan: Planner = make_plan) -> InitReport:
    config = LoraDAConfig(samples=samples, population_size=samples)
    return initialize_lora_da_weights(model, data, config, show_progress=False, plan=plan)


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


def growth(folder: Path) -> dict[int, tuple[int, int, int]]:
    """By number of segments, of 100,000 tokens in a stream: bytes that the process really grows by, and the forecasts
    for the borders and beside them."""
    rows, length = 200, 512
    found = {}
    for cuts in (2, 4):
        seen: list[int] = []
        plans: list[Plan] = []

        def put(
            border: Border, number: int, tensor: torch.Tensor, original: Any = Border.put, seen: Any = seen
        ) -> None:
            original(border, number, tensor)
            seen.append(resident())

        def planned(*args: Any, cuts: int = cuts, plans: Any = plans) -> Plan:
            plans.append(in_segments(cuts)(*args))
            return plans[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Border, "put", put)
            # what the first run of all brings into the process, libraries' own buffers, is no matter of plans
            for count in (8, rows):
                seen.clear()
                model = wide(4, 128, target_modules=["q_proj"])
                loader = DataLoader(long_documents(count, length), collate_fn=pad)
                report = initialize(model, loader, count, planned)
        assert report.tokens == rows * length and report.initialized == 4
        assert plans[-1].cpu_bytes >= (cuts - 1) * rows * length * 128 * 4  # hidden states alone, without a gradient
        found[cuts] = max(seen) - seen[0], plans[-1].cpu_bytes, plans[-1].device_bytes
    return found


def test_borders_take_the_memory_that_was_forecast(tmp_path: Path) -> None:
    """In a process of its own, in which the C library gives back at once what is larger than a few pages."""
    environment = {f"MALLOC_{name}_": "0" for name in ("TOP_PAD", "TRIM_THRESHOLD")}  # whatever is set outside
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    run = launch(1, "test_soak.growth", tmp_path, **environment)
    assert run.code == 0, run.output
    for grown, borders, beside in run.results[0].values():
        assert borders - ALLOCATORS <= grown <= borders + beside + ALLOCATORS
