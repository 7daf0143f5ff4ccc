"""What running, solving and streaming take, in bytes, before any of it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_da.adapter import AdapterLayer
from lora_da.collect.survey import Survey
from lora_da.memory import counts_memory
from lora_da.needs import Needs
from lora_da.products import block_rows
from lora_da.samples.batch import Batch
from lora_da.statistics import gradient_bytes, input_bytes

# What is there at once: of the widest layer's inputs and outputs in a forward that keeps nothing; of hidden states and
# their gradients while a segment runs, its own, copies of them and the next batch's; while borders are laid; and while
# layers are solved, the first batch's on both sides of the segment.
FORWARD, BORDERS, LAID, BETWEEN = 3, 5, 2, 2
SOFTMAX = 4  # bytes of a score of eager attention in float32, kept for the backward beside the one in the model's dtype
LOGIT = 14  # bytes of a logit in the model's dtype and in float32, with gradients, and its softmax
NORM = 7 * 4  # bytes of a hidden state's number while its gradient passes the norm above the blocks, in float32


@dataclass(frozen=True)
class Segment:
    """Blocks `first` … `stop` − 1 and the targeted layers that are served when they are run."""

    first: int
    stop: int
    layers: tuple[AdapterLayer, ...]


@dataclass(frozen=True)
class Forecast:
    """Bytes of the device that a segment takes.

    Args:
        survey: of the model.
        batch_tokens: tokens in a batch at most, padding included.
        longest: tokens of the longest row.
        masked: tokens of the longest row that attends by a mask of its own; 0 where none does.
        chunk: tokens whose logits exist at once.
        needs: what is taken of the layers.
        checkpointed: whether the activations of a block are computed again in the backward.
        solved_within: bytes; a layer that takes more to be solved, its own sums included, is solved elsewhere.
    """

    survey: Survey
    batch_tokens: int
    longest: int
    masked: int
    chunk: int
    needs: Needs
    checkpointed: bool
    solved_within: float

    def bytes(self, segment: Segment) -> int:
        """All that it takes at once: laying borders, its sums and running, or what is left of them and solving."""
        is_whole = segment.first == 0 and segment.stop == self.survey.n_blocks
        laying = 0 if is_whole else self.laying()
        return max(laying, self.sums(segment.layers) + self.running(segment), self.solving(segment.layers))

    def sums(self, layers: Sequence[AdapterLayer]) -> int:
        """What the layers' sums take; those that share an input have one of it."""
        inputs = {}
        if self.needs.sums.input_cov:
            inputs = {self.survey.reads_like.get(a.name, a.name): input_bytes(a.in_features) for a in layers}
        gradients = (gradient_bytes(a.in_features, a.out_features, self.needs) for a in layers)
        return sum(gradients) + sum(inputs.values())

    def running(self, segment: Segment) -> int:
        """What its blocks keep of one batch, and the most that is there beside: logits of a chunk, then their
        gradients, or the copies of a layer's input and gradient that are summed, with a product or a weight."""
        survey = self.survey
        summed = max((self._summed(layer) for layer in segment.layers if not layer.is_head), default=0)
        block = summed + survey.dequantised + self._scores(2 * SOFTMAX + survey.itemsize)
        if not self.needs.sums.backward:
            block = summed + self._forward  # summed as they come
        above = self._above(segment) if segment.stop == survey.n_blocks else 0
        return self._kept(segment) + BORDERS * self._hidden + max(block, self._forward, above) + survey.gathered_bytes

    def laying(self) -> int:
        """What running blocks without gradients takes, to lay borders."""
        return LAID * self._hidden + self._forward + self.survey.gathered_bytes

    @property
    def _hidden(self) -> int:
        """A hidden state."""
        return self.batch_tokens * self.survey.bytes_per_token

    @property
    def _forward(self) -> int:
        """What the widest block has at once without a graph."""
        survey = self.survey
        activations = FORWARD * self.batch_tokens * survey.itemsize * survey.widest + self._mask
        weights = survey.dequantised + max(survey.kept_weights)
        return activations + weights + self._scores(SOFTMAX + 2 * survey.itemsize)

    def _above(self, segment: Segment) -> int:
        """What is behind the blocks: the logits of a chunk and the head's product, then the gradients of a norm."""
        survey, product = self.survey, max((self._product(a) for a in segment.layers if a.is_head), default=0)
        return max(
            LOGIT * min(self.chunk, self.batch_tokens) * survey.vocabulary + survey.cast_head + product,
            NORM * self._hidden // survey.itemsize,
        )

    def _kept(self, segment: Segment) -> int:
        """What blocks keep for the backward: all that it reaches, or one at a time and what enters each."""
        survey = self.survey
        blocks = slice(self._reached(segment), segment.stop)
        features, weights = survey.linear_features[blocks], survey.kept_weights[blocks]
        if not self.needs.sums.backward or not features:
            return 0
        each = survey.kept * self.batch_tokens
        of_a_score = SOFTMAX + survey.itemsize
        again = self.checkpointed if survey.sequence is not None else survey.checkpointed
        if again:
            of_blocks = int(each * max(features)) + max(weights)
            return of_blocks + len(features) * self._hidden + self._scores(of_a_score) + self._mask
        return int(each * sum(features)) + sum(weights) + len(features) * (self._scores(of_a_score) + self._mask)

    def _reached(self, segment: Segment) -> int:
        """The lowest block that the backward reaches: that of the lowest layer, or the segment's first where the
        gradient that leaves it is kept for what is below."""
        inside = {block for block in self.survey.block_of.values() if segment.first <= block < segment.stop}
        lowest = min((self.survey.block_of.get(layer.name, 0) for layer in segment.layers), default=segment.first)
        is_last = lowest == min(inside, default=segment.first)  # where it is run several times, for the lowest layers
        return segment.first if is_last and segment.first else lowest

    def _summed(self, layer: AdapterLayer) -> int:
        """The rows of a layer's input and gradient that count, as they are summed, and a product."""
        survey, i, o = self.survey, layer.in_features, layer.out_features
        itemsize = max(survey.itemsize, 0 if survey.in_16_bits else 4)
        squares = 0 if survey.in_16_bits else itemsize * o
        return self.batch_tokens * (itemsize * (i + o) + squares) + self._product(layer)

    def _product(self, layer: AdapterLayer) -> int:
        """A layer's largest product before it is added to its sum, where it is one of its own."""
        i, o = layer.in_features, layer.out_features
        rows = max(stop - start for start, stop in block_rows(i))
        return self.survey.product_itemsize * max(i * o, rows * i, self.needs.full_fisher(o) * o**2)

    @property
    def _mask(self) -> int:
        """What attention in one block makes of a mask of rows that are padded or hold several documents."""
        return self.batch_tokens * self.masked * self.survey.itemsize if self.survey.makes_masks else 0

    def _scores(self, of_a_score: int) -> int:
        """Attention scores that are written out in one block."""
        return self.survey.eager_heads * self.batch_tokens * self.longest * of_a_score

    def solving(self, layers: Sequence[AdapterLayer]) -> int:
        """What solving the layers takes with their sums, each of which is freed after its last reader; those that are
        solved elsewhere take nothing."""
        most, inputs = 0, set()
        held = 0 if self.survey.sequence is None else BETWEEN * self._hidden
        for layer in reversed(in_solving_order(layers)):  # what is held when it is its turn is its own and those behind
            held += gradient_bytes(layer.in_features, layer.out_features, self.needs)
            source = self.survey.reads_like.get(layer.name, layer.name)
            if self.needs.sums.input_cov and source not in inputs:
                inputs.add(source)
                held += input_bytes(layer.in_features)
            solving = self.needs.solving_bytes(layer.in_features, layer.out_features)
            if self.sums([layer]) + solving <= self.solved_within:
                most = max(most, held + solving)
        return most


def in_solving_order(layers: Sequence[AdapterLayer]) -> list[AdapterLayer]:
    """The layers of a segment as they are solved: the widest input, whose Z and its factor are the largest, last."""
    return sorted(layers, key=lambda layer: layer.in_features)


def border_bytes(batches: Sequence[Batch], survey: Survey, device: torch.device) -> int:
    """Hidden states or gradients at one border, on the CPU."""
    sizes = [b.n_positions * survey.bytes_per_token for b in batches]
    if counts_memory(device):  # torch hands out pinned memory in powers of two
        sizes = [1 << (size - 1).bit_length() for size in sizes]
    return sum(sizes)
