"""Models whose parameters are sharded over the processes (FSDP2, DeepSpeed ZeRO-3): a module's are gathered while it
runs.

What the pass calls are parts of the model, its blocks and the modules before and after them, and not the model itself.
FSDP2 allows that once the whole has run: then each block gathers its own parameters, forward and backward, and only
what is outside the blocks has to be gathered by us. ZeRO-3 gathers for whatever module is called.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from lora_da.errors import LoraDAError
from lora_da.model.state import flags_kept


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of the model gathers parameters from other processes.

    Raises:
        LoraDAError: it is wrapped in FSDP1, or its layers are divided over processes (tensor parallelism).
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise LoraDAError(
            "the model is wrapped in FSDP1, whose flat parameters hold no layers; set `fsdp_version: 2` in fsdp_config"
        )
    divided = max((m.tp_size or 1 for m in model.modules() if isinstance(m, PreTrainedModel)), default=1)
    if divided > 1:
        raise LoraDAError(
            f"each layer of the model is divided over {divided} processes (tp_plan); LoRA-DA divides the samples over "
            "processes only: load it without tp_plan"
        )
    return any(isinstance(m, FSDPModule) for m in model.modules()) or any(map(is_zero3, model.parameters()))


def is_shard(parameter: Any) -> bool:
    """Whether this process holds a part of a parameter only."""
    return isinstance(parameter, DTensor) or is_zero3(parameter)


def held(parameter: Any) -> Any:
    """What this process holds of a parameter."""
    if is_zero3(parameter):
        return parameter.ds_tensor
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


NOT_IN_MEMORY = (
    "parameter {} is on the meta device, so its numbers are not in memory: the model is offloaded to CPU or disk by "
    "its `device_map`, or was never loaded; load it whole, quantised if need be"
)


def compute_device(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> torch.device:
    """Where the lowest block runs: the embeddings may be kept on the CPU, and so may FSDP2's shards.

    Args:
        model: in whose embeddings' place it is where there are no blocks.
        blocks: of its decoder.

    Raises:
        LoraDAError: the embeddings are not in memory.
    """
    embeddings = model.get_input_embeddings().weight
    if embeddings.is_meta:
        raise LoraDAError(NOT_IN_MEMORY.format("of the input embeddings"))
    parameter = next((p for block in blocks for p in block.parameters()), embeddings)
    if isinstance(parameter, DTensor):
        kind = parameter.device_mesh.device_type
        return torch.device(kind, torch.accelerator.current_device_index()) if kind != "cpu" else torch.device(kind)
    return parameter.device


def shape(parameter: Any) -> tuple[int, ...]:
    """Tell the size of the whole parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextlib.contextmanager
def whole(parameter: Any) -> Iterator[Any]:
    """The parameter gathered from its shards while the context is open; all processes must ask."""
    if is_zero3(parameter):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def shard_of(value: Tensor, parameter: DTensor) -> DTensor:
    """What a value that all processes have is in a parameter's shards; nothing is sent."""
    value = value.to(parameter.to_local().device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def copied(parameter: Tensor) -> Tensor:
    """Its whole value."""
    with whole(parameter) as value:
        tensor: Tensor = value.detach().clone()
        return tensor


def is_zero3(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 holds a parameter."""
    return hasattr(parameter, "ds_id")


def gathered_bytes(model: nn.Module, blocks: Sequence[nn.Module]) -> int:
    """Bytes gathered at once while the blocks run one after the other: two of them, as FSDP2 reads ahead, and all that
    is outside them."""
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = sum(_nbytes(p) for p in model.parameters() if id(p) not in inside)
    largest = max((sum(map(_nbytes, block.parameters())) for block in blocks), default=0)
    return outside + 2 * largest


def _nbytes(parameter: Tensor) -> int:
    return math.prod(shape(parameter)) * parameter.element_size() if is_shard(parameter) else 0


@contextlib.contextmanager
def prepared(model: PeftModel, blocks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """The model's parts can be called while the context is open, and what is outside the blocks stays gathered: the
    output layer runs chunk by chunk, and would be gathered for each of them."""
    inside = {id(m) for block in blocks for m in block.modules()}
    outside = [m for m in model.modules() if isinstance(m, FSDPModule) and id(m) not in inside]
    with contextlib.ExitStack() as stack:
        if outside:
            # Where the user keeps blocks gathered, a forward alone leaves in them what was there before the write.
            stack.callback(_reshard, model)
            _set_up(model, device)
            stack.enter_context(_unsharded(outside))
        in_blocks = {id(p) for block in blocks for p in block.parameters()}
        parameters = [p for p in model.parameters() if is_zero3(p) and id(p) not in in_blocks]
        if parameters:
            stack.enter_context(_gathered(parameters))
        yield


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def _set_up(model: PeftModel, device: torch.device) -> None:
    """FSDP2 is set up by its first forward, which must find the user's `requires_grad`; a 4-bit layer on a CPU must not
    be asked to infer before it has been trained."""
    tokens = torch.ones(1, 2, dtype=torch.long, device=device)
    decoder = {"decoder_input_ids": tokens} if model.get_base_model().config.is_encoder_decoder else {}
    with flags_kept(model):
        model.train()
        model(input_ids=tokens, **decoder)


@contextlib.contextmanager
def _unsharded(modules: Sequence[FSDPModule]) -> Iterator[None]:
    """FSDP2 modules keep their own parameters gathered, and their backward reads no block ahead: that of a chunk of the
    output layer ends before there is a block to go back to."""
    groups = [group for module in modules for group in _groups(module)]
    before = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
    ahead = [(state := module._get_fsdp_state(), state._states_to_backward_prefetch) for module in modules]
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.set_modules_to_backward_prefetch([module])
            module.unshard()
        yield
    finally:
        for group, after_forward, after_backward in before:
            group.post_forward_mesh_info, group.reshard_after_backward = after_forward, after_backward
        for state, states in ahead:
            state._states_to_backward_prefetch = states
        for module in modules:
            module.reshard()


def _groups(module: FSDPModule) -> list[Any]:
    """What holds a module's settings; torch has no way to ask for them."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return [g for g in ([state._fsdp_param_group] if groups is None else groups) if g is not None]


@contextlib.contextmanager
def _gathered(parameters: Sequence[Any]) -> Iterator[None]:
    """ZeRO-3's parameters stay gathered, also when a module that holds them has run."""
    from deepspeed.runtime.zero import GatheredParameters

    before = [parameter.ds_persist for parameter in parameters]
    with GatheredParameters(list(parameters)):
        try:
            for parameter in parameters:
                parameter.ds_persist = True
            yield
        finally:
            for parameter, persists in zip(parameters, before, strict=True):
                parameter.ds_persist = persists
