"""Memory decides how the model is run, never what comes out, and what was used is gone before the next segment."""

import copy
import gc
import weakref

import pytest
import torch
from models import batches, documents, pad, tiny_llama, with_lora
from torch.utils.data import DataLoader

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.collect.borders import Border
from lora_da.collect.collector import Collector
from lora_da.collect.forecast import Segment
from lora_da.collect.plan import in_segments
from lora_da.collect.schedule import Schedule
from lora_da.memory import GIB, PeakMemory

RUN_AGAIN = 1e-5  # float32 sums of the same tokens in the same order, of a model that is run again


def initialised(**settings) -> tuple[dict[str, torch.Tensor], str]:
    model = with_lora(tiny_llama())
    config = LoraDAConfig(samples=8, **settings)
    report = initialize_lora_da_weights(model, batches(documents(8), 4), config, show_progress=False)
    return {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}, report.plan


def test_a_smaller_budget_gives_what_one_pass_gives() -> None:
    one, plan = initialised()
    assert plan.startswith("one pass")
    seen = set()
    for budget in (1e-3, 5e-4, 1e-4, 1 / GIB):
        many, plan = initialised(memory_budget=budget)
        seen.add(plan.split(",")[0])
        for key, value in one.items():
            assert torch.linalg.norm(many[key] - value) <= RUN_AGAIN * torch.linalg.norm(value), (plan, key)
    assert "streamed: 2 segments of 1 layer" in seen


def test_the_sums_of_a_segment_are_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref] = []
    original = Schedule._collector

    def spy(schedule: Schedule, segment: Segment) -> Collector:
        gc.collect()
        assert [ref for ref in seen if ref() is not None] == []
        collector = original(schedule, segment)
        seen.extend(map(weakref.ref, (collector, collector.sums)))
        return collector

    monkeypatch.setattr(Schedule, "_collector", spy)
    _, plan = initialised(memory_budget=1 / GIB)
    assert "each run 7 times" in plan and len(seen) == 2 * 14


@pytest.mark.parametrize(("cuts", "room"), [(1, 9), (2, 9), (3, 9), (6, 9), (2, 1), (6, 2), (6, 3), (6, 4)])
def test_hidden_states_on_the_cpu_take_what_was_forecast(cuts: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 10 %: at every moment what all borders hold, batch by batch, with room for so many borders."""
    monkeypatch.setattr("lora_da.samples.draw.BATCH_TOKENS", 16)
    borders: weakref.WeakSet[Border] = weakref.WeakSet()
    held = []
    original = Border.put

    def put(border, number, tensor):
        original(border, number, tensor)
        borders.add(border)
        held.append(sum(b.nbytes for b in borders))

    monkeypatch.setattr(Border, "put", put)
    model, loader = with_lora(tiny_llama(num_hidden_layers=6)), DataLoader(documents(8), collate_fn=pad)
    config, plan = LoraDAConfig(samples=8), in_segments(cuts)
    in_two = initialize_lora_da_weights(copy.deepcopy(model), loader, config, show_progress=False, plan=in_segments(2))
    at_a_border = in_two.forecast["cpu"] // 2
    held.clear()
    # a quarter of what is free is for the borders where the sums are on the CPU too
    monkeypatch.setattr("lora_da.processes.free_bytes", lambda device: int(4 * (room + 0.5) * at_a_border))
    report = initialize_lora_da_weights(model, loader, config, show_progress=False, plan=plan)
    assert max(held, default=0) == pytest.approx(report.forecast["cpu"], rel=0.1)
    assert round(max(held, default=0) / at_a_border) == (min(cuts, room) if cuts > 1 else 0)


def test_peak_memory_is_not_below_what_is_held() -> None:
    memory = PeakMemory(torch.device("cpu"))
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert memory.gib() >= held.numel() / GIB and memory.name == "process"


def tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def test_no_tensor_is_left_behind() -> None:
    """Not in a graph either that was never run backward, which the garbage collector does not see as garbage."""
    model, data = with_lora(tiny_llama()), batches(documents(8), 4)
    initialize_lora_da_weights(model, data, LoraDAConfig(samples=8), show_progress=False)
    before = tensors()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    initialize_lora_da_weights(model, data, LoraDAConfig(samples=8), show_progress=False)
    assert tensors() == before
