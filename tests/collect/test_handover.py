"""The order in which layers are handed over, and what is still held of those that were."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from collecting import PLENTY, needs
from models import batches, documents, tiny_llama, with_lora

from lora_da.adapter import AdapterLayer, find_adapter
from lora_da.collect import Observed, collect
from lora_da.collect.sums import SegmentSums
from lora_da.model.state import estimation_mode
from lora_da.processes import Processes, Run
from lora_da.samples.draw import Size, draw
from lora_da.tasks import find_task

pytestmark = pytest.mark.once


def handed_over() -> tuple[list[int], dict[str, list[str]]]:
    """Widths of the inputs in order, and the layers whose Z was alive when each layer's turn came."""
    model = with_lora(tiny_llama(num_hidden_layers=2))
    task, run = find_task(model.get_base_model(), None), Run(Processes(), torch.device("cpu"), PLENTY, False)
    widths: list[int] = []
    seen: dict[str, weakref.ref[Any]] = {}
    alive: dict[str, list[str]] = {}

    def look(layer: AdapterLayer, observed: Observed) -> int:
        gc.collect()
        alive[layer.name] = [n for n, ref in seen.items() if ref() is not None and n != observed.reads_like]
        seen[observed.reads_like] = weakref.ref(observed.statistics.input_cov)
        widths.append(layer.in_features)
        return 0

    with estimation_mode(model):
        data = draw(batches(documents(8), 4), Size(8), None, 8, task.read, True)
        collect(task, find_adapter(model).layers, data, needs(full=False), run, look)
    return widths, alive


def test_the_widest_input_comes_last_and_each_is_freed_after_its_last_reader() -> None:
    widths, alive = handed_over()
    assert len(widths) == 14 and widths == sorted(widths) and len(set(widths)) == 2
    assert not any(alive.values())


def test_one_that_is_kept_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SegmentSums, "free_input", lambda self, name: None)
    assert any(handed_over()[1].values())
