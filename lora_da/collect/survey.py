"""What there is to know of a model before its statistics are taken, from running a few dozen tokens through it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lora_da.adapter import AdapterLayer
from lora_da.collect.collector import Collector
from lora_da.collect.selection import Selection
from lora_da.collect.sizes import BlockSizes, autocast_dtype, cast_bytes, eager_heads, kept_by_rule
from lora_da.collect.sums import SegmentSums
from lora_da.model.blocks import BlockSequence, NotSequential
from lora_da.model.experts import Routed, find_routed
from lora_da.model.gradients import gradients_must_pass
from lora_da.model.sharding import compute_device, gathered_bytes, shape
from lora_da.model.state import is_checkpointed, without_checkpointing
from lora_da.needs import Needs
from lora_da.products import multiplies_16_bits, product_itemsize
from lora_da.tasks import Task

MARGIN = 1.05  # of what is measured over a few dozen tokens


@dataclass(frozen=True)
class Survey:
    """How a model can be cut, and what its layers share.

    Args:
        sequence: the decoder's blocks; None where it cannot be cut into them.
        why_not: the reason then.
        block_of: the number of the block a layer is in, by layer; the head runs with the last.
        routed: the layers inside an expert.
        reads_like: the layer whose input a layer shares, by layer; missing for layers that did not run.
        bytes_per_token: of a hidden state between blocks.
        itemsize: bytes of one of its numbers.
        vocabulary: width of the logits.
        linear_features: inputs and outputs of the linear layers of each block, and of the experts that a token is
            routed to, summed.
        kept: bytes that a block keeps of a token for its backward, for each of these.
        widest: inputs and outputs of that which has most of them.
        gathered_bytes: of the parameters that are gathered from other processes at once.
        devices: where the blocks are, by name.
        kept_weights: bytes of the dense weights of each block that may be kept for the backward beside them.
        dequantised: bytes of the largest weight that is made dense while it is multiplied with; 0 where all are dense.
        in_16_bits: whether products are made of 16 bits.
        product_itemsize: bytes of a number in a product that is made before it is added to its sum; 0 where none is.
        cast_head: bytes of the copy of the head's weight that autocast makes; 0 where it makes none.
        eager_heads: attention heads whose scores are written out; 0 where a kernel needs not.
        makes_masks: whether attention makes a matrix of a mask, for rows that are padded or hold several documents.
        checkpointed: whether the model itself, where it is not cut, computes activations again in the backward.
    """

    sequence: BlockSequence | None
    why_not: str
    block_of: Mapping[str, int]
    routed: Mapping[str, Routed]
    reads_like: Mapping[str, str]
    bytes_per_token: int
    itemsize: int
    vocabulary: int
    linear_features: tuple[int, ...]
    kept: float
    widest: int
    kept_weights: tuple[int, ...]
    dequantised: int
    in_16_bits: bool
    product_itemsize: int
    cast_head: int
    eager_heads: int
    makes_masks: bool
    checkpointed: bool
    gathered_bytes: int
    devices: tuple[str, ...]

    @property
    def n_blocks(self) -> int:
        """How many of them there are; 1 where none are known."""
        return len(self.linear_features)

    def measured(self, kept: float) -> Survey:
        """The same with what a block was found to keep; where nothing was found, 0, the rule stands."""
        return replace(self, kept=MARGIN * kept or self.kept)

    def uncut(self, why_not: str) -> Survey:
        """The same of a model that is not to be cut, for this reason."""
        return replace(self, sequence=None, why_not=why_not)


def survey_model(task: Task, layers: Sequence[AdapterLayer], inputs: Mapping[str, Any], needs: Needs) -> Survey:
    """Look at a model.

    Args:
        task: its model in estimation mode.
        layers: those to be served.
        inputs: what its body takes; the beginning of one row will do. It is run four times, block by block at last.
        needs: what is to be taken; gradients are looked for where one of its sums needs a backward pass.

    Raises:
        LoraDAError: the model's loss is not what the task takes it for, or no gradient passes through a layer of the
            kinds that are targeted.
    """
    model, blocks = task.model, task.blocks
    block_of = _block_of(blocks, layers)
    bases, backward = {layer.name: layer.base for layer in layers}, needs.sums.backward
    if backward:  # else nothing depends on the loss
        with without_checkpointing(model):
            task.check_loss(inputs)
    sums = SegmentSums(bases, needs)
    watched = {layer.name: layer.watched for layer in layers}
    collector = Collector(watched, sums, Selection(bases, task.streams, {}), contextlib.nullcontext)
    must_pass = _like(layers, model, blocks) if backward else {}
    sequence = BlockSequence(task.body, blocks)
    why_not = task.why_not_sequential or _why_not(blocks, layers, block_of)
    hidden: Tensor | None = None
    with without_checkpointing(model), collector.observing(), gradients_must_pass(must_pass):
        if not why_not:
            try:
                hidden = sequence.learn(backward, **inputs)
            except NotSequential as error:
                why_not = str(error)
    sizes = [BlockSizes.of(block, model.config) for block in blocks or [model]]
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    width, dtype = (shape(embeddings)[-1], model.dtype) if hidden is None else (hidden.shape[-1], hidden.dtype)
    device = compute_device(model, blocks)
    in_autocast = autocast_dtype(device)
    features = tuple(of.features for of in sizes)
    made = [a for a in layers if a.slice is not None and a.slice.stack.is_parametrised]
    return Survey(
        sequence=None if why_not else sequence,
        why_not=why_not,
        block_of=block_of,
        routed=find_routed(blocks if task.has_experts else [], bases) | _in_stacks(layers),
        reads_like=sums.reads_like,
        bytes_per_token=width * dtype.itemsize,
        itemsize=dtype.itemsize,
        vocabulary=task.n_logits,
        linear_features=features,
        kept=kept_by_rule(max(features), width, dtype.itemsize),
        widest=max(of.widest for of in sizes),
        kept_weights=tuple(
            of.kept_weights(dtype, in_autocast)
            + sum(dtype.itemsize * a.in_features * a.out_features for a in made if block_of.get(a.name, n) == n)
            for n, of in enumerate(sizes)
        ),
        dequantised=max(of.dequantised_weight(dtype) for of in sizes),
        in_16_bits=multiplies_16_bits(device, in_autocast or dtype),
        product_itemsize=product_itemsize(device, in_autocast or dtype),
        cast_head=0 if head is None else cast_bytes(getattr(head, "weight", None), in_autocast) * width * task.n_logits,
        eager_heads=eager_heads(model.config),
        makes_masks=model.config._attn_implementation == "sdpa",
        checkpointed=is_checkpointed(model),
        gathered_bytes=gathered_bytes(model, blocks),
        devices=_devices(blocks),
    )


def _block_of(blocks: Sequence[nn.Module], layers: Sequence[AdapterLayer]) -> dict[str, int]:
    number_of = {id(module): number for number, block in enumerate(blocks) for module in block.modules()}
    found = {layer.name: number_of[id(layer.base)] for layer in layers if id(layer.base) in number_of}
    return found | {layer.name: len(blocks) - 1 for layer in layers if layer.is_head and blocks}


def _in_stacks(layers: Sequence[AdapterLayer]) -> dict[str, Routed]:
    """The layers that are an expert's slice of a parameter, whose module is called with all tokens."""
    slices = {layer.name: layer.slice for layer in layers if layer.slice is not None}
    return {name: Routed(s.stack.module, s.number) for name, s in slices.items() if s.number is not None}


def _why_not(blocks: Sequence[nn.Module], layers: Sequence[AdapterLayer], block_of: Mapping[str, int]) -> str:
    if len(blocks) < 2:
        return "its decoder has no list of blocks"
    outside = [layer.name for layer in layers if layer.name not in block_of]
    if outside:
        return f"layer {outside[0]} is in none of its decoder's blocks"
    devices = _devices(blocks)
    return f"its blocks are on several devices ({', '.join(devices)})" if len(devices) > 1 else ""


def _devices(blocks: Sequence[nn.Module]) -> tuple[str, ...]:
    return tuple(sorted({str(p.device) for block in blocks for p in block.parameters()}))


def _like(layers: Sequence[AdapterLayer], model: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """All layers in the blocks of the kinds that are targeted, targeted or not: gradients pass through them all."""
    kinds, inside = {type(layer.base) for layer in layers}, {id(m) for block in blocks for m in block.modules()}
    return {name: m for name, m in model.named_modules() if type(m) in kinds and id(m) in inside}
