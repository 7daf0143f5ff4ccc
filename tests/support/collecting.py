"""Statistics as the product takes them, and how far they are from others."""

from __future__ import annotations

import torch
from models import PREFIX
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm

from lora_da.adapter import find_adapter
from lora_da.collect.plan import make_plan
from lora_da.collect.schedule import Sweep
from lora_da.collect.survey import survey
from lora_da.config import LoraDAConfig
from lora_da.model.state import estimation_mode
from lora_da.samples.draw import draw
from lora_da.statistics import LayerStatistics
from lora_da.tasks import find_task


def collected(
    model: PeftModel, batches: list[dict[str, Tensor]], averaging: str = "tokens", full: bool = True
) -> dict[str, LayerStatistics]:
    """The product's statistics of every layer, in the plan that it makes, under the base model's names."""
    adapter, task, device = find_adapter(model), find_task(model.get_base_model()), torch.device("cpu")
    full_fisher = frozenset(layer.name for layer in adapter.layers if full)
    preset = LoraDAConfig(averaging=averaging).resolved_preset()
    found = {}
    with estimation_mode(model), tqdm(disable=True) as progress:
        data = draw(batches, 1000, None, 1000, task.read)
        surveyed = survey(task, adapter.layers, task.inputs(data.batches[-1].glimpse(), device))
        plan = make_plan(surveyed, adapter.layers, full_fisher, data.batches, device, None)
        sweep = Sweep(task, data, plan, surveyed, preset, full_fisher, device)
        for layers, collector in sweep.collected(progress):
            units = data.n_loss_tokens if averaging == "tokens" else data.n_samples
            found |= {layer.name.removeprefix(PREFIX): collector.statistics(layer.name, units) for layer in layers}
    assert len(found) == len(adapter.layers) and all(s is not None for s in found.values())
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Relative, in float64."""
    return (torch.linalg.norm(a.double() - b.double()) / torch.linalg.norm(b.double())).item()


def worst(ours: dict[str, LayerStatistics], other: dict) -> float:
    """The largest relative distance of any G, Z or Y of any layer."""
    assert ours.keys() == other.keys()
    return max(
        distance(getattr(ours[n], f), getattr(other[n], f))
        for n in ours
        for f in ("grad", "input_cov", "output_fisher")
    )
