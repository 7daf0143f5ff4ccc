"""Initialisations of many layers and many tokens, and the memory that the process holds meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from models import Document, documents, pad, tiny_llama, with_lora
from peft import PeftModel
from settings import as_solved
from torch.utils.data import DataLoader

from lora_da import initialize_lora_da_weights
from lora_da.collect.borders import Border
from lora_da.collect.plan import Plan, Planner, in_segments, make_plan
from lora_da.report import InitReport


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
    config = as_solved(samples=samples, population_size=samples)
    return initialize_lora_da_weights(model, data, config, show_progress=False, plan=plan)


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
