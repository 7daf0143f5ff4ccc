"""What a model is trained for, as far as its statistics depend on it."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_da.model.blocks import find_blocks
from lora_da.model.sharding import shape
from lora_da.model.streams import Streams
from lora_da.samples.batch import Batch
from lora_da.tasks.inputs import model_inputs

Timed = Callable[[str], AbstractContextManager[Any]]
BeforeHead = Callable[[int, "Tensor | None"], None]


def nobody(n: int, weights: Tensor | None) -> None:
    """Nobody listens to what the head reads."""


def head_width(head: Any) -> int:
    """Numbers a language-model head returns; a quantised one's weight may have any shape."""
    width = getattr(head, "out_features", None)
    return width if isinstance(width, int) else shape(head.weight)[0]


class Task(ABC):
    """Which tokens of a batch count, what a unit of the loss is, and how the loss is run forward and backward.

    Args:
        model: inside the PEFT model.
        body: the part of it that makes hidden states of a batch's inputs.
        decoder: the part of the body that the blocks are in; the body itself if None.

    Attributes:
        blocks: of the decoder, lowest first.
        streams: where the layers are that read other than the tokens of the loss.
        why_not_a_row: why the blocks cannot be run without each other; empty if that is to be tried.
        has_experts: whether a list of modules inside a block is one of experts.
    """

    why_not_a_row = ""
    has_experts = True
    streams = Streams()

    def __init__(self, model: PreTrainedModel, body: nn.Module, decoder: nn.Module | None = None) -> None:
        self.model, self.body = model, body
        self.blocks = find_blocks(body if decoder is None else decoder)

    @property
    def embeddings(self) -> list[nn.Module]:
        """What makes the hidden states that enter the lowest blocks."""
        return [self.model.get_input_embeddings()]

    @property
    @abstractmethod
    def n_logits(self) -> int:
        """Numbers that the head makes of a hidden state."""

    @abstractmethod
    def read(self, inputs: Mapping[str, Any], limit: int) -> Batch:
        """Count what a collator made; documents beyond the first `limit` that carry loss do not count.

        Raises:
            LoraDAError: it does not fit the task; the message names the key.
        """

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """What `body` takes, on its device.

        Raises:
            LoraDAError: the batch holds more than text.
        """
        return model_inputs(self.model, batch, device)

    @abstractmethod
    def backward(
        self,
        batch: Batch,
        inputs: dict[str, Any],
        scale: float,
        weights: Tensor | None = None,
        timed: Timed = contextlib.nullcontext,
        before_head: BeforeHead = nobody,
    ) -> Tensor:
        """Backpropagate `scale` times the weighted sum of the losses of the batch's counted loss tokens; under
        `torch.no_grad` compute the loss alone.

        Args:
            batch: what is run, labels included.
            inputs: of `inputs`.
            scale: factor of the loss.
            weights: (p,) factor of the loss at each position, on the model's device; 1 if None.
            timed: a context for each of `forward`, `head` and `backward`.
            before_head: told before each call of a language-model head how many loss tokens it reads, the first ones,
                and the (n,) factors of their losses, which are applied behind it.

        Returns:
            The sum without factor and weights, a scalar on the model's device.
        """
