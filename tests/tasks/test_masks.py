"""A mask that masks nothing is dropped where it is read, on the CPU, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from collecting import worst
from fake_cuda import fake_gpus
from models import batches, documents, tiny_gpt2, tiny_llama, tiny_opt, with_lora
from planning import WAYS, collected_by
from settings import as_solved
from tolerances import REORDERED

from lora_da import initialize_lora_da_weights
from lora_da.samples.draw import read_causal
from lora_da.tasks.inputs import model_inputs

pytestmark = pytest.mark.once

CPU = torch.device("cpu")
WHOLE = batches(documents([12] * 6), 3)  # without padding
COLUMNS = torch.arange(12).expand(3, -1)


def given(**inputs: Any) -> set[str]:
    """What the model is handed of a batch."""
    return set(model_inputs(tiny_llama(), read_causal({**WHOLE[0], **inputs}, 100), CPU))


def test_a_mask_of_ones_is_dropped_where_nothing_else_is_read_into_its_absence() -> None:
    padded = torch.ones(3, 12, dtype=torch.long)
    padded[0, -1] = 0
    jumps = COLUMNS + 5 * (COLUMNS > 6)
    assert given() == given(position_ids=COLUMNS) - {"position_ids"} == {"input_ids"}
    assert given(position_ids=COLUMNS + 3) == {"input_ids", "position_ids"}
    assert "attention_mask" in given(attention_mask=padded)
    assert "attention_mask" in given(position_ids=jumps)


def without_mask(rows: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [{name: value for name, value in batch.items() if name != "attention_mask"} for batch in rows]


@pytest.mark.parametrize("way", ["one pass", "2 segments"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_opt])
def test_it_changes_nothing(make: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a run in which the mask goes to the model, and one of batches that have none."""
    ours = collected_by(with_lora(make(num_hidden_layers=4) if make is tiny_llama else make()), WHOLE, WAYS["one pass"])
    monkeypatch.setattr("lora_da.tasks.inputs._masks_nothing", lambda batch: False)
    for rows in (WHOLE, without_mask(WHOLE)):
        model = with_lora(make(num_hidden_layers=4) if make is tiny_llama else make())
        assert worst(collected_by(model, rows, WAYS[way]), ours) <= REORDERED


def waits_of_a_batch() -> float:
    """How often a library waits for the GPU in each batch of an initialisation."""
    found = []
    for samples in (8, 32):
        with fake_gpus() as gpus:
            model = with_lora(tiny_llama()).to("cuda")
            gpus.waits.clear()
            rows = batches(documents([12] * 40), 2)
            initialize_lora_da_weights(model, rows, as_solved(samples=samples), show_progress=False)
        found.append(sum(n for wait, n in gpus.waits.items() if not wait.ours))
    return (found[1] - found[0]) / 12


def test_a_library_asks_no_more_than_with_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks a mask whether all of it is one, and without one positions whether they start anew."""
    without = waits_of_a_batch()
    monkeypatch.setattr("lora_da.tasks.inputs._masks_nothing", lambda batch: False)
    assert without <= waits_of_a_batch() <= 1
