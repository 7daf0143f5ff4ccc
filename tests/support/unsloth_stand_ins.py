"""Models as Unsloth leaves them on a GPU, where its functions fuse, tile and compile; these here count their calls.

Built as its source builds them (2026.10): which attribute of which module holds what, and where the function is from.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

FAST_LORA, TILED_MLP = "unsloth.kernels.fast_lora", "unsloth_zoo.tiled_mlp"
PUT = ("apply_qkv", "apply_o", "forward", "_unsloth_forward", "_original_forward")  # on instances


def of(module: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function one of that module."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__module__ = module
        return function

    return decorate


class StandIns:
    """Puts functions over the modules of a tiny Llama with an adapter that is still zero.

    Attributes:
        calls: how often each function was called.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self._patch = patch

    def attention(self, model: PeftModel) -> None:
        """Plain functions in the instance's dictionary, which the class's forward calls with the instance."""
        self._patch.setattr(LlamaAttention, "forward", attention_forward)

        @of(FAST_LORA)
        def apply_lora_qkv(self_: nn.Module, x: Tensor, inplace: bool = True) -> tuple[Tensor, ...]:
            self.calls["apply_qkv"] += 1
            return tuple(x @ weight(p).T for p in (self_.q_proj, self_.k_proj, self_.v_proj))

        @of(FAST_LORA)
        def apply_lora_o(self_: nn.Module, x: Tensor) -> Tensor:
            self.calls["apply_o"] += 1
            return x @ weight(self_.o_proj).T

        for block in blocks(model):
            block.self_attn.apply_qkv, block.self_attn.apply_o = apply_lora_qkv, apply_lora_o

    def mlp(self, model: PeftModel, partial: bool = False, name: str = "forward") -> None:
        """A bound method, or a bound partial function (Cohere's)."""

        @of(FAST_LORA)
        def apply_lora_mlp_swiglu(self_: nn.Module, x: Tensor, inplace: bool = True) -> Tensor:
            self.calls["mlp"] += 1
            inner = self_.act_fn(x @ weight(self_.gate_proj).T) * (x @ weight(self_.up_proj).T)
            return inner @ weight(self_.down_proj).T

        function = functools.partial(apply_lora_mlp_swiglu, inplace=False) if partial else apply_lora_mlp_swiglu
        for block in blocks(model):
            setattr(block.mlp, name, MethodType(function, block.mlp))

    def tiled(self, model: PeftModel, fused: bool = False) -> None:
        """A bound method that gives the forward before it, the class's or a fused one, a part of the tokens at a time;
        that forward is unbound, and so is what is kept of it."""
        for block in blocks(model):

            @of(TILED_MLP)
            def tiled_forward_arctic_size(self_: nn.Module, x: Tensor) -> Tensor:
                self.calls["tiled"] += 1
                inner = self_._unsloth_forward.__get__(self_, type(self_))
                return torch.cat([inner(part) for part in x.flatten(0, 1).split(3)]).view_as(x)

            block.mlp._original_forward = block.mlp._unsloth_forward = type(block.mlp).forward
            block.mlp.forward = MethodType(tiled_forward_arctic_size, block.mlp)
        if fused:
            self.mlp(model, name="_unsloth_forward")

    def compiled(self, model: PeftModel) -> None:
        """The class's forward, marked, with the one it had before; it notes on the instance how its first call went."""
        original = LlamaDecoderLayer.forward

        @functools.wraps(original)
        def forward(self_: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls["compiled"] += 1
            self_.__dict__["_unsloth_block_checked"] = 2
            return original(self_, hidden_states, *args, **kwargs)

        forward._unsloth_block_original, forward._unsloth_block_compiled = original, True
        self._patch.setattr(LlamaDecoderLayer, "forward", forward)


def blocks(model: PeftModel) -> nn.ModuleList:
    return model.get_base_model().model.layers


def weight(layer: nn.Module) -> Tensor:
    """What a fused function reads of a projection, adapted or not; its adapter is zero, or off."""
    return layer.get_base_layer().weight


def on_instances(model: nn.Module) -> dict[tuple[str, str], Any]:
    """What single modules were given, by their path and its name there."""
    return {(path, name): value for path, m in model.named_modules() for name, value in vars(m).items() if name in PUT}


def fired(model: nn.Module, run: Callable[[], Any]) -> Counter[str]:
    """How often each linear layer of the base is called as a module."""
    counts: Counter[str] = Counter()

    @contextmanager
    def counting() -> Iterator[None]:
        layers = [(path, m) for path, m in model.named_modules() if path.endswith("_proj.base_layer")]
        hooks = [m.register_forward_hook(lambda *_, path=path: counts.update([path])) for path, m in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    with counting():
        run()
    return counts


def attention_forward(
    self: nn.Module, hidden_states: Tensor, position_embeddings: Any, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Llama's attention, with projections as Unsloth's has them: its functions if the instance has any."""
    shape = (*hidden_states.shape[:2], -1, self.head_dim)
    projected = getattr(self, "apply_qkv", _qkv)(self, hidden_states)
    query, key, value = (p.view(shape).transpose(1, 2) for p in projected)
    query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
    attend = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    attended, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
    return getattr(self, "apply_o", _o)(self, attended.reshape(*hidden_states.shape[:2], -1).contiguous()), None


def _qkv(self: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def _o(self: nn.Module, x: Tensor) -> Tensor:
    return self.o_proj(x)
