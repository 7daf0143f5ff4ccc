"""Ways to run the samples, forced whatever the memory there is, and the statistics that each of them gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from models import PREFIX
from peft import PeftModel
from tqdm import tqdm

import lora_da.initialize
from lora_da.adapter import AdapterLayer, find_adapter
from lora_da.collect.collector import Collector
from lora_da.collect.plan import Plan, Segment, cut, make_plan
from lora_da.collect.schedule import Sweep
from lora_da.collect.survey import Survey, survey
from lora_da.config import LoraDAConfig
from lora_da.model.state import estimation_mode
from lora_da.samples.draw import draw
from lora_da.statistics import LayerStatistics
from lora_da.tasks import find_task

CPU = torch.device("cpu")
PLENTY = 64.0  # GiB of a budget in which every tiny model is one pass


@dataclass(frozen=True)
class Way:
    """How a plan runs the samples: in `cuts` segments, each `parts` times for a part of its layers.

    Without a `row` the model counts as one that cannot be cut, and keeps its own checkpointing.
    """

    cuts: int = 1
    parts: int = 1
    row: bool = True

    def survey(self, surveyed: Survey) -> Survey:
        return surveyed if self.row else replace(surveyed, row=None, why_not="the test says so")

    def plan(self, plan: Plan, surveyed: Survey, layers: Sequence[AdapterLayer]) -> Plan:
        """The same forecast with this way's segments; of a model that cannot be cut, one segment in as many parts."""
        cuts = self.cuts if surveyed.row is not None else 1
        whole = cut(surveyed, layers, cuts)
        parts = self.parts if cuts == self.cuts else self.cuts * self.parts
        segments = [part for segment in whole for part in in_parts(segment, parts)]
        return replace(plan, segments=tuple(segments), why_not_streamed=surveyed.why_not)


ONE = Way()
WAYS = {
    "one pass": ONE,
    "2 segments": Way(cuts=2),
    "3 segments": Way(cuts=3),
    "a segment for each block": Way(cuts=4),
    "2 segments in 3 parts": Way(cuts=2, parts=3),
    "3 passes": Way(parts=3, row=False),
}


def in_parts(segment: Segment, parts: int) -> list[Segment]:
    """A segment's layers dealt out in runs of like number; one that has none stays as it is."""
    size = max(1, -(-len(segment.layers) // parts))
    return [replace(segment, layers=segment.layers[k : k + size]) for k in range(0, max(1, len(segment.layers)), size)]


@contextlib.contextmanager
def forced(way: Way) -> Iterator[list[Plan]]:
    """`initialize_lora_da_weights` runs the samples this way; yields the plans that were made, as they are made."""
    plans: list[Plan] = []

    def planned(surveyed: Survey, layers: Sequence[AdapterLayer], *rest: Any, **named: Any) -> Plan:
        plans.append(way.plan(make_plan(surveyed, layers, *rest, **named), surveyed, layers))
        return plans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_da.initialize, "make_plan", planned)
        patch.setattr(lora_da.initialize, "survey", lambda *args: way.survey(survey(*args)))
        yield plans


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, LayerStatistics]]:
    """The statistics that reach the solver, under the base model's names; of a layer's attempts the last."""
    seen: dict[str, LayerStatistics] = {}
    original = Collector.statistics

    def statistics(self: Collector, name: str, n_units: int) -> LayerStatistics | None:
        found = original(self, name, n_units)
        if found is not None:
            copied = (None if t is None else t.clone() for t in (found.grad, found.input_cov, found.output_fisher))
            seen[name.removeprefix(PREFIX)] = LayerStatistics(*copied, found.n_tokens)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collector, "statistics", statistics)
        yield seen


def surveyed_model(model: PeftModel, batches: list[dict[str, Any]]) -> Survey:
    """What the product finds out about a model before it plans."""
    task = find_task(model.get_base_model())
    with estimation_mode(model):
        data = draw(batches, 1000, None, 1000, task.read)
        return survey(task, find_adapter(model).layers, task.inputs(data.batches[-1].glimpse(), CPU))


def collected_by(
    model: PeftModel, batches: list[dict[str, Any]], way: Way = ONE, averaging: str = "tokens", full: bool = True
) -> dict[str, LayerStatistics]:
    """The product's statistics of every layer under a forced plan, under the base model's names."""
    layers, task = find_adapter(model).layers, find_task(model.get_base_model())
    full_fisher = frozenset(layer.name for layer in layers if full)
    preset = LoraDAConfig(averaging=averaging).resolved_preset()
    found: dict[str, LayerStatistics] = {}
    with estimation_mode(model):
        data = draw(batches, 1000, None, 1000, task.read)
        units = data.n_loss_tokens if averaging == "tokens" else data.n_samples
        seen = survey(task, layers, task.inputs(data.batches[-1].glimpse(), CPU))
        assert seen.row is not None or way.cuts == 1, seen.why_not
        seen = way.survey(seen)
        plan = way.plan(make_plan(seen, layers, full_fisher, data.batches, CPU, PLENTY), seen, layers)
        assert plan.passes == way.parts
        assert plan.cuts == way.cuts or min(seen.block_of.values()) > 0  # segments below are left out
        sweep = Sweep(task, data, plan, seen, preset, full_fisher, CPU)
        for served, collector in sweep.collected(tqdm(disable=True)):
            for layer in served:
                statistics = collector.statistics(layer.name, units)
                assert statistics is not None and layer.name not in found
                found[layer.name.removeprefix(PREFIX)] = statistics
    assert len(found) == len(layers)
    return found
