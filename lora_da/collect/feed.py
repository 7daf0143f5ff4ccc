"""What is to be done, and what the blocks are fed with: batches, and hidden states where it begins higher up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_da.collect.borders import Border, Borders
from lora_da.collect.forecast import Segment
from lora_da.collect.plan import Plan
from lora_da.collect.survey import Survey
from lora_da.collect.timing import Stopwatch
from lora_da.model.blocks import BlockSequence
from lora_da.model.state import without_checkpointing
from lora_da.needs import Needs
from lora_da.processes import Run
from lora_da.samples.batch import Batch
from lora_da.samples.draw import InitData
from lora_da.tasks import Task


@dataclass(frozen=True)
class Work:
    """What is to be done, from beginning to end the same.

    Args:
        task: its model in estimation mode.
        data: the init samples.
        needs: what is taken of the layers.
        survey: of the model.
        plan: of the segments.
        run: where.
        watch: where the time goes.
    """

    task: Task
    data: InitData
    needs: Needs
    survey: Survey
    plan: Plan
    run: Run
    watch: Stopwatch

    @property
    def sequence(self) -> BlockSequence | None:
        """What is cut into segments; None where the model is run whole."""
        return None if self.plan.why_not_streamed else self.survey.sequence

    def is_top(self, segment: Segment) -> bool:
        """Whether the head runs with it."""
        return segment.stop == self.survey.n_blocks


class Feed:
    """This process's batches, and the hidden states that enter the blocks.

    Args:
        work: to be done.
        batches: replaced where they are divided.
        borders: what is kept between the segments.
    """

    def __init__(self, work: Work, batches: Sequence[Batch], borders: Borders) -> None:
        self.work, self.batches, self.borders = work, list(batches), borders

    def each(self, do: Callable[[int], object]) -> None:
        """Do it for the number of each batch; all processes leave each round, or all raise what one of them raised."""
        processes = self.work.run.processes
        for number in range(processes.most(len(self.batches))):
            with processes.together():
                if number < len(self.batches):
                    do(number)
                    self.borders.note_bytes()

    def inputs(self, number: int) -> dict[str, Any]:
        """What the body takes of a batch."""
        return self.work.task.inputs(self.batches[number], self.work.run.device)

    def hidden(self, first: int, number: int) -> Tensor | None:
        """What enters block `first`, where it is held; None for the lowest block, whose input the decoder makes."""
        if first == 0:
            return None
        with self.work.watch("copies"):
            return self.borders.hidden[first].get(number, number + 1).detach()

    def entering(self, first: int, number: int, inputs: dict[str, Any]) -> Tensor | None:
        """What enters block `first`; where it is not held, blocks are run again from the nearest border that is."""
        start, sequence = self.borders.nearest(first), self.work.sequence
        hidden = self.hidden(start, number)
        if start == first or sequence is None:
            return hidden
        with self.work.watch("forward"):
            return sequence.entering(start, hidden, **inputs)


@torch.no_grad()
def lay(feed: Feed, sequence: BlockSequence, borders: Sequence[int]) -> None:
    """Run the batches forward from the nearest border below, and put away what enters the blocks of `borders`."""
    start, watch = feed.borders.nearest(borders[0]), feed.work.watch
    laid = {border: feed.borders.new(len(feed.batches)) for border in borders}

    def put(border: Border, number: int, entered: Tensor) -> None:
        with watch("copies"):
            border.put(number, entered)

    def lay_batch(number: int) -> None:
        inputs, hidden = feed.inputs(number), feed.hidden(start, number)
        keep = {block: partial(put, border, number) for block, border in laid.items()}
        with watch("forward"):
            sequence.run(hidden, keep, **inputs)

    with without_checkpointing(feed.work.task.model), sequence.only(start, borders[-1]):
        feed.each(lay_batch)
    feed.borders.hidden |= laid
