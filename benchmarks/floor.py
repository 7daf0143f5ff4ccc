"""What no initialisation goes below: the plain pass and the products alone. And a training step, for its memory."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from benchmarks.ours import Batches
from benchmarks.qlora import DTYPE
from lora_da.adapter import find_adapter
from lora_da.methods import METHODS
from lora_da.model.state import estimation_mode
from lora_da.products import summable
from lora_da.statistics import InputSums, LayerSums
from lora_da.tasks.head import LossPass, backward


def plain_pass(peft_model: PeftModel, batches: Batches) -> None:
    """One forward and backward over the batches as in training: adapters off, gradients in activations only,
    checkpointing and chunked output layer as ours; nothing is watched."""
    model = peft_model.get_base_model()
    as_it_is = LossPass(1.0, None, contextlib.nullcontext, lambda n, weights: contextlib.nullcontext())
    with estimation_mode(peft_model):
        hook = model.get_input_embeddings().register_forward_hook(require_gradient)
        try:
            for batch, tokens in batches:
                backward(model, model.get_decoder(), batch, tokens, as_it_is)
        finally:
            hook.remove()


def require_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A forward hook: with all weights frozen, gradients start at the embeddings' output."""
    return output.requires_grad_() if torch.is_grad_enabled() else output


@dataclass(frozen=True)
class Shapes:
    """The targeted layers by shape: how many inputs of a width `i` are distinct, how many layers are (o, i)."""

    inputs: Counter[int]
    layers: Counter[tuple[int, int]]


def targeted_shapes(peft_model: PeftModel, device: torch.device) -> Shapes:
    """Look at a forward over a few tokens: layers that are handed the very same tensor share an input."""
    shapes = Shapes(Counter(), Counter())
    last: Any = None

    def look(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal last
        i, o = args[0].shape[-1], output.shape[-1]
        shapes.layers[o, i] += 1
        shapes.inputs[i] += args[0] is not last
        last = args[0]

    model = peft_model.get_base_model()
    hooks = [layer.base.register_forward_hook(look) for layer in find_adapter(peft_model).layers]
    # With gradients, in train mode: bitsandbytes repacks weights for good at its first inference on a CPU.
    hooks.append(model.get_input_embeddings().register_forward_hook(require_gradient))
    try:
        with estimation_mode(peft_model):
            model(input_ids=torch.zeros(1, 4, dtype=torch.long, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def counted(batches: Batches) -> list[int]:
    """How many tokens of each batch count."""
    return [int((tokens.document >= 0).sum()) for _, tokens in batches]


class Products:
    """The products of all targeted layers on random x and d, made beforehand: dᵀx of each layer, xᵀx of each distinct
    input, as `lora_da.statistics` does them.

    Layers of one shape add to the same sums, so that the memory is that of one layer of each shape.
    """

    def __init__(self, shapes: Shapes, tokens: Sequence[int], device: torch.device) -> None:
        self.tokens = list(tokens)  # counted ones, in each batch
        self._shapes, n = shapes, max(self.tokens)
        self._x = {i: _activations(n, i, device) for i in {i for _, i in shapes.layers}}
        self._d = {o: _activations(n, o, device) for o in {o for o, _ in shapes.layers}}

    def run(self) -> None:
        needs = METHODS["lora_da"].needs
        inputs = {i: InputSums(needs.sums) for i in self._x}
        layers = {(o, i): LayerSums(inputs[i], needs) for o, i in self._shapes.layers}
        for n in self.tokens:
            for i, count in self._shapes.inputs.items():
                for _ in range(count):
                    inputs[i].add(self._x[i][:n])
            for (o, i), count in self._shapes.layers.items():
                for _ in range(count):
                    layers[o, i].add(self._x[i][:n], self._d[o][:n])


def _activations(n: int, width: int, device: torch.device) -> Tensor:  # (n, width)
    return summable(torch.randn(n, width, dtype=DTYPE, device=device), DTYPE)


def training_step(peft_model: PeftModel, rows: int, length: int, device: torch.device) -> None:
    """One step of AdamW on the adapter, on `rows` rows of `length` random tokens; the model's own loss."""
    vocabulary = peft_model.get_base_model().config.vocab_size
    ids = torch.randint(vocabulary, (rows, length), device=device)
    peft_model.train()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-4)
    peft_model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
