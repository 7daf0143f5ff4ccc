"""The state a model is in while its statistics are taken, and nothing of it left behind.

The model is the one the user trains: adapters off unless asked for, train mode on (checkpointing depends on it), all
noise off, and its layers called one by one.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from lora_da.model.fused import layer_by_layer

NOISE = re.compile(r"drop|jitter|neftune_noise", re.IGNORECASE)
# What a forward leaves for later ones, and what training's own forward would find: of the last images' positions, for
# generation; whether the last one had no labels, by Unsloth, which then looks at padding.
LEFT_BY_A_CALL = {"rope_deltas": None, "_has_no_labels": False}
RUNNING_STATISTICS = (nn.modules.batchnorm._BatchNorm,)


@contextlib.contextmanager
def estimation_mode(model: PeftModel, with_adapter: bool = False) -> Iterator[None]:
    """Enter the estimation state; leave with flags, attributes and random states as they were, also after an error.

    Args:
        model: the user's.
        with_adapter: whether its adapters take part.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # whatever the caller has switched off,
        stack.enter_context(torch.enable_grad())  # a backward pass follows
        stack.enter_context(random_states())
        stack.enter_context(flags_kept(model))
        stack.enter_context(layer_by_layer(model))
        if not with_adapter:
            stack.enter_context(model.disable_adapter())
        model.requires_grad_(False)  # nobody's .grad is touched: only activations carry gradients
        model.train()
        for module in model.modules():
            if isinstance(module, (nn.Embedding, *RUNNING_STATISTICS)):
                module.training = False  # NEFTune adds noise behind embeddings in train mode
            for name in _noise_attributes(vars(module)):
                stack.enter_context(attribute(module, name, 0.0))
            if isinstance(module, nn.modules.dropout._DropoutNd):
                stack.enter_context(attribute(module, "p", 0.0))
            for name, value in LEFT_BY_A_CALL.items():
                if name in vars(module):
                    stack.enter_context(attribute(module, name, value))
        for config in _configs(model):
            for name in _noise_attributes(vars(config)):
                stack.enter_context(attribute(config, name, 0.0))
            for name in ("use_cache", "output_router_logits"):
                if getattr(config, name, False):
                    stack.enter_context(attribute(config, name, False))
            if hasattr(config, "problem_type"):  # a classifier's first loss notes here what the labels are
                stack.enter_context(attribute(config, "problem_type", config.problem_type))
        yield


@contextlib.contextmanager
def reading_mode(model: nn.Module) -> Iterator[None]:
    """Run forward passes alone, as in evaluation; leave with flags, attributes and random states as they were."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(random_states())
        stack.enter_context(flags_kept(model))
        stack.enter_context(layer_by_layer(model))
        model.eval()
        for config in _configs(model):
            if getattr(config, "use_cache", False):
                stack.enter_context(attribute(config, "use_cache", False))
        yield


def left_out_of_the_loss(model: nn.Module) -> list[str]:
    """Sentences on what training adds to its loss and the estimate, in estimation mode, does not."""
    if any(getattr(config, "output_router_logits", False) for config in _configs(model)):
        return ["the balancing loss of experts (`output_router_logits`) is in training's loss and not in the estimate"]
    return []


@contextlib.contextmanager
def drawing_mode() -> Iterator[None]:
    """Read the user's data as training reads it; leave with random states as they were."""
    with torch.inference_mode(False), random_states():
        yield


@contextlib.contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Activations are kept, not computed again, while the context is open."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) is True:
                stack.enter_context(attribute(module, "gradient_checkpointing", False))
        yield


def is_checkpointed(model: nn.Module) -> bool:
    """Whether activations are computed again in the backward by the model itself."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def reentrant_checkpointing(model: nn.Module) -> bool:
    """Whether checkpointing is on and may be the re-entrant kind, which needs inputs that require gradients."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            if keywords.get("use_reentrant", True):
                return True
    return False


def _noise_attributes(attributes: dict[str, Any]) -> list[str]:
    return [name for name, value in attributes.items() if NOISE.search(name) and isinstance(value, float) and value > 0]


def _configs(model: nn.Module) -> list[Any]:
    """Every distinct transformers config in the model; layers may hold their own."""
    found: list[Any] = [vars(m)["config"] for m in model.modules() if hasattr(vars(m).get("config"), "to_dict")]
    configs = {id(config): config for config in found}
    for config in list(configs.values()):
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        configs[id(text)] = text
    return list(configs.values())


@contextlib.contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Modes and `requires_grad` are as they were when the context is left."""
    training = [(module, module.training) for module in model.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, flag in training:  # outer modules first: what these set inside them is set again
            if type(module).train is nn.Module.train:
                module.training = flag
            elif module.training != flag:
                module.train(flag)  # quantised layers that hold other tensors in each mode
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def random_states() -> Iterator[None]:
    """Random states are as they were when the context is left."""
    python, numpy_state = random.getstate(), np.random.get_state()
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None  # one that `fork_rng` does not know
    kind = "xpu" if torch.xpu.is_available() else "cuda"
    try:
        with torch.random.fork_rng(range(torch.get_device_module(kind).device_count()), device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        if mps is not None:
            torch.mps.set_rng_state(mps)
