"""How often the host waits for a GPU: for layers in the solver, for no batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_cuda import fake_gpus
from fake_gpu import FakeGpus
from models import documents, tiny_llama, with_lora
from on_gpus import SAMPLES, initialised
from planning import WAYS

from lora_da.first_step import MOST_TRIALS
from lora_da.statistics import LayerSums


def waits(gpus: FakeGpus, *rooms: str) -> int:
    """How often the host has waited in these parts of the core; anywhere in it if none are named."""
    parts = tuple(f"lora_da/{room}" for room in rooms) or ("lora_da/",)
    return sum(n for wait, n in gpus.waits.items() if wait.ours and wait.line.startswith(parts))


def waited(blocks: int = 2, samples: int = SAMPLES, **settings: Any) -> FakeGpus:
    """What an initialisation has waited for, the model's way to the GPU left out."""
    model = with_lora(tiny_llama(num_hidden_layers=blocks))
    with fake_gpus() as gpus:
        model.to("cuda")
        gpus.waits.clear()
        initialised(model, samples=samples, **{"first_step": "gamma", "rows": documents(80), **settings})
    return gpus


WAITS_OF_A_LAYER = 60  # the solver's, with those of its checks and of the write; tiny layers are solved densely
# What runs batches; the solver waits as often as it iterates.
PASS = ("collect", "tasks", "model", "statistics", "products")
WAITS_OF_A_TRIAL = 2  # of the first step, for each layer, whose two factors are sent
WAITS_OF_A_RUN = 20  # the survey's, the loss's and the watch's


@pytest.mark.parametrize("way", ["one pass", "2 segments", "3 passes"])
def test_no_batch_waits(way: str) -> None:
    """Batches run without the host waiting for the GPU: the passes wait as often for many as for few."""
    few, many = (waited(samples=n, way=WAYS[way]) for n in (8, 40))
    assert waits(few, *PASS) == waits(many, *PASS)
    assert waits(many, "collect", "tasks", "model/blocks") <= WAITS_OF_A_RUN


def test_layers_wait_in_the_solver_alone() -> None:
    two, four = waited(2), waited(4)
    assert waits(four, "collect", "tasks") == waits(two, "collect", "tasks")
    assert waits(four) - waits(two) <= 2 * 7 * WAITS_OF_A_LAYER


def test_batches_of_the_first_step_do_not_wait() -> None:
    measured, without = waited(first_step="measured"), waited()
    trials = MOST_TRIALS + 1  # 0 among them; then the parameters are put back
    assert waits(measured) - waits(without) <= trials * (14 * WAITS_OF_A_TRIAL + 1) + 14 * WAITS_OF_A_TRIAL


def test_a_number_asked_of_every_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    add = LayerSums.add

    def asking(sums: LayerSums, x: torch.Tensor, d: torch.Tensor) -> None:
        assert d.abs().max().item() < 1e9
        add(sums, x, d)

    monkeypatch.setattr(LayerSums, "add", asking)
    few, many = (waited(samples=n) for n in (8, 40))
    asked = [sum(n for wait, n in gpus.waits.items() if "gpus/test_waits" in wait.line) for gpus in (few, many)]
    assert asked[1] - asked[0] == 14 * 8  # 14 layers, and 8 batches more
