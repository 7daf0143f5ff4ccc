"""All batches through some of the blocks, once: nothing is tried again here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lora_da.collect.collector import Collector
from lora_da.collect.feed import Feed
from lora_da.collect.forecast import Segment
from lora_da.collect.scaling import LossScaling
from lora_da.model.blocks import NotSequential, check
from lora_da.model.gradients import outputs_with_gradients
from lora_da.model.state import reentrant_checkpointing, without_checkpointing
from lora_da.samples.batch import Batch
from lora_da.tasks.head import LossPass


class SegmentRun:
    """One run of all batches through a segment, its layers watched.

    Args:
        feed: of the batches.
        segment: blocks and layers.
        collector: of the layers.
        scaling: of the loss.
        gradient_below: whether the gradient of what enters the segment is kept for the one below.
    """

    def __init__(
        self, feed: Feed, segment: Segment, collector: Collector, scaling: LossScaling, gradient_below: bool
    ) -> None:
        self._documents = [batch.tokens.n_documents for batch in feed.batches]
        # made at once: small tensors that outlive a batch each would keep its memory from being used again
        self._norms = torch.full((sum(self._documents),), torch.nan, device=feed.work.run.device)
        self._feed, self._work = feed, feed.work
        self._segment, self._collector, self._scaling = segment, collector, scaling
        self._backward = feed.work.needs.sums.backward
        self._below = feed.borders.new(len(feed.batches)) if gradient_below else None
        block_of = feed.work.survey.block_of
        reads_inputs = any(block_of.get(layer.name, 0) == segment.first for layer in segment.layers)
        self._reads_inputs = reads_inputs and self._backward
        whole = segment.first == 0 and self._work.is_top(segment)
        self._sequence = None if whole and not self._work.plan.checkpointed else self._work.sequence

    def collect(self, ran: Callable[[], object]) -> Tensor:
        """Run them.

        Args:
            ran: told of every batch that has run.

        Returns:
            The summed loss, a scalar on the device, where the segment is the topmost; else zero.
        """
        total = torch.zeros((), device=self._work.run.device)

        def collect_batch(number: int) -> None:
            loss = self._collect_batch(number)
            if loss is not None:
                total.add_(loss.to(total.device))  # the head's device may be another
            ran()

        with (
            torch.set_grad_enabled(self._backward),
            self._own_activations(),
            self._collector.observing(),
            self._cut(),
        ):
            self._feed.each(collect_batch)
        if self._below is not None:
            self._feed.borders.gradients[self._segment.first] = self._below
        return total

    def gradient_norms(self) -> list[tuple[Batch, Tensor]]:
        """What `LossPass.gradient_norms` takes, of each batch; not a number where the head has taken no gradient."""
        return list(zip(self._feed.batches, self._norms.split(self._documents), strict=True))

    def _collect_batch(self, number: int) -> Tensor | None:
        """Run one batch; the summed loss where that is the topmost segment."""
        segment, batch, loss = self._segment, self._feed.batches[number], None
        inputs = self._feed.inputs(number)
        hidden = self._feed.entering(segment.first, number, inputs)
        if hidden is not None:
            if number == 0:
                self._feed.borders.first_batch[segment.first] = hidden
            hidden = hidden.detach().requires_grad_(self._below is not None or self._reads_inputs)
        self._collector.reading(batch.counted(), self._work.run.device, batch.others())
        if self._work.is_top(segment):
            with self._given(hidden):
                loss = self._run_top(number, batch, inputs)
        else:
            self._run_blocks(number, hidden, inputs)
        if self._below is not None:
            if hidden is None or hidden.grad is None:
                raise NotSequential(f"no gradient reaches what enters block {segment.first}")
            self._collector.look_for_overflow(hidden.grad)
            with self._work.watch("copies"):
                self._below.put(number, hidden.grad)
        return loss

    def _run_top(self, number: int, batch: Batch, inputs: dict[str, Any]) -> Tensor:
        weights = self._scaling.weights(batch, self._work.run.device)
        watch, in_head = self._work.watch, self._collector.selection.in_head

        def keep(norms: Tensor) -> None:
            first = sum(self._documents[:number])
            self._norms[first : first + len(norms)] = norms

        how = LossPass(self._scaling.factor, weights, watch, in_head, self._work.plan.chunk, keep)
        return self._work.task.backward(batch, inputs, how)

    def _run_blocks(self, number: int, hidden: Tensor | None, inputs: dict[str, Any]) -> None:
        sequence, stop, watch = self._sequence, self._segment.stop, self._work.watch
        assert sequence is not None, "a model that is not cut has one segment, the topmost"
        with watch("forward"):
            output = sequence.run(hidden, {}, **inputs)
        if number == 0:
            check(output.detach(), self._feed.borders.first_batch[stop])
        if output.requires_grad:
            with watch("copies"):
                gradient = self._feed.borders.gradients[stop].get(number, number + 1)
            with watch("backward"):
                output.backward(gradient)

    def _cut(self) -> AbstractContextManager[None]:
        """The decoder runs the segment's blocks alone, where these are not all, each again where the plan says so."""
        if self._sequence is None:
            return contextlib.nullcontext()
        return self._sequence.only(self._segment.first, self._segment.stop, self._work.plan.checkpointed)

    def _given(self, hidden: Tensor | None) -> AbstractContextManager[None]:
        """The segment's lowest block is given this, where it is not the decoder's."""
        return contextlib.nullcontext() if self._sequence is None else self._sequence.given(hidden, {})

    @contextlib.contextmanager
    def _own_activations(self) -> Iterator[None]:
        """Where the plan decides what is computed again, or nothing is, the model's own checkpointing is off, and what
        is kept stays on the device. Else each run has an offloading context of its own: one in which memory has run
        out holds on to what it has moved.

        Embeddings require gradients where the segment's lowest block is served, as they do in training with PEFT; a
        pass that serves higher blocks goes back no further than those, unless its checkpointing needs it to.
        """
        task, whole = self._work.task, self._work.sequence is None
        reentrant = self._backward and whole and reentrant_checkpointing(task.model)
        with contextlib.ExitStack() as stack:
            if not whole or not self._backward:
                stack.enter_context(without_checkpointing(task.model))
            else:
                stack.enter_context(self._work.run.offloading())
            if (self._segment.first == 0 and self._reads_inputs) or reentrant:
                for module in task.embeddings:
                    stack.enter_context(outputs_with_gradients(module))
            yield
