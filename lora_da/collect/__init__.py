"""Statistics of the targeted layers: the samples are run through the model, and what its layers see is summed.

`collect` is the one place that they come from. A `survey` looks at the model, a `plan` cuts it into segments that fit
in memory, the `schedule` runs one `segment` after the other, and a `collector` with its hooks fills the `sums`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from lora_da.adapter import AdapterLayer
from lora_da.collect.feed import Work
from lora_da.collect.handover import HandedOver, HandingOver, Observed, SolveLayer
from lora_da.collect.measure import kept_by_feature
from lora_da.collect.plan import Plan, Planner, make_plan
from lora_da.collect.schedule import Schedule
from lora_da.collect.sums import SegmentSums
from lora_da.collect.survey import survey_model
from lora_da.collect.timing import Stopwatch
from lora_da.errors import LoraDAError
from lora_da.memory import settle
from lora_da.model.blocks import NotSequential
from lora_da.model.experts import Routed
from lora_da.model.slices import expert_by_expert
from lora_da.needs import Needs
from lora_da.processes import Run
from lora_da.samples.batch import Batch
from lora_da.samples.draw import InitData
from lora_da.samples.facts import digests_in
from lora_da.tasks import Task

__all__ = ["Collected", "HandedOver", "Observed", "Plan", "Planner", "collect", "make_plan"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Collected(Generic[T]):
    """What came of the layers.

    Args:
        plan: how the samples were run.
        routed: the layers inside an expert.
        layers: what came of them.
        loss: the mean loss per loss token; NaN until the topmost segment has run.
        gradient_norms: of documents that are rows, by the row's digest; see `LossPass.gradient_norms`.
        timings: seconds by what they were spent on.
        border_bytes: the most that hidden states and gradients at the segments' borders have taken at once.
    """

    plan: Plan
    routed: Mapping[str, Routed]
    layers: HandedOver[T] = field(default_factory=HandedOver)
    loss: float = float("nan")
    gradient_norms: dict[bytes, float] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    border_bytes: int = 0


def collect(
    task: Task,
    layers: Sequence[AdapterLayer],
    data: InitData,
    needs: Needs,
    run: Run,
    solve_layer: SolveLayer[T],
    plan: Planner = make_plan,
) -> Collected[T]:
    """Run the samples through the model, and hand each layer's statistics over, once, as memory allows.

    In several processes all of them call this; each layer is handed over in one of them, and what is made of it is
    sent to all.

    Args:
        task: its model in estimation mode.
        layers: those to be served, in the model's order.
        data: the init samples.
        needs: what is taken of each layer.
        run: where.
        solve_layer: takes a layer with what was collected of it, which is freed when the call returns, Z when the last
            layer that reads it is done; returns what can be sent to other processes.
        plan: decides how the model is cut.

    Raises:
        LoraDAError: the loss is not finite, a layer was never reached, or one layer and one row do not fit in memory.
    """
    with expert_by_expert(layer.base for layer in layers if layer.slice is not None):
        glimpse = data.batches[-1].glimpse()
        surveyed = run.processes.everywhere(lambda: survey_model(task, layers, task.inputs(glimpse, run.device), needs))
        why_not = next(filter(None, run.processes.gathered(surveyed.why_not)), "")
        if why_not:  # in one process is in all
            surveyed = surveyed.uncut(why_not)
        kept = run.processes.everywhere(kept_by_feature, task, layers, glimpse, needs, surveyed, run.device)
        surveyed = surveyed.measured(max(run.processes.gathered(kept)))  # all plan alike
        run.processes.everywhere(settle, run.device)
        while True:
            planned = plan(surveyed, layers, data.batches, needs, run)
            if planned.device_bytes > planned.budget:
                logger.warning("LoRA-DA: more memory is needed than there is to plan with: %s", planned.line())
            if planned.warning:
                run.processes.warn(f"LoRA-DA: {planned.warning}")
            try:
                return _collect(Work(task, data, needs, surveyed, planned, run, Stopwatch(run.device)), solve_layer)
            except NotSequential as reason:
                if run.processes.sharded:  # the others are inside a forward that waits for this process
                    raise LoraDAError(
                        f"the model cannot be streamed: {reason}; set a `memory_budget` in which it runs in one pass"
                    ) from reason
                logger.warning("LoRA-DA: not streamed, in several passes instead: %s", reason)
                surveyed = surveyed.uncut(str(reason))


def _collect(work: Work, solve_layer: SolveLayer[T]) -> Collected[T]:
    """Run one plan."""
    schedule, processes = Schedule(work), work.run.processes
    collected: Collected[T] = Collected(work.plan, work.survey.routed)
    hidden = not work.run.show_progress
    with tqdm(total=schedule.steps, desc=f"LoRA-DA, {work.plan.line()}", disable=hidden, leave=False) as bar:

        def hand_over(layers: Sequence[AdapterLayer], sums: SegmentSums, scale: float) -> None:
            own = processes.everywhere(HandingOver(work, sums, scale, bar, solve_layer).hand_over, layers)
            for done in processes.gathered(own):
                collected.layers.add(done)

        schedule.run(hand_over, bar)
    collected.loss, collected.timings = schedule.loss, work.watch.seconds()
    if work.task.checks_rows:
        for norms in processes.gathered(processes.everywhere(_by_digest, schedule.gradient_norms)):
            collected.gradient_norms |= norms
    collected.border_bytes = schedule.border_bytes
    return collected


def _by_digest(norms: Sequence[tuple[Batch, Tensor]]) -> dict[bytes, float]:
    """Those of documents that are rows, by the row's digest; the device is waited for once."""
    digests: list[bytes | None] = []
    for batch, _ in norms:
        of_batch = digests_in(batch)
        digests += [of_batch.get(number) for number in range(batch.tokens.n_documents)]
    values = torch.cat([of_documents for _, of_documents in norms]).tolist() if norms else []
    return {digest: value for digest, value in zip(digests, values, strict=True) if digest is not None}
