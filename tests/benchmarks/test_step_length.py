"""The ladder is in lengths of the whole step, and every layer has the share that it is said to have."""

from __future__ import annotations

import math

import pytest
import torch
from models import documents, few_tokens, pad, tiny_llama, with_lora
from torch.utils.data import DataLoader

pytest.importorskip("trl", reason="TRL is not installed")

from benchmarks.step_length import AS_SOLVED, ONE_FISHER_LENGTH, STARTS, ladder, lengths, markdown
from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.adapter import find_adapter

pytestmark = pytest.mark.once

DATA = DataLoader(few_tokens(documents(8)), 4, collate_fn=pad)


def norms(model) -> list[float]:
    return [
        layer.scaling * torch.linalg.matrix_norm((layer.lora_B @ layer.lora_A).detach(), 2).item()
        for layer in find_adapter(model).layers
    ]


@pytest.mark.parametrize("shares", [AS_SOLVED, ONE_FISHER_LENGTH])
def test_each_rung_is_of_its_length(shares: str) -> None:
    model, seen = with_lora(tiny_llama()), []
    config = LoraDAConfig(first_step="gamma", samples=8)
    report = initialize_lora_da_weights(model, DATA, config, show_progress=False)
    solved = norms(model)

    def loss() -> float:
        found = norms(model)
        if shares == AS_SOLVED:
            assert [f / s for f, s in zip(found, solved, strict=True)] == pytest.approx([found[0] / solved[0]] * 14)
        seen.append(math.sqrt(sum(norm**2 for norm in found) / len(found)))
        return seen[-1]

    found = ladder(model, report, shares, loss)
    assert seen == pytest.approx(list(lengths()), rel=1e-5)
    assert [length for length, _ in found["losses"]] == list(lengths())
    if shares == AS_SOLVED:
        assert found["solved"] == pytest.approx(math.sqrt(sum(norm**2 for norm in solved) / 14), rel=1e-5)


def test_the_table_marks_the_lowest_loss() -> None:
    losses = [(length, 2.0 + abs(math.log2(length) + 3)) for length in lengths()]
    result = {
        "task": "a task",
        "base_loss": 3.0,
        "starts": {name: {"solved": 0.1, "losses": losses} for name in STARTS},
        "command": "python",
        "date": "today",
        "hardware": {"cpu": "a CPU", "threads": 1},
    }
    written = markdown(result)
    assert written.count("**2.000**") == len(STARTS) and "held-out loss along a start's direction" in written
