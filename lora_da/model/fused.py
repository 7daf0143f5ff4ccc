"""What another library has put over a model's modules: put aside for the pass, and the same objects put back.

Fused functions compute several layers at once from their weights, so that hooks on these layers never fire; a compiled
block does not look for hooks that come later. Both are told by where they come from, and nothing of it is imported.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from lora_da.model.forward import replaced

# Unsloth's functions for several layers at once, and its MLPs that take a part of the tokens at a time.
FUSED, TILED = "unsloth.kernels.fast_lora", "unsloth_zoo.tiled_mlp"


@contextlib.contextmanager
def lifted(
    model: nn.Module, is_fused: Callable[[str, Any], bool], plain: Callable[[nn.Module, str], Any]
) -> Iterator[None]:
    """Inside, single modules lack what they were given instead of the code of their class.

    Args:
        model: all modules in it are looked at.
        is_fused: whether an attribute of a module, by name and value, is to be put aside.
        plain: what stands in the attribute's place meanwhile, by module and name; nothing if None.
    """
    aside: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in model.modules():
            for name, value in list(vars(module).items()):
                if is_fused(name, value):
                    stand_in = plain(module, name)
                    aside.append((module, name, value))
                    delattr(module, name)
                    if stand_in is not None:
                        setattr(module, name, stand_in)
        yield
    finally:
        for module, name, value in aside:
            setattr(module, name, value)


def function_of(value: Any) -> FunctionType | None:
    """The function that a method or a partial function calls; None for what calls none."""
    while isinstance(value, (MethodType, functools.partial)):
        value = value.__func__ if isinstance(value, MethodType) else value.func
    return value if isinstance(value, FunctionType) else None


@contextlib.contextmanager
def layer_by_layer(model: nn.Module) -> Iterator[None]:
    """Inside, a model of Unsloth's calls its layers one by one, and nothing runs compiled.

    Its attention calls `self.apply_qkv` and `self.apply_o` where there are any, and else the projections. With the
    adapter off, these and the functions in the MLP's place call the layers too where a gradient is to come, but where
    none is they compute in one.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(lifted(model, _is_unsloths, _untiled))
        for module in model.modules():
            # a compiled block notes on itself how its first call went: it is not to be called at all
            original = getattr(type(module).forward, "_unsloth_block_original", None)
            if original is not None:
                stack.enter_context(replaced(module, MethodType(original, module)))
        if "unsloth" in sys.modules:  # it compiles functions of any model there is
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _is_unsloths(name: str, value: Any) -> bool:
    function = function_of(value)
    return function is not None and function.__module__ in (FUSED, TILED)


def _untiled(module: nn.Module, name: str) -> MethodType | None:
    """The forward that an MLP had before it was tiled; a fused function has nothing in its place."""
    function = function_of(vars(module)[name])
    if function is None or function.__module__ != TILED:
        return None
    return MethodType(vars(module)["_original_forward"], module)
