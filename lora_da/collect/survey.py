"""What there is to know of a model before its statistics are taken, from running a few dozen tokens through it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_da.adapter import AdapterLayer
from lora_da.collect.collector import Collector
from lora_da.collect.selection import Selection
from lora_da.collect.sums import SegmentSums
from lora_da.model.blocks import BlockSequence, NotSequential
from lora_da.model.experts import Routed, find_routed
from lora_da.model.gradients import gradients_must_pass
from lora_da.model.sharding import compute_device, gathered_bytes, shape
from lora_da.model.state import without_checkpointing
from lora_da.needs import Needs
from lora_da.tasks import Task


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
            routed to, summed: what it keeps for the backward.
        gathered_bytes: of the parameters that are gathered from other processes at once.
        devices: where the blocks are, by name.
        kept_weights: bytes of the dense weights of each block that may be kept for the backward beside them.
        cast_head: bytes of the copy of the head's weight that autocast makes; 0 where it makes none.
        eager_heads: attention heads whose scores are written out; 0 where a kernel needs not.
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
    kept_weights: tuple[int, ...]
    cast_head: int
    eager_heads: int
    gathered_bytes: int
    devices: tuple[str, ...]

    @property
    def n_blocks(self) -> int:
        """How many of them there are; 1 where none are known."""
        return len(self.linear_features)

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
    layers_of = [_widths(block) for block in blocks or [model]]
    stacks_of, asked = [_stacks(block) for block in blocks or [model]], _asked(model)
    dequantised = [a for a in layers if a.slice is not None and a.slice.stack.is_parametrised]
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    width, dtype = (shape(embeddings)[-1], model.dtype) if hidden is None else (hidden.shape[-1], hidden.dtype)
    in_autocast = _autocast_dtype(compute_device(model, blocks))
    return Survey(
        sequence=None if why_not else sequence,
        why_not=why_not,
        block_of=block_of,
        routed=find_routed(blocks if task.has_experts else [], bases) | _in_stacks(layers),
        reads_like=sums.reads_like,
        bytes_per_token=width * dtype.itemsize,
        itemsize=dtype.itemsize,
        vocabulary=task.n_logits,
        linear_features=tuple(
            sum(map(sum, widths.values())) + sum(min(asked or e, e) * (i + o) for e, i, o in map(shape, stacks))
            for widths, stacks in zip(layers_of, stacks_of, strict=True)
        ),
        kept_weights=tuple(
            sum(_kept_weight(layer, dtype, in_autocast) * i * o for layer, (i, o) in widths.items())
            + sum(_cast_bytes(stack, in_autocast) * stack.numel() for stack in stacks)
            + sum(dtype.itemsize * a.in_features * a.out_features for a in dequantised if block_of.get(a.name, n) == n)
            for n, (widths, stacks) in enumerate(zip(layers_of, stacks_of, strict=True))
        ),
        cast_head=0 if head is None else _cast(head, in_autocast) * width * task.n_logits,
        eager_heads=_eager_heads(model.config),
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


def _widths(module: nn.Module) -> dict[nn.Module, tuple[int, int]]:
    """Inputs and outputs of layers that have one width each: `nn.Linear` and what takes its place, quantised."""
    found = {}
    for layer in _without_adapters(module):
        if isinstance(layer, Conv1D):
            found[layer] = shape(layer.weight)[0], shape(layer.weight)[1]
        elif not any(layer.children()):
            widths = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
            if isinstance(widths[0], int) and isinstance(widths[1], int):
                found[layer] = widths[0], widths[1]
    return found


def _stacks(module: nn.Module) -> list[nn.Parameter]:
    """The parameters in a module that hold the matrices of all experts, as they are stored."""
    holders = [m for m in module.modules() if isinstance(getattr(m, "num_experts", None), int)]
    parameters = [(m.num_experts, parameter) for m in holders for parameter in m.parameters(recurse=False)]
    return [p for n, p in parameters if len(shape(p)) == 3 and shape(p)[0] == n]


def _asked(model: PreTrainedModel) -> int | None:
    """How many experts a token is routed to; None if it is not known."""
    asked = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    return asked if isinstance(asked, int) else None


def _without_adapters(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all inside it, but for what adapters, which do not run, have put around and beside its layers."""
    wrapped = getattr(module, "base_layer", None)
    if isinstance(wrapped, nn.Module):
        yield from _without_adapters(wrapped)
        return
    yield module
    for child in module.children():
        yield from _without_adapters(child)


def _kept_weight(layer: nn.Module, dtype: torch.dtype, in_autocast: torch.dtype | None) -> int:
    """Bytes of a number in the dense weight that the backward may hold on to: where a class of its own dequantises and
    multiplies by plain autograd, as GPTQ's and AWQ's do, and where autocast casts it, until the layer's backward."""
    return _cast(layer, in_autocast) if isinstance(layer, (nn.Linear, Conv1D)) else dtype.itemsize


def _cast(layer: nn.Module, in_autocast: torch.dtype | None) -> int:
    """Bytes of a number in the copy of a layer's weight that autocast makes; 0 where it makes none."""
    weight = getattr(layer, "weight", None)
    return _cast_bytes(weight, in_autocast) if isinstance(weight, Tensor) else 0


def _cast_bytes(weight: Tensor, in_autocast: torch.dtype | None) -> int:
    """Bytes of a number in the copy of a weight that autocast makes; 0 where it makes none."""
    if in_autocast is None or weight.dtype in (in_autocast, torch.float64):
        return 0
    return in_autocast.itemsize if weight.is_floating_point() else 0


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What products on a device are computed in by autocast; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _eager_heads(config: Any) -> int:
    """Attention heads of a model that computes attention step by step; 0 if it does not, or they are not known."""
    heads = getattr(config.get_text_config(), "num_attention_heads", 0)
    return heads if config._attn_implementation == "eager" and isinstance(heads, int) else 0
