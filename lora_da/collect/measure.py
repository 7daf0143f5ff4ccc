"""What a block keeps of a token for its backward, measured on a few dozen of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_da.adapter import AdapterLayer
from lora_da.collect.collector import Collector
from lora_da.collect.forecast import SOFTMAX
from lora_da.collect.selection import Selection
from lora_da.collect.sums import SegmentSums
from lora_da.collect.survey import Survey
from lora_da.memory import counts_memory, used_bytes
from lora_da.model.blocks import BlockSequence
from lora_da.model.state import without_checkpointing
from lora_da.needs import Needs
from lora_da.samples.batch import Batch
from lora_da.tasks import Task


def kept_by_feature(
    task: Task, layers: Sequence[AdapterLayer], batch: Batch, needs: Needs, survey: Survey, device: torch.device
) -> float:
    """Bytes that a block keeps of a token, for each input and output of its linear layers; 0 where that is not to be
    found out: the model is not cut into blocks, nothing is kept, or the batch cannot be cut.

    The largest block runs forward over a batch and over half of it, its layers watched as they will be. What takes the
    same for both is no token's, as a dequantised weight, and scores of eager attention are forecast by themselves. What
    is there in passing, in the backward too, is not measured: over so few tokens that is a weight.

    Args:
        task: its model in estimation mode.
        layers: those to be served.
        batch: the beginning of one row will do.
        needs: what is to be taken.
        survey: of the model.
        device: where the samples go.
    """
    half = batch.beginning(batch.shape[1] // 2)
    tokens, features = batch.n_positions - half.n_positions, max(survey.linear_features)
    if survey.sequence is None or not (needs.sums.backward and half.n_positions and tokens and features):
        return 0.0
    bases = {layer.name: layer.base for layer in layers}
    watched = {layer.name: layer.watched for layer in layers}
    kept = []
    for part in (batch, half):
        collector = Collector(
            watched, SegmentSums(watched, needs), Selection(bases, task.streams, survey.routed), contextlib.nullcontext
        )
        with without_checkpointing(task.model), collector.observing():
            collector.reading(part.counted(), device, part.others())
            block = survey.linear_features.index(features)
            held = _held(survey.sequence, block, task.inputs(part, device), device)
        kept.append(held - survey.eager_heads * part.n_positions * part.shape[1] * (SOFTMAX + survey.itemsize))
    return max(0.0, (kept[0] - kept[1]) / tokens / features)


def _held(sequence: BlockSequence, block: int, inputs: Mapping[str, Any], device: torch.device) -> int:
    """Bytes that are held between a block's forward and its backward, but for what it returns: by the allocator, where
    there is one that counts, else as far as autograd saves it."""
    entered: list[Tensor] = []
    with sequence.only(block, block + 1):
        with torch.no_grad():
            sequence.run(None, {block: entered.append}, **inputs)
        hidden = entered.pop().requires_grad_()
        if not counts_memory(device):
            return _saved(lambda: sequence.run(hidden, {}, **inputs))
        before = used_bytes(device)
        returned = sequence.run(hidden, {}, **inputs)
        return used_bytes(device) - before - returned.nbytes


def _saved(forward: Callable[[], Tensor]) -> int:
    """Bytes of what is saved for the backward of a forward, weights included."""
    saved: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        kept, storage = tensor.detach(), tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes(), kept  # held, so that no other takes its place
        return kept  # detached: an operation that keeps its own output would hold itself

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(nbytes for nbytes, _ in saved.values())
