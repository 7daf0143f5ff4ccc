"""Statistics as the product takes them, and how far they are from others."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping

import torch
from models import PREFIX
from peft import PeftModel
from torch import Tensor, nn

from lora_da.adapter import find_adapter
from lora_da.collect import Planner, collect, make_plan
from lora_da.collect.collector import Collector
from lora_da.collect.selection import Selection
from lora_da.collect.sums import SegmentSums
from lora_da.model.state import estimation_mode
from lora_da.model.streams import Streams
from lora_da.needs import Needs, Sums
from lora_da.processes import Processes, Run
from lora_da.samples.draw import Size, draw
from lora_da.statistics import LayerStatistics
from lora_da.tasks import RewardLoss, find_task
from lora_da.tasks.head import LossPass

PLENTY = 64.0  # GiB of a budget in which every tiny model is one pass
# Each batch's loss as it is, and nobody listens.
PLAIN_PASS = LossPass(1.0, None, contextlib.nullcontext, lambda n, weights: contextlib.nullcontext())


def needs(averaging: str = "tokens", full: bool = True) -> Needs:
    """All sums, the output Fisher in full or as its diagonal."""
    return Needs(Sums(), lambda i, o: 0, full_fisher_up_to=math.inf if full else 0, averaging=averaging)


def watching(layers: Mapping[str, nn.Module], full: bool = False) -> Collector:
    """A collector of layers that all read the same tokens."""
    sums = SegmentSums(layers, needs(full=full))
    return Collector(layers, sums, Selection(layers, Streams(), {}), contextlib.nullcontext)


def collected(
    model: PeftModel,
    batches: list[dict[str, Tensor]],
    averaging: str = "tokens",
    full: bool = True,
    plan: Planner = make_plan,
    reward: RewardLoss | None = None,
) -> dict[str, LayerStatistics]:
    """The product's statistics of every layer, in the plan that it makes, under the base model's names."""
    layers, task = find_adapter(model).layers, find_task(model.get_base_model(), reward)
    run = Run(Processes(), torch.device("cpu"), PLENTY, False)
    with estimation_mode(model):
        data = draw(batches, Size(1000), None, 1000, task.read, True)
        found = collect(task, layers, data, needs(averaging, full), run, lambda layer, seen: seen.statistics, plan)
    assert len(found.layers.outcomes) == len(layers)
    assert all(isinstance(outcome, LayerStatistics) for outcome in found.layers.outcomes.values())
    return {name.removeprefix(PREFIX): statistics for name, statistics in found.layers.outcomes.items()}


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
