"""What running, solving and streaming take, in bytes, before any of it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_da.adapter import AdapterLayer
from lora_da.collect.survey import Survey
from lora_da.needs import Needs
from lora_da.samples.batch import Batch
from lora_da.statistics import gradient_bytes, input_bytes
from lora_da.tasks.head import CHUNK

# Bytes a block keeps for its backward, beyond the inputs and outputs of its linear layers: norms, rotary embeddings,
# attention, the activation function's own input.
ACTIVATIONS = 1.5
SOFTMAX = 4  # of a score of eager attention, in float32, kept for the backward beside the one in the model's dtype
LOGIT_BYTES = 14  # a logit in the model's dtype and in float32, with gradients, and its softmax


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
        needs: what is taken of the layers.
        checkpointed: whether the activations of a block are computed again in the backward.
        solved_within: bytes; a layer that takes more to be solved, its own sums included, is solved elsewhere.
    """

    survey: Survey
    batch_tokens: int
    longest: int
    needs: Needs
    checkpointed: bool
    solved_within: float

    def bytes(self, segment: Segment) -> int:
        """All that it takes at once: its sums and running, or what is left of them and solving."""
        return max(self.sums(segment.layers) + self.running(segment), self.solving(segment.layers))

    def sums(self, layers: Sequence[AdapterLayer]) -> int:
        """What the layers' sums take; those that share an input have one of it."""
        inputs = {}
        if self.needs.sums.input_cov:
            inputs = {self.survey.reads_like.get(a.name, a.name): input_bytes(a.in_features) for a in layers}
        gradients = (gradient_bytes(a.in_features, a.out_features, self.needs) for a in layers)
        return sum(gradients) + sum(inputs.values())

    def running(self, segment: Segment) -> int:
        """Activations of one batch, the products' own copies and the logits of a chunk."""
        features = self.survey.linear_features
        blocks = slice(segment.first, segment.stop)
        kept = ACTIVATIONS * self.survey.itemsize * sum(features[blocks])
        weights, with_scores = sum(self.survey.kept_weights[blocks]), len(features[blocks])
        if not self.needs.sums.backward:  # nothing is kept beyond the block that runs
            kept = self.survey.itemsize * max(features)
            weights, with_scores = max(self.survey.kept_weights), 0
        elif self.checkpointed or self.survey.sequence is None:  # of a model that is not cut, by its own checkpointing
            entering = self.survey.bytes_per_token * len(features[blocks])
            kept = ACTIVATIONS * self.survey.itemsize * max(features[blocks]) + entering
            weights, with_scores = max(self.survey.kept_weights[blocks]), 1
        borders = 4 * self.survey.bytes_per_token
        copies = 4 * max((a.in_features + a.out_features for a in segment.layers if not a.is_head), default=0)
        # A product before it is added to its sum in float32, and a dequantised weight, forward or backward.
        weight = (4 + self.survey.itemsize) * max((a.in_features * a.out_features for a in segment.layers), default=0)
        head = LOGIT_BYTES * CHUNK * self.survey.vocabulary
        if any(a.is_head for a in segment.layers):
            head *= 2  # d, and its copies to be summed
        head = head + self.survey.cast_head if segment.stop == len(features) else 0
        tokens = int(self.batch_tokens * (kept + borders + copies)) + self._scores(with_scores)
        return tokens + weight + weights + head + self.survey.gathered_bytes

    def _scores(self, blocks: int) -> int:
        """Attention scores that are written out: kept of so many blocks, and their gradients, or copies, in one."""
        of_a_score = (SOFTMAX + self.survey.itemsize) * blocks + 2 * SOFTMAX + self.survey.itemsize
        return self.survey.eager_heads * self.batch_tokens * self.longest * of_a_score

    def solving(self, layers: Sequence[AdapterLayer]) -> int:
        """What solving the layers takes with their sums, each of which is freed after its last reader; those that are
        solved elsewhere take nothing."""
        most, held, inputs = 0, 0, set()
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
    if device.type == "cuda":  # torch hands out pinned memory in powers of two
        sizes = [1 << (size - 1).bit_length() for size in sizes]
    return sum(sizes)
