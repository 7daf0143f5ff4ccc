"""The share that a subspace of fewer samples captures, and the table that it goes into."""

from __future__ import annotations

import pytest
import torch
from models import documents, few_tokens, tiny_llama, with_lora

pytest.importorskip("trl", reason="TRL is not installed")

from benchmarks.sample_size import captured_by, markdown
from lora_da.adapter import find_adapter

pytestmark = pytest.mark.once

ROWS = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in few_tokens(documents(12))]


def test_a_whole_space_captures_all_and_none_nothing() -> None:
    model = with_lora(tiny_llama())
    whole = {layer.name: torch.eye(layer.in_features) for layer in find_adapter(model).layers}
    half = {name: basis[:, ::2] for name, basis in whole.items()}
    other = {name: basis[:, 1::2] for name, basis in whole.items()}
    none = {name: basis * 0 for name, basis in whole.items()}
    found = captured_by(model, ROWS, {0: none, 1: half, 2: other, 3: whole})
    assert set(found[3]) == set(whole)
    for name in whole:
        assert found[0][name] == 0 and found[3][name] == pytest.approx(1, rel=1e-5)
        assert 0 < found[1][name] < 1 and found[1][name] + found[2][name] == pytest.approx(1, rel=1e-5)


def test_the_table_says_what_a_start_costs_in_steps() -> None:
    start = {
        "samples": 8,
        "loss_tokens": 1234,
        "loss": 2.5,
        "seconds": 12.0,
        "captured": {"a": 0.25, "b": 0.75, "c": 0.5},
    }
    result = {
        "task": "a task",
        "base_loss": 3.0,
        "step_seconds": 2.0,
        "starts": [start],
        "command": "python",
        "date": "today",
        "hardware": {"cpu": "a CPU", "threads": 1},
    }
    assert "| 8 | 1,234 | 0.50 | 0.30 | 2.5000 | 12 | 6.0 |" in markdown(result)
