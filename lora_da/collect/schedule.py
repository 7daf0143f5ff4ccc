"""Runs a plan: the samples forward and, where a sum needs it, backward through each segment, its layers watched."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora_da.adapter import AdapterLayer
from lora_da.collect.borders import Border, Borders
from lora_da.collect.collector import Collector
from lora_da.collect.plan import Plan, Segment, split
from lora_da.collect.survey import Survey
from lora_da.collect.timing import Stopwatch
from lora_da.config import Numbers, Preset
from lora_da.errors import LoraDAError
from lora_da.memory import is_out_of_memory
from lora_da.model.blocks import BlockRow, NotARow, check
from lora_da.model.gradients import outputs_with_gradients
from lora_da.model.state import reentrant_checkpointing, without_checkpointing
from lora_da.needs import NEEDS, Needs
from lora_da.processes import Ranks
from lora_da.samples.batch import Batch, divided
from lora_da.samples.draw import InitData
from lora_da.tasks import Task

logger = logging.getLogger(__name__)

LOSS_SCALE = 1024.0  # a power of two, so that it changes no bit in bf16 and float32; float16 gradients need it
LOSS_SCALE_STEP = 16.0  # how much it falls when a float16 gradient overflows
MIN_LOSS_SCALE = LOSS_SCALE / LOSS_SCALE_STEP**4


class Sweep:
    """Takes the statistics of a model's layers, segment by segment, the last first.

    Args:
        task: its model in estimation mode.
        data: the init samples.
        plan: what to run.
        survey: of the model; its row is what is cut.
        numbers: of the method; their averaging says what d is the gradient of, one sample's mean loss or one token's.
        full_fisher: names of the layers whose output Fisher is kept in full.
        device: where the samples go.
        ranks: the processes; each runs its share of the samples.
        needs: of the method.

    Attributes:
        loss: the mean loss per loss token, once a segment has been collected.
        watch: where the time went.
    """

    def __init__(
        self,
        task: Task,
        data: InitData,
        plan: Plan,
        survey: Survey,
        numbers: Preset | Numbers,
        full_fisher: frozenset[str],
        device: torch.device,
        ranks: Ranks | None = None,
        needs: Needs = NEEDS["lora_da"],
    ) -> None:
        self.drawn = data
        self.loss = math.nan
        self.watch = Stopwatch(device)
        self._task, self._model, self._survey, self._plan = task, task.model, survey, plan
        self._full_fisher, self._device, self._progress = full_fisher, device, tqdm(disable=True)
        self._ranks = ranks or Ranks()
        own = self._ranks.shares(data.batches)[self._ranks.rank]
        self._batches = [part for batch in own for part in divided(batch, plan.batch_tokens)]
        self._n_loss_tokens = data.n_loss_tokens
        # Under `samples` a token's loss is weighted by the mean number of loss tokens over its document's own: about 1,
        # so that float16 gradients stay in their range; what remains is part of the scale.
        self._mean_tokens = data.n_loss_tokens / data.n_samples if numbers.averaging == "samples" else None
        self._scale = LOSS_SCALE
        self._sums, self._backward = needs.sums, needs.sums.backward
        self._reentrant = self._backward and survey.row is None and reentrant_checkpointing(task.model)
        self._borders = Borders(device)

    @property
    def steps(self) -> int:
        """Of progress: every batch in every segment, and every layer to be solved."""
        return len(self._plan.segments) * len(self._batches) + sum(len(s.layers) for s in self._plan.segments)

    def collected(self, progress: tqdm) -> Iterator[tuple[Sequence[AdapterLayer], Collector]]:
        """The layers of each segment with their filled collector, which is forgotten here when the next is asked for.

        Args:
            progress: advanced by one for each batch of each segment.

        Raises:
            NotARow: the model's blocks, run again, do not give what they gave; nothing that was collected counts.
            LoraDAError: the loss is not finite, or one layer and one row do not fit in memory.
        """
        self._progress = progress
        pending = list(self._plan.segments)
        self._lay(0, sorted({s.first for s in pending} - {0}))
        while pending:
            segment = pending.pop()
            if not segment.layers and not pending:
                break  # what is left of a segment in two, with nothing to serve in it or below
            again = [s for s in pending if (s.first, s.stop) == (segment.first, segment.stop)]
            is_lowest = not any(s.first < segment.first for s in pending)
            collector = self._attempt(segment, gradient_below=self._backward and not again and not is_lowest)
            if collector is None:
                pending += self._smaller(segment, by_layers=bool(again))
                continue
            yield segment.layers, collector
            del collector
            if not again:  # nobody needs what is above any more
                self._borders.forget(segment.first, segment.stop)

    def _attempt(self, segment: Segment, gradient_below: bool) -> Collector | None:
        """The filled collector; None if memory ran out. A float16 overflow starts the segment anew, scaled down."""
        while True:
            collector = Collector(
                {layer.name: layer.base for layer in segment.layers},
                self._full_fisher,
                self._scale * (self._mean_tokens or 1.0),
                timed=lambda: self.watch("products"),
                routed=self._survey.routed,
                head=next((layer.name for layer in segment.layers if layer.is_head), None),
                streams=self._task.streams,
                sums=self._sums,
            )
            try:
                self._collect(segment, collector, gradient_below)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self._ranks.sharded:
                    raise
                self._progress.update(-self._done)
                return None
            overflowed = collector.overflowed is not None and bool(collector.overflowed)
            if not self._ranks.any(overflowed) or self._scale <= MIN_LOSS_SCALE:
                collector.reduce(self._ranks)
                return collector
            self._scale /= LOSS_SCALE_STEP
            if segment.stop in self._borders.gradients:
                self._borders.gradients[segment.stop].scale(1 / LOSS_SCALE_STEP)
            self._progress.update(-self._done)

    def _collect(self, segment: Segment, collector: Collector, gradient_below: bool) -> None:
        """Run all batches through one segment."""
        self._done = 0
        row = self._survey.row
        whole = segment.first == 0 and segment.stop == len(self._survey.linear_features)
        is_top = segment.stop == len(self._survey.linear_features)
        below = self._borders.new(len(self._batches)) if gradient_below else None
        total = torch.zeros((), device=self._device)
        cut = contextlib.nullcontext() if whole or row is None else row.only(segment.first, segment.stop)
        reads_inputs = any(self._survey.block_of.get(a.name, 0) == segment.first for a in segment.layers)
        reads_inputs = reads_inputs and self._backward
        with (
            torch.set_grad_enabled(self._backward),
            self._own_activations(segment.first == 0 and reads_inputs),
            collector.observing(),
            cut,
        ):
            for number in range(self._ranks.most(len(self._batches))):
                with self._ranks.together():
                    if number < len(self._batches):
                        loss = self._collect_batch(segment, number, collector, reads_inputs, below)
                        total += 0.0 if loss is None else loss
                        self._progress.update()
                        self._done += 1
        if is_top:
            self._note_loss(self._ranks.total(total).item())
        if below is not None:
            self._borders.gradients[segment.first] = below

    def _collect_batch(
        self, segment: Segment, number: int, collector: Collector, reads_inputs: bool, below: Border | None
    ) -> Tensor | None:
        """Run one batch through one segment; the summed loss where that is the topmost."""
        row, batch, loss = self._survey.row, self._batches[number], None
        collector.reading(batch.tokens.document >= 0, self._device, batch.others())
        inputs = self._inputs(batch)
        hidden = self._hidden(segment.first, number, below is not None or reads_inputs)
        if segment.stop == len(self._survey.linear_features):
            whole = segment.first == 0
            with contextlib.nullcontext() if whole or row is None else row.given(hidden):
                loss = self._loss(batch, inputs, collector)
        else:
            self._run(segment, number, hidden, inputs)
        if below is not None:
            if hidden is None or hidden.grad is None:
                raise NotARow(f"no gradient reaches what enters block {segment.first}")
            collector.look_for_overflow(hidden.grad)
            with self.watch("copies"):
                below.put(number, hidden.grad)
        return loss

    def _loss(self, batch: Batch, inputs: dict[str, Any], collector: Collector) -> Tensor:
        weights = None
        if self._mean_tokens is not None:
            per_document = torch.nn.functional.pad(self._mean_tokens / batch.tokens.loss_tokens, (0, 1))
            weights = per_document[batch.tokens.document].to(self._device, non_blocking=True)
        before_head = collector.reading_head
        return self._task.backward(batch, inputs, self._scale, weights, self.watch, before_head)

    def _run(self, segment: Segment, number: int, hidden: Tensor | None, inputs: dict[str, Any]) -> None:
        row = self._survey.row
        assert row is not None, "only a row is cut into segments"
        with self.watch("forward"):
            output = row.run(hidden, **inputs)[segment.stop]
        if number == 0:
            check(output.detach(), self._borders.first_batch[segment.stop])
        if output.requires_grad:
            with self.watch("copies"):
                gradient = self._borders.gradients[segment.stop].get(number, number + 1)
            with self.watch("backward"):
                output.backward(gradient)

    def _hidden(self, first: int, number: int, differentiable: bool) -> Tensor | None:
        """What enters a segment; None where the decoder makes it."""
        if first == 0:
            return None
        with self.watch("copies"):
            return self._borders.hidden[first].get(number, number + 1).detach().requires_grad_(differentiable)

    def _lay(self, start: int, borders: list[int]) -> None:
        """Run the samples forward from block `start` and keep what enters the blocks of `borders`."""
        row = self._survey.row
        while borders and row is not None:
            try:
                return self._lay_once(row, start, borders)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self._ranks.sharded:
                    raise
            if not self._halve_batches():
                raise LoraDAError(self._too_large("a forward without gradients"))

    @torch.no_grad()
    def _lay_once(self, row: BlockRow, start: int, borders: list[int]) -> None:
        laid = {border: self._borders.new(len(self._batches)) for border in borders}
        with without_checkpointing(self._model), row.only(start, borders[-1]):
            for number in range(self._ranks.most(len(self._batches))):
                with self._ranks.together():
                    if number < len(self._batches):
                        inputs, hidden = self._inputs(self._batches[number]), self._hidden(start, number, False)
                        with self.watch("forward"):
                            entered = row.run(hidden, borders, **inputs)
                        with self.watch("copies"):
                            for border in borders:
                                laid[border].put(number, entered[border])
        self._borders.hidden |= laid

    def _smaller(self, segment: Segment, by_layers: bool) -> list[Segment]:
        """What to run instead of a segment that did not fit: the same with half the rows in a batch, or two halves.

        Where its blocks are to be run again for other layers they stay together, and its own layers are divided.
        """
        if self._halve_batches():
            return [segment]
        parts = split(segment, self._survey, by_layers)
        if parts is None:
            alone = f"layer {segment.layers[0].name}" if segment.layers else f"block {segment.first}"
            raise LoraDAError(self._too_large(f"{alone} alone"))
        if parts[1].first > parts[0].first:
            self._lay(segment.first, [parts[1].first])
        logger.warning("LoRA-DA: out of memory; goes on with half the layers at a time")
        return [part for part in parts if part.layers or part.first]

    def _too_large(self, what: str) -> str:
        return (
            f"out of memory with {what} and one row of {max(b.shape[1] for b in self._batches)} tokens: free memory on "
            f"{self._device}, shorten the rows (Axolotl: `sequence_len`), or take layers out of target_modules"
        )

    def _halve_batches(self) -> bool:
        """Whether any batch could be divided."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        halves = [batch.halves() for batch in self._batches]
        if any(halves):
            self._divide(halves)
        if not self._ranks.any(any(halves)):
            return False
        logger.warning("LoRA-DA: out of memory; goes on with half the rows in a batch")
        return True

    def _divide(self, halves: list[tuple[Batch, Batch] | None]) -> None:
        batches: list[Batch] = []
        for batch, pair in zip(self._batches, halves, strict=True):
            batches += [batch] if pair is None else pair
        shapes = [None if pair is None else [half.shape for half in pair] for pair in halves]
        self._borders.divide(shapes)
        self._progress.total += (len(batches) - len(self._batches)) * len(self._plan.segments)
        self._batches = batches

    def _note_loss(self, total: float) -> None:
        self.loss = total / self._n_loss_tokens
        if not math.isfinite(self.loss):
            raise LoraDAError(
                f"the loss of the init samples is {self.loss} on the untouched base model; check the data, "
                "the model's dtype (bf16 rather than fp16) and its weights"
            )

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return self._task.inputs(batch, self._device)

    @contextlib.contextmanager
    def _own_activations(self, inputs_with_gradients: bool) -> Iterator[None]:
        """Where the plan decides what is computed again, or nothing is, the model's own checkpointing is off.

        Embeddings require gradients where the segment's lowest block is served, as they do in training with PEFT; a
        pass that serves higher blocks goes back no further than those, unless its checkpointing needs it to.
        """
        with contextlib.ExitStack() as stack:
            if self._survey.row is not None or not self._backward:
                stack.enter_context(without_checkpointing(self._model))
            if inputs_with_gradients or self._reentrant:
                for module in self._task.embeddings:
                    stack.enter_context(outputs_with_gradients(module))
            yield
