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
from lora_da.model.forward import kept_on_device, replaced
from lora_da.samples.tokens import IGNORED, BatchTokens

CHUNK = 256  # tokens whose logits exist at once: 0.4 GB in float32, gradient included, at a vocabulary of 128k


def backward(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    tokens: BatchTokens,
    scale: float,
    weights: Tensor | None = None,
    timed: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext,
    body: nn.Module | None = None,
    before_head: Callable[[int, Tensor | None], None] = lambda n, weights: None,
) -> Tensor:
    """Backpropagate `scale` times the weighted cross-entropy summed over the batch's counted loss tokens.

    Under `torch.no_grad` the loss alone is computed.

    Args:
        model: the causal language model inside the PEFT model.
        batch: what its forward takes, on its device, labels left out.
        tokens: the batch's counted tokens.
        scale: factor of the loss.
        weights: (p,) factor of each position's loss, on the model's device; 1 if None.
        timed: a context for each of `forward`, `head` and `backward`.
        body: what makes the hidden states that the head reads; the model's decoder if None.
        before_head: told before each call of the head how many tokens carry loss in it, the first ones, and the (n,)
            factors of their losses, which are applied behind the head.

    Returns:
        The sum without factor and weights, a scalar on the model's device.
    """
    decoder = model.get_decoder() if body is None else body
    with timed("forward"):
        output = decoder(**batch)

    def mean_loss(states: Tensor, targets: Tensor) -> Tensor:
        # The model compares the logits of token t with label t + 1, so what it is given is one token longer.
        answer = type(output)(last_hidden_state=torch.cat([states, states[-1:].detach()]).unsqueeze(0))
        labels = torch.cat([targets.new_full((1,), IGNORED), targets]).unsqueeze(0)
        with replaced(decoder, lambda *args, **kwargs: answer):
            loss: Tensor = model(input_ids=labels.clamp_min(0), labels=labels).loss
        return loss

    return backward_from_head(mean_loss, output.last_hidden_state, tokens, scale, weights, timed, before_head)


def backward_from_head(
    mean_loss: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    tokens: BatchTokens,
    scale: float,
    weights: Tensor | None,
    timed: Callable[[str], AbstractContextManager[Any]],
    before_head: Callable[[int, Tensor | None], None],
) -> Tensor:
    """Run the head over a chunk of the loss tokens after the other, then what is below it backward at once.

    Args:
        mean_loss: of hidden states (n, h), each with the label (n,) it predicts; the mean over them.
        hidden: (rows, columns, h), what the head reads.
        tokens, scale, weights, timed, before_head: as for `backward`.

    Returns:
        As `backward`.

    Raises:
        LoraDAError: the loss does not depend on the hidden states.
    """
    flat = hidden.detach().flatten(0, 1)  # (p, h)
    gradient = torch.zeros_like(flat)
    total = torch.zeros((), dtype=torch.float32, device=flat.device)
    targets = tokens.targets.to(flat.device, non_blocking=True)
    carries_loss = (tokens.targets != IGNORED).nonzero().flatten().to(flat.device, non_blocking=True)
    with timed("head"):
        for positions in carries_loss.split(CHUNK) if len(carries_loss) else ():
            chunk = flat[positions].requires_grad_()
            own = None if weights is None else weights[positions]
            before_head(len(positions), own)
            with kept_on_device():
                mean = mean_loss(chunk, targets[positions])
            total += mean.detach().float() * len(positions)
            if not torch.is_grad_enabled():
                continue
            (mean * (len(positions) * scale)).backward()
            if chunk.grad is None:
                raise LoraDAError("the model's head does not take its hidden states from its decoder; not supported")
            # A token's loss depends on its own hidden state alone: to weigh this gradient is to weigh the loss.
            of_chunk = chunk.grad if own is None else (chunk.grad * own.unsqueeze(1)).to(chunk.dtype)
            gradient[positions] = of_chunk
    if hidden.requires_grad:
        with timed("backward"):
            hidden.backward(gradient.view_as(hidden))
    return total
