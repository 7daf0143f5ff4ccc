"""Adapters started on GPUs that are not there, and on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from collecting import distance
from fake_cuda import fake_gpus
from models import adapter_weights, batches, documents, tiny_llama, with_lora
from peft import PeftModel
from planning import ONE, Forced, Way

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.report import InitReport

GPU = "cuda:0"
BLOCKS, SAMPLES, ROWS_IN_A_BATCH = 4, 12, 4
ROWS = documents(40)  # more than the samples: the first step is measured on others

Made = tuple[dict[str, torch.Tensor], InitReport]


def dense(dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    return with_lora(tiny_llama(num_hidden_layers=BLOCKS, **config).to(dtype))


def initialised(model: PeftModel, way: Way | None = ONE, rows: Any = ROWS, **settings: Any) -> Made:
    """The adapter that it is given, copied to the CPU, and the report; where no way is forced, the product plans."""
    population = 1000 if settings.get("method", "lora_da") == "lora_da" else None
    config = LoraDAConfig(**{"samples": SAMPLES, "population_size": population, **settings})
    plan = {} if way is None else {"plan": Forced(way)}
    report = initialize_lora_da_weights(model, batches(rows, ROWS_IN_A_BATCH), config, show_progress=False, **plan)
    return {name: value.cpu() for name, value in adapter_weights(model).items()}, report


def check_same(ours: Made, cpus: Made, tolerance: float = 0.0) -> None:
    assert ours[0].keys() == cpus[0].keys()
    for name, value in cpus[0].items():
        off = 0.0 if torch.equal(ours[0][name], value) else distance(ours[0][name], value)
        assert off <= tolerance, name
    assert ours[1].loss == pytest.approx(cpus[1].loss, rel=tolerance, abs=0)
    assert ours[1].initialized == cpus[1].initialized == ours[1].targeted


def check_on_a_gpu(make: Callable[[], PeftModel], tolerance: float = 0.0, **settings: Any) -> None:
    """The CPU's adapter, from a model on a GPU, of whose memory nothing stays taken."""
    expected = initialised(make(), **settings)
    with fake_gpus() as gpus:
        model = make().to("cuda")
        held = gpus.live.total()
        ours = initialised(model, **settings)
        assert gpus.live.total() == held
    check_same(ours, expected, tolerance)
    assert ours[1].memory_of == "GPU" and 0 < ours[1].peak_memory_gib == gpus.peak.total() / 2**30
