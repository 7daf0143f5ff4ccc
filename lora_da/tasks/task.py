"""What a model is trained for, as far as its statistics depend on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_da.model.blocks import find_blocks
from lora_da.model.sharding import shape
from lora_da.model.streams import Streams
from lora_da.samples.batch import Batch
from lora_da.tasks.head import LossPass
from lora_da.tasks.inputs import model_inputs


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
        why_not_sequential: why the blocks cannot be run without each other; empty if that is to be tried.
        has_experts: whether a list of modules inside a block is one of experts.
    """

    why_not_sequential = ""
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
    def backward(self, batch: Batch, inputs: dict[str, Any], how: LossPass) -> Tensor:
        """Backpropagate the weighted sum of the losses of the batch's counted loss tokens.

        Args:
            batch: what is run, labels included.
            inputs: of `inputs`.
            how: scale, weights and who is told.

        Returns:
            The sum without factor and weights, a scalar on the model's device.
        """
