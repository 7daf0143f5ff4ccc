"""Refuse layers that pass no gradient back, as some formats do; keep re-entrant checkpointing from being one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_da.errors import LoraDAError
from lora_da.memory import is_out_of_memory


@contextlib.contextmanager
def gradients_must_pass(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """While open, layers whose input requires gradients are asked for one: some quantised formats have no backward, and
    what is below them would see a part of the loss, or nothing.

    Raises:
        LoraDAError: from the layer's own forward.
    """

    def check(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not args or not torch.is_grad_enabled() or not args[0].requires_grad:
            return
        if not isinstance(output, Tensor):
            return  # of a router, one of whose parameters is a layer
        if not output.requires_grad:
            raise blocked(name, module)
        try:
            ones = torch.ones_like(output)
            (gradient,) = torch.autograd.grad(output, args[0], ones, retain_graph=True, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            raise blocked(name, module) from error
        if gradient is None:
            raise blocked(name, module)

    hooks = [module.register_forward_hook(partial(check, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def outputs_with_gradients(module: nn.Module) -> Iterator[None]:
    """What `module` returns requires gradients: re-entrant checkpointing passes none back to inputs that do not.

    It is no leaf: some models go on in place, as CTRL does when it scales its embeddings.
    """
    hook = module.register_forward_hook(lambda _module, _args, output: output.requires_grad_().clone())
    try:
        yield
    finally:
        hook.remove()


def blocked(name: str, module: nn.Module) -> LoraDAError:
    """The error of a layer that no gradient passes through."""
    weight = type(getattr(module, "weight", None)).__name__
    return LoraDAError(
        f"no gradient passes through layer {name} ({type(module).__name__}, its weight a {weight}): what is below it "
        "cannot be estimated, nor trained; load the base in a format or with a kernel that has a backward"
    )
