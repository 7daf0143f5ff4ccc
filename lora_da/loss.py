"""The training loss and its backward pass, with the output layer over a few hundred tokens at a time.

Logits of a whole batch are the largest tensor of a training step where the trainer does not chunk its head, and modern
trainers do chunk it. Here the decoder runs once; then the model's own forward is asked for the loss of one chunk of its
hidden states after the other, so that whatever the architecture does to its logits (soft-capping, scaling, a patched
or fused loss) is done here too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_da.errors import LoraDAError
from lora_da.forwards import kept_on_device, replaced
from lora_da.tokens import IGNORED, BatchTokens

CHUNK = 256  # tokens whose logits exist at once: 0.4 GB in float32, gradient included, at a vocabulary of 128k
CAUSAL_LOSSES = ("ForCausalLM", "ForConditionalGeneration", None)


def check_causal(model: nn.Module) -> None:
    """Refuse what does not predict the next token.

    Raises:
        LoraDAError: no transformers model, an encoder-decoder, a classifier or reward model, a masked language model.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise LoraDAError(f"{name} is not a transformers model; LoRA-DA reads the loss of a causal language model")
    if getattr(model.config, "is_encoder_decoder", False):
        raise LoraDAError(f"{name} is an encoder-decoder; LoRA-DA supports causal language models")
    if model.get_output_embeddings() is None:
        raise LoraDAError(
            f"{name} has no language-model head (a classifier or reward model?); "
            "LoRA-DA supports causal language models"
        )
    if model.loss_type not in CAUSAL_LOSSES:
        raise LoraDAError(f"{name} trains with {model.loss_type}; LoRA-DA supports causal language models")
    if model.get_decoder() is model:
        raise LoraDAError(f"{name} names no decoder (`get_decoder()`), so its head cannot be run in chunks")


def backward(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    tokens: BatchTokens,
    scale: float,
    weights: Tensor | None = None,
    timed: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext,
    before_head: Callable[[int, Tensor | None], None] = lambda n, weights: None,
) -> Tensor:
    """Backpropagate `scale` times the weighted cross-entropy summed over the batch's counted loss tokens.

    Args:
        model: the causal language model inside the PEFT model.
        batch: what its forward takes, on its device, labels left out.
        tokens: the batch's counted tokens.
        scale: factor of the loss.
        weights: (p,) factor of each position's loss, on the model's device; 1 if None.
        timed: a context for each of `forward`, `head` and `backward`.
        before_head: told before each call of the head how many tokens carry loss in it, the first ones, and the (n,)
            factors of their losses, which are applied behind the head.

    Returns:
        The sum without factor and weights, a scalar on the model's device.
    """
    decoder = model.get_decoder()
    with timed("forward"):
        output = decoder(**batch)
    hidden = output.last_hidden_state  # (rows, columns, h)
    with timed("head"):
        total, gradient = _head(model, output, tokens, scale, weights, before_head)
    if hidden.requires_grad:
        with timed("backward"):
            hidden.backward(gradient.view_as(hidden))
    return total


def _head(
    model: PreTrainedModel,
    output: Any,
    tokens: BatchTokens,
    scale: float,
    weights: Tensor | None,
    before_head: Callable[[int, Tensor | None], None],
) -> tuple[Tensor, Tensor]:
    """The summed loss, and the gradient (p, h) of the scaled, weighted loss in the decoder's last hidden state."""
    decoder = model.get_decoder()
    flat = output.last_hidden_state.detach().flatten(0, 1)  # (p, h)
    gradient = torch.zeros_like(flat)
    targets = tokens.targets.to(flat.device, non_blocking=True)
    carries_loss = (tokens.targets != IGNORED).nonzero().flatten().to(flat.device, non_blocking=True)
    total = torch.zeros((), dtype=torch.float32, device=flat.device)
    no_label = torch.full((1,), IGNORED, dtype=targets.dtype, device=flat.device)
    for positions in carries_loss.split(CHUNK) if len(carries_loss) else ():
        chunk = flat[positions].requires_grad_()
        # The model compares the logits of token t with label t + 1, so the chunk is one token longer than it is read.
        states = torch.cat([chunk, chunk[-1:].detach()]).unsqueeze(0)
        labels = torch.cat([no_label, targets[positions]]).unsqueeze(0)
        answer = type(output)(last_hidden_state=states)
        own = None if weights is None else weights[positions]
        before_head(len(positions), own)
        with replaced(decoder, lambda *args, answer=answer, **kwargs: answer), kept_on_device():
            mean = model(input_ids=labels.clamp_min(0), labels=labels).loss
        total += mean.detach().float() * len(positions)
        (mean * (len(positions) * scale)).backward()
        if chunk.grad is None:
            raise LoraDAError(
                f"{type(model).__name__} does not take its hidden states from {type(decoder).__name__}; not supported"
            )
        # A token's loss depends on its own hidden state alone: to weigh this gradient is to weigh the loss.
        of_chunk = chunk.grad if own is None else (chunk.grad * own.unsqueeze(1)).to(chunk.dtype)
        gradient[positions] = of_chunk
    return total, gradient
