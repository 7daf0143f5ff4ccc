"""What a model is trained for, as far as its statistics depend on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_da.errors import LoraDAError
from lora_da.model.blocks import find_blocks
from lora_da.model.forward import without_its_inputs
from lora_da.model.sharding import shape
from lora_da.model.streams import Streams
from lora_da.samples.batch import Batch
from lora_da.tasks.head import LossPass, MeanLoss, backward_from_head, dependence, document_losses
from lora_da.tasks.inputs import model_inputs

SUPPORTED = (
    "LoRA-DA supports causal and sequence-to-sequence language models, and classifiers of sequences and tokens that "
    "are no encoder-decoders"
)


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
        checks_rows: whether its rows are looked at for faults.
    """

    why_not_sequential = ""
    has_experts = True
    checks_rows = False
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

    def check_loss(self, inputs: Mapping[str, Any]) -> None:  # noqa: B027 (a model's own loss is what it is)
        """Refuse a model whose loss is not what this task takes it for.

        Args:
            inputs: of `inputs`; the beginning of one row will do.

        Raises:
            LoraDAError: it is another one.
        """

    @abstractmethod
    def backward(self, batch: Batch, inputs: dict[str, Any], how: LossPass) -> Tensor:
        """Backpropagate the weighted sum of the losses of the batch's counted loss tokens.

        Args:
            batch: what is run, labels included.
            inputs: of `inputs`.
            how: scale, weights and who is told.

        Returns:
            The sum without factor and weights, a scalar on the device of the model's last layers.
        """


class LanguageModel(Task):
    """Predicts tokens by a head that is run over a few of the hidden states at a time.

    Attributes:
        predicts: where the label is that the logits of a token are compared with, in tokens behind it.
    """

    predicts: int

    @property
    def n_logits(self) -> int:
        return head_width(self.model.get_output_embeddings())

    @abstractmethod
    def decoded(self, inputs: Mapping[str, Any]) -> tuple[Tensor, MeanLoss]:
        """Run what is below the head; its hidden states (rows, columns, h), and the head's loss of some of them.

        Raises:
            LoraDAError: there are none.
        """

    def check_loss(self, inputs: Mapping[str, Any]) -> None:
        name = type(self.model).__name__
        with torch.no_grad():
            hidden, mean_loss = self.decoded(inputs)

        def refusal(error: Exception) -> Exception:
            return LoraDAError(
                f"the head of {name} cannot be run on its decoder's last hidden states alone ({error}); not supported"
            )

        with without_its_inputs(refusal):
            found = dependence(mean_loss, hidden, self.n_logits)
        if found == []:
            raise LoraDAError(
                f"{name}'s loss does not depend on its decoder's last hidden states: its head is all zero, or reads "
                "others; not supported"
            )
        if found not in (None, [0]):
            expected = _label_at(self.predicts)
            seen = " and ".join(_label_at(self.predicts - place) for place in found)
            raise LoraDAError(
                f"{name} compares the logits of a token with {seen}, where LoRA-DA expects {expected}; {SUPPORTED}"
            )

    def backward(self, batch: Batch, inputs: dict[str, Any], how: LossPass) -> Tensor:
        with how.timed("forward"):
            hidden, mean_loss = self.decoded(inputs)
        return backward_from_head(mean_loss, hidden, batch.tokens, how)

    @torch.no_grad()
    def losses(self, batch: Batch, inputs: dict[str, Any]) -> Tensor:
        """The loss of each counted document, summed over its loss tokens; (documents,) float32, on the device."""
        hidden, mean_loss = self.decoded(inputs)
        return document_losses(mean_loss, hidden, batch.tokens)


def _label_at(behind: int) -> str:
    """The label of a token that is so many behind another, in words."""
    return {0: "its own label", 1: "the next one's label"}.get(behind, f"the label {behind} behind it")
