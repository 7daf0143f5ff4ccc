"""Ways to run the samples, forced whatever the memory there is, and the statistics that each of them gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from collecting import collected, needs
from models import PREFIX
from peft import PeftModel

from lora_da.adapter import AdapterLayer, find_adapter
from lora_da.collect.cuts import cut
from lora_da.collect.forecast import Segment
from lora_da.collect.plan import Plan, make_plan
from lora_da.collect.sums import SegmentSums
from lora_da.collect.survey import Survey, survey_model
from lora_da.model.state import estimation_mode
from lora_da.needs import Needs
from lora_da.processes import Run
from lora_da.samples import Batch
from lora_da.samples.draw import Size, draw
from lora_da.statistics import LayerStatistics
from lora_da.tasks import RewardLoss, find_task

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Way:
    """How a plan runs the samples: in `cuts` segments, each `parts` times for a part of its layers.

    Where it is not `cut` the model counts as one that cannot be, and keeps its own checkpointing. Where it is `again`,
    a block's activations are computed again in the backward; the CPU has room for so many `borders`, all if None.
    """

    cuts: int = 1
    parts: int = 1
    cut: bool = True
    again: bool = False
    borders: int | None = None

    def survey(self, surveyed: Survey) -> Survey:
        return surveyed if self.cut else surveyed.uncut("the test says so")

    def plan(self, plan: Plan, surveyed: Survey, layers: Sequence[AdapterLayer]) -> Plan:
        """The same forecast with this way's segments; of a model that cannot be cut, one segment in as many parts."""
        cuts = self.cuts if surveyed.sequence is not None else 1
        whole = cut(surveyed, layers, cuts)
        parts = self.parts if cuts == self.cuts else self.cuts * self.parts
        segments = [part for segment in whole for part in in_parts(segment, parts)]
        borders = plan.borders if self.borders is None else self.borders
        return replace(plan, segments=tuple(segments), checkpointed=self.again, borders=borders)


ONE = Way()
WAYS = {
    "one pass": ONE,
    "2 segments": Way(cuts=2),
    "3 segments": Way(cuts=3),
    "a segment for each block": Way(cuts=4),
    "2 segments in 3 parts": Way(cuts=2, parts=3),
    "3 passes": Way(parts=3, cut=False),
    "one pass, checkpointed": Way(again=True),
    "2 segments, checkpointed, no border held": Way(cuts=2, again=True, borders=1),
    "a segment for each block, one border held": Way(cuts=4, borders=3),
    "a segment for each block in 2 parts, no border held": Way(cuts=4, parts=2, borders=2),
}


def in_parts(segment: Segment, parts: int) -> list[Segment]:
    """A segment's layers dealt out in runs of like number; one that has none stays as it is."""
    size = max(1, -(-len(segment.layers) // parts))
    return [replace(segment, layers=segment.layers[k : k + size]) for k in range(0, max(1, len(segment.layers)), size)]


class Forced:
    """A planner that runs the samples one way, whatever the memory there is.

    Attributes:
        plans: that were made, in their order.
    """

    def __init__(self, way: Way) -> None:
        self.way = way
        self.plans: list[Plan] = []

    def __call__(
        self, surveyed: Survey, layers: Sequence[AdapterLayer], batches: Sequence[Batch], needs: Needs, run: Run
    ) -> Plan:
        surveyed = self.way.survey(surveyed)
        plan = make_plan(surveyed, layers, batches, needs, run)
        self.plans.append(self.way.plan(plan, surveyed, layers))
        return self.plans[-1]


class Replanned(Exception):
    """The samples were not run as they were to be."""


class Demanded(Forced):
    """`Forced`, for a model that can be run that way.

    Raises:
        Replanned: another plan is asked for.
    """

    def __call__(
        self, surveyed: Survey, layers: Sequence[AdapterLayer], batches: Sequence[Batch], needs: Needs, run: Run
    ) -> Plan:
        if self.plans:
            raise Replanned(surveyed.why_not)
        assert surveyed.sequence is not None or self.way.cuts == 1, surveyed.why_not
        plan = super().__call__(surveyed, layers, batches, needs, run)
        assert plan.passes == self.way.parts
        assert plan.cuts == self.way.cuts or min(surveyed.block_of.values()) > 0  # segments below are left out
        return plan


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, LayerStatistics]]:
    """The statistics that reach the solver, under the base model's names; of a layer's attempts the last."""
    seen: dict[str, LayerStatistics] = {}
    original = SegmentSums.take_statistics

    def take(self: SegmentSums, name: str, n_units: int, scale: float) -> LayerStatistics | None:
        found = original(self, name, n_units, scale)
        if found is not None:
            copied = (None if t is None else t.clone() for t in (found.grad, found.input_cov, found.output_fisher))
            seen[name.removeprefix(PREFIX)] = LayerStatistics(*copied, found.n_tokens)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentSums, "take_statistics", take)
        yield seen


def surveyed_model(model: PeftModel, batches: list[dict[str, Any]]) -> Survey:
    """What the product finds out about a model before it plans."""
    task = find_task(model.get_base_model())
    with estimation_mode(model):
        data = draw(batches, Size(1000), None, 1000, task.read, True)
        return survey_model(task, find_adapter(model).layers, task.inputs(data.batches[-1].glimpse(), CPU), needs())


def collected_by(
    model: PeftModel,
    batches: list[dict[str, Any]],
    way: Way = ONE,
    averaging: str = "tokens",
    full: bool = True,
    reward: RewardLoss | None = None,
) -> dict[str, LayerStatistics]:
    """The product's statistics of every layer under a forced plan, under the base model's names."""
    return collected(model, batches, averaging, full, Demanded(way), reward)
