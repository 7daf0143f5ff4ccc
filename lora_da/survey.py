"""What there is to know of a model before its statistics are taken, from running a few dozen tokens through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_da.adapter import AdapterLayer
from lora_da.blocks import BlockRow, NotARow
from lora_da.collect import Collector
from lora_da.mode import without_checkpointing
from lora_da.routing import Routed, find_routed
from lora_da.tasks import Task


@dataclass(frozen=True)
class Survey:
    """How a model can be cut, and what its layers share.

    Args:
        row: the decoder's blocks; None where it cannot be cut into them.
        why_not: the reason then.
        block_of: the number of the block a layer is in, by layer.
        routed: the layers inside an expert.
        reads_like: the layer whose input a layer shares, by layer; missing for layers that did not run.
        bytes_per_token: of a hidden state between blocks.
        itemsize: bytes of one of its numbers.
        vocabulary: width of the logits.
        linear_features: inputs and outputs of the linear layers of each block, summed: what it keeps for the backward.
    """

    row: BlockRow | None
    why_not: str
    block_of: Mapping[str, int]
    routed: Mapping[str, Routed]
    reads_like: Mapping[str, str]
    bytes_per_token: int
    itemsize: int
    vocabulary: int
    linear_features: tuple[int, ...]


def survey(task: Task, layers: Sequence[AdapterLayer], inputs: Mapping[str, Any]) -> Survey:
    """Look at a model.

    Args:
        task: its model in estimation mode.
        layers: those to be served.
        inputs: what its body takes; the beginning of one row will do. It is run three times, block by block at last.
    """
    model, blocks = task.model, task.blocks
    block_of = _block_of(blocks, layers)
    collector = Collector({layer.name: layer.base for layer in layers})
    row, why_not = BlockRow(task.body, blocks), task.why_not_a_row or _why_not(blocks, layers, block_of)
    hidden: Tensor | None = None
    with without_checkpointing(model), collector.observing():
        if not why_not:
            try:
                hidden = row.learn(**inputs)
            except NotARow as error:
                why_not = str(error)
    width = model.get_input_embeddings().weight.shape[-1] if hidden is None else hidden.shape[-1]
    itemsize = (model.dtype if hidden is None else hidden.dtype).itemsize
    return Survey(
        row=None if why_not else row,
        why_not=why_not,
        block_of=block_of,
        routed=find_routed(blocks if task.has_experts else [], {layer.name: layer.base for layer in layers}),
        reads_like=collector.shared_inputs(),
        bytes_per_token=width * itemsize,
        itemsize=itemsize,
        vocabulary=task.n_logits,
        linear_features=tuple(map(_linear_features, blocks)) or (_linear_features(model),),
    )


def _block_of(blocks: Sequence[nn.Module], layers: Sequence[AdapterLayer]) -> dict[str, int]:
    number_of = {id(module): number for number, block in enumerate(blocks) for module in block.modules()}
    return {layer.name: number_of[id(layer.base)] for layer in layers if id(layer.base) in number_of}


def _why_not(blocks: Sequence[nn.Module], layers: Sequence[AdapterLayer], block_of: Mapping[str, int]) -> str:
    if len(blocks) < 2:
        return "its decoder has no list of blocks"
    outside = [layer.name for layer in layers if layer.name not in block_of]
    if outside:
        return f"layer {outside[0]} is in none of its decoder's blocks"
    devices = {str(p.device) for block in blocks for p in block.parameters()}
    return f"its blocks are on several devices ({', '.join(sorted(devices))})" if len(devices) > 1 else ""


def _linear_features(module: nn.Module) -> int:
    """Summed over layers of one input and output width each, `nn.Linear` and the kinds that take its place."""
    total = 0
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            total += layer.in_features + layer.out_features
        elif isinstance(layer, Conv1D):
            total += sum(layer.weight.shape)
    return total
