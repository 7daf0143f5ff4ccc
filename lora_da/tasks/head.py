"""The training loss and its backward pass, with the output layer over a few hundred tokens at a time.

Logits of a whole batch are the largest tensor of a training step where the trainer does not chunk its head, and modern
trainers do chunk it. Here the decoder runs once; then the model's own forward is asked for the loss of one chunk of its
hidden states after the other, so that whatever the architecture does to its logits (soft-capping, scaling, a patched
or fused loss) is done here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_da.errors import LoraDAError
from lora_da.model.forward import hidden_of, kept_on_device, loss_of, output_like, replaced
from lora_da.samples.tokens import IGNORED, BatchTokens

CHUNK = 256  # tokens whose logits exist at once: 0.4 GB in float32, gradient included, at a vocabulary of 128k


Timed = Callable[[str], AbstractContextManager[Any]]
InHead = Callable[[int, "Tensor | None"], AbstractContextManager[None]]
MeanLoss = Callable[[Tensor, Tensor], Tensor]  # of hidden states (n, h), each with the label (n,) it is to predict


@dataclass(frozen=True)
class LossPass:
    """How the loss of a batch is backpropagated; under `torch.no_grad` it is computed alone.

    Args:
        scale: factor of the loss.
        weights: (p,) factor of the loss at each position; 1 if None.
        timed: a context for each of `forward`, `head` and `backward`.
        in_head: a context for each call of a language-model head, told how many loss tokens it reads, the first ones,
            and the (n,) factors of their losses, which are applied behind it.
        chunk: tokens whose logits exist at once; `CHUNK` if None.
        gradient_norms: takes the mean, over the loss tokens of each counted document, of the norm of the loss's
            gradient in the hidden state that a language-model head reads, (documents,) float32, without factor and
            weights.
    """

    scale: float
    weights: Tensor | None
    timed: Timed
    in_head: InHead
    chunk: int | None = None
    gradient_norms: Callable[[Tensor], None] | None = None


def backward(
    model: PreTrainedModel, body: nn.Module, batch: Mapping[str, Any], tokens: BatchTokens, how: LossPass
) -> Tensor:
    """Backpropagate the weighted cross-entropy summed over the batch's counted loss tokens.

    Args:
        model: the causal language model inside the PEFT model.
        body: what makes the hidden states that its head reads.
        batch: what its forward takes, on its device, labels left out.
        tokens: the batch's counted tokens.
        how: scale, weights and who is told.

    Returns:
        The sum without factor and weights, a scalar where the hidden states are.

    Raises:
        LoraDAError: the body returns no hidden states.
    """
    with how.timed("forward"):
        hidden, mean_loss = body_and_head(model, body, batch)
    return backward_from_head(mean_loss, hidden, tokens, how)


def body_and_head(model: PreTrainedModel, body: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, MeanLoss]:
    """Run the body of a causal language model; its hidden states (rows, columns, h), and the head's loss of some.

    Raises:
        LoraDAError: the body returns no hidden states.
    """
    output = body(**batch)
    hidden = hidden_of(output)
    if hidden is None:
        seen = type(output).__name__
        raise LoraDAError(f"{type(body).__name__} returns a {seen} without hidden states; not supported")

    def mean_loss(states: Tensor, targets: Tensor) -> Tensor:
        # The model compares the logits of token t with label t + 1, so what it is given is one token longer.
        answer = output_like(output, torch.cat([states, states[-1:].detach()]).unsqueeze(0))
        labels = torch.cat([targets.new_full((1,), IGNORED), targets]).unsqueeze(0)
        with replaced(body, lambda *args, **kwargs: answer):
            return loss_of(model(input_ids=labels.clamp_min(0), labels=labels))

    return hidden, mean_loss


def backward_from_head(mean_loss: MeanLoss, hidden: Tensor, tokens: BatchTokens, how: LossPass) -> Tensor:
    """Run the head over a chunk of the loss tokens after the other, then what is below it backward at once.

    Args:
        mean_loss: over those that have a label.
        hidden: (rows, columns, h), what the head reads.
        tokens: the batch's counted tokens.
        how: as for `backward`.

    Returns:
        As `backward`.

    Raises:
        LoraDAError: the loss does not depend on the hidden states.
    """
    flat = hidden.detach().flatten(0, 1)  # (p, h)
    gradient = torch.zeros_like(flat)
    told = how.gradient_norms is not None and torch.is_grad_enabled()
    norms = torch.zeros(len(flat), dtype=torch.float32, device=flat.device) if told else None  # (p,)
    total = torch.zeros((), dtype=torch.float32, device=flat.device)
    targets = tokens.targets.to(flat.device, non_blocking=True)
    weights = None if how.weights is None else how.weights.to(flat.device)
    carries_loss = (tokens.targets != IGNORED).nonzero().flatten().to(flat.device, non_blocking=True)
    with how.timed("head"):
        for positions in carries_loss.split(how.chunk or CHUNK) if len(carries_loss) else ():
            chunk = flat[positions].requires_grad_()
            own = None if weights is None else weights[positions]
            with how.in_head(len(positions), own):
                with kept_on_device():
                    mean = mean_loss(chunk, targets[positions])
                total += mean.detach().float() * len(positions)
                if not torch.is_grad_enabled():
                    continue
                (mean * (len(positions) * how.scale)).backward()
            if chunk.grad is None:
                raise LoraDAError("the model's head does not take its hidden states from its decoder; not supported")
            if norms is not None:
                wide = torch.promote_types(chunk.grad.dtype, norms.dtype)
                of_tokens = torch.linalg.vector_norm(chunk.grad, dim=1, dtype=wide)
                norms[positions] = of_tokens.to(norms.dtype)
            # A token's loss depends on its own hidden state alone: to weigh this gradient is to weigh the loss.
            of_chunk = chunk.grad if own is None else (chunk.grad * own.unsqueeze(1)).to(chunk.dtype)
            gradient[positions] = of_chunk
    if hidden.requires_grad:
        with how.timed("backward"):
            hidden.backward(gradient.view_as(hidden))
    if how.gradient_norms is not None and norms is not None:
        how.gradient_norms(_by_document(norms / how.scale, tokens))
    return total


def _by_document(values: Tensor, tokens: BatchTokens) -> Tensor:
    """The mean of (p,) values over the loss tokens of each counted document; elsewhere they are zero."""
    number = tokens.document.where(tokens.document >= 0, tokens.n_documents).to(values.device, non_blocking=True)
    sums = values.new_zeros(tokens.n_documents + 1).index_add_(0, number, values)[:-1]
    return sums / tokens.loss_tokens.to(values.device, non_blocking=True)


@torch.no_grad()
def document_losses(mean_loss: MeanLoss, hidden: Tensor, tokens: BatchTokens) -> Tensor:
    """The loss of each counted document alone, summed over its loss tokens.

    Args:
        mean_loss: over those that have a label.
        hidden: (rows, columns, h), what the head reads.
        tokens: the batch's counted tokens.

    Returns:
        (documents,) float32, on the model's device.
    """
    flat = hidden.flatten(0, 1)  # (p, h)
    targets = tokens.targets.to(flat.device, non_blocking=True)
    losses = torch.zeros(tokens.n_documents, dtype=torch.float32, device=flat.device)
    for number in range(tokens.n_documents):
        carries_loss = ((tokens.document == number) & (tokens.targets != IGNORED)).nonzero().flatten()
        for positions in carries_loss.to(flat.device, non_blocking=True).split(CHUNK):
            losses[number] += mean_loss(flat[positions], targets[positions]).float() * len(positions)
    return losses


def dependence(mean_loss: MeanLoss, hidden: Tensor, n_logits: int) -> list[int] | None:
    """Where the hidden states are that the loss of one label depends on, counted from the one that is to predict it.

    A hidden state that predicts as it should gives [0]; a loss that is not finite tells nothing, None. Two labels are
    tried: a loss that is zero has no gradient.

    Args:
        mean_loss: of a head.
        hidden: (rows, columns, h), what it reads; the first state is taken.
        n_logits: how many labels there are to choose from.
    """
    middle, found = 2, set()
    targets = torch.full((2 * middle + 1,), IGNORED, device=hidden.device)
    for label in (n_logits // 2, n_logits // 2 - 1):
        states = hidden.detach()[0, :1].repeat(len(targets), 1).requires_grad_()
        targets[middle] = label
        with torch.enable_grad(), kept_on_device():
            loss = mean_loss(states, targets)
            (gradient,) = torch.autograd.grad(loss, states, allow_unused=True)
        if not bool(loss.detach().isfinite()):
            return None
        if gradient is not None:
            found |= set(gradient.any(1).nonzero().flatten().tolist())
    return [position - middle for position in sorted(found)]
