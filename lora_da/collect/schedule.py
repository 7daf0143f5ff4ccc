"""Which segment runs next, and what happens where memory runs out or a float16 gradient overflows."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence

from torch import Tensor
from tqdm import tqdm

from lora_da.adapter import AdapterLayer
from lora_da.collect.borders import Borders
from lora_da.collect.collector import Collector
from lora_da.collect.cuts import split
from lora_da.collect.feed import Feed, Work, lay
from lora_da.collect.forecast import Segment
from lora_da.collect.keeping import to_lay
from lora_da.collect.plan import shares_of
from lora_da.collect.reduction import reduce
from lora_da.collect.scaling import LossScaling
from lora_da.collect.segment import SegmentRun
from lora_da.collect.selection import Selection
from lora_da.collect.sums import SegmentSums
from lora_da.errors import LoraDAError
from lora_da.memory import is_out_of_memory, release
from lora_da.samples.batch import Batch, divided

logger = logging.getLogger(__name__)

# Takes the layers of a segment, their sums, and the factor that every d in these carries.
HandOver = Callable[[Sequence[AdapterLayer], SegmentSums, float], None]


class Progress:
    """A progress bar in which an attempt can be taken back.

    Args:
        bar: advanced by one for each batch of each segment, and for each layer by whoever solves it.
    """

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar
        self._done = 0

    def begin(self) -> None:
        """An attempt begins."""
        self._done = 0

    def step(self) -> None:
        """One more batch has run."""
        self.bar.update()
        self._done += 1

    def take_back(self) -> None:
        """The attempt does not count."""
        self.bar.update(-self._done)


class Schedule:
    """Takes the statistics of a model's layers, segment by segment, the last first.

    Args:
        work: to be done.

    Attributes:
        loss: the mean loss per loss token, once the topmost segment has run.
        gradient_norms: of this process's batches, see `SegmentRun.gradient_norms`.
    """

    def __init__(self, work: Work) -> None:
        processes = work.run.processes
        own = shares_of(work.data.batches, processes)[processes.rank]
        parts = [part for batch in own for part in divided(batch, work.plan.batch_tokens)]
        self.loss = math.nan
        self.gradient_norms: list[tuple[Batch, Tensor]] = []
        self._work = work
        self._borders = Borders(work.run.device)
        self._feed = Feed(work, parts, self._borders)
        self._scaling = LossScaling(work.data, work.needs.averaging)

    @property
    def border_bytes(self) -> int:
        """The most that were kept at the borders at once."""
        return self._borders.most_bytes

    @property
    def steps(self) -> int:
        """How many there are of progress: every batch in every segment, and every layer to be solved."""
        segments = self._work.plan.segments
        return len(segments) * len(self._feed.batches) + sum(len(s.layers) for s in segments)

    def run(self, hand_over: HandOver, bar: tqdm) -> None:
        """Run all segments.

        Args:
            hand_over: takes what each has collected, which is forgotten when it returns.
            bar: advanced by one for each batch of each segment.

        Raises:
            NotSequential: the model's blocks, run again, do not give what they gave; nothing that was collected counts.
            LoraDAError: the loss is not finite, or one layer and one row do not fit in memory.
        """
        progress, pending = Progress(bar), list(self._work.plan.segments)
        while pending:
            segment = pending.pop()
            if not segment.layers and not pending:
                break  # what is left of a segment in two, with nothing to serve in it or below
            is_top, held = self._work.is_top(segment), self._borders.hidden
            self._lay(to_lay(segment, pending, held, self._work.plan.borders, is_top), progress)
            again = any((s.first, s.stop) == (segment.first, segment.stop) for s in pending)
            is_lowest = not any(s.first < segment.first for s in pending)
            gradient_below = self._work.needs.sums.backward and not again and not is_lowest
            if not self._serve(segment, gradient_below, hand_over, progress):
                pending += self._smaller(segment, again, progress)
            elif not again:  # nobody needs what is above any more
                self._borders.forget(segment.first, segment.stop)

    def _serve(self, segment: Segment, gradient_below: bool, hand_over: HandOver, progress: Progress) -> bool:
        """Run a segment and hand over what it has collected; False if memory ran out."""
        sums = self._attempted(segment, gradient_below, progress)
        if sums is None:
            return False
        hand_over(segment.layers, sums, self._scaling.of_gradients)
        return True

    def _attempted(self, segment: Segment, gradient_below: bool, progress: Progress) -> SegmentSums | None:
        """What a segment has collected; None if memory ran out. A float16 overflow starts it anew, scaled down."""
        processes, device = self._work.run.processes, self._work.run.device
        while True:
            progress.begin()
            collector = self._collector(segment)
            try:
                segment_run = SegmentRun(self._feed, segment, collector, self._scaling, gradient_below)
                total = segment_run.collect(progress.step)
                if self._work.is_top(segment):
                    self._note_loss(processes.total(total).item())
                    self.gradient_norms = segment_run.gradient_norms()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or processes.sharded:
                    raise
                progress.take_back()
                return None
            overflowed = collector.overflowed is not None and bool(collector.overflowed)
            if not processes.anywhere(overflowed) or self._scaling.is_least:
                reduce(collector.sums, processes, device)
                return collector.sums
            factor = self._scaling.lower()
            if segment.stop in self._borders.gradients:
                self._borders.gradients[segment.stop].scale(factor)
            progress.take_back()

    def _collector(self, segment: Segment) -> Collector:
        work, bases = self._work, {layer.name: layer.base for layer in segment.layers}
        watched = {layer.name: layer.watched for layer in segment.layers}
        selection = Selection(bases, work.task.streams, work.survey.routed)
        return Collector(watched, SegmentSums(watched, work.needs), selection, lambda: work.watch("products"))

    def _lay(self, borders: list[int], progress: Progress) -> None:
        """Run the samples forward and keep what enters the blocks of `borders`."""
        sequence, sharded = self._work.sequence, self._work.run.processes.sharded
        while borders and sequence is not None:
            try:
                return lay(self._feed, sequence, borders)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or sharded:
                    raise
            if not self._halve_batches(progress):
                raise LoraDAError(self._too_large("a forward without gradients"))

    def _smaller(self, segment: Segment, by_layers: bool, progress: Progress) -> list[Segment]:
        """What to run instead of a segment that did not fit: the same with half the rows in a batch, or two halves.

        Where its blocks are to be run again for other layers they stay together, and its own layers are divided.
        """
        if self._halve_batches(progress):
            return [segment]
        parts = split(segment, self._work.survey, by_layers or self._work.sequence is None)
        if parts is None:
            alone = f"layer {segment.layers[0].name}" if segment.layers else f"block {segment.first}"
            raise LoraDAError(self._too_large(f"{alone} alone"))
        logger.warning("LoRA-DA: out of memory; goes on with half the layers at a time")
        return [part for part in parts if part.layers or part.first]

    def _too_large(self, what: str) -> str:
        longest, device = max(b.shape[1] for b in self._feed.batches), self._work.run.device
        return (
            f"out of memory with {what} and one row of {longest} tokens: free memory on "
            f"{device}, shorten the rows (Axolotl: `sequence_len`), or take layers out of target_modules"
        )

    def _halve_batches(self, progress: Progress) -> bool:
        """Whether any batch could be divided, in any process."""
        gc.collect()  # what is left of a failed graph may be in cycles, as an offloading context's is
        release(self._work.run.device)
        halves = [batch.halves() for batch in self._feed.batches]
        if any(halves):
            self._divide(halves, progress)
        if not self._work.run.processes.anywhere(any(halves)):
            return False
        logger.warning("LoRA-DA: out of memory; goes on with half the rows in a batch")
        return True

    def _divide(self, halves: Sequence[tuple[Batch, Batch] | None], progress: Progress) -> None:
        batches: list[Batch] = []
        for batch, pair in zip(self._feed.batches, halves, strict=True):
            batches += [batch] if pair is None else pair
        shapes = [None if pair is None else [half.shape for half in pair] for pair in halves]
        self._borders.divide(shapes)
        progress.bar.total += (len(batches) - len(self._feed.batches)) * len(self._work.plan.segments)
        self._feed.batches = batches

    def _note_loss(self, total: float) -> None:
        self.loss = total / self._work.data.n_loss_tokens
        if not math.isfinite(self.loss):
            raise LoraDAError(
                f"the loss of the init samples is {self.loss} on the untouched base model; check the data, "
                "the model's dtype (bf16 rather than fp16) and its weights"
            )
