"""Forwards other than the model's own: a module's replaced by another, and what one keeps held where it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module(…)` runs `forward`; before and after, whatever it ran before (another library's wrapper included)."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def kept_on_device() -> torch.autograd.graph.saved_tensors_hooks:
    """Activations that are used at once or not at all: an offloading context around them shall not move them.

    They are kept detached: an operation that keeps its own output would hold itself, where no collector sees it.
    """
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)
