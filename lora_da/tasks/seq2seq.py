"""Sequence to sequence: an encoder reads the source, a decoder predicts the target, each with tokens of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from lora_da.errors import LoraDAError
from lora_da.model.blocks import find_blocks
from lora_da.model.forward import hidden_of, loss_of, output_like, replaced
from lora_da.model.streams import Streams
from lora_da.samples.batch import ENCODER, TOKENS, Batch, selected
from lora_da.samples.tokens import IGNORED, read_tokens, real_tokens
from lora_da.tasks.head import LossPass, backward_from_head
from lora_da.tasks.task import Task, head_width


@dataclass(frozen=True)
class SourceAndTarget(Batch):
    """A batch whose `tokens` are the decoder's, while the encoder has columns of its own.

    Args:
        source: (rows, columns of the encoder) bool, which of its tokens count.
    """

    source: Tensor = field(kw_only=True)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and the columns of both."""
        return self.tokens.rows, self._columns + self.source.shape[1]

    @property
    def n_counted(self) -> int:
        return super().n_counted + int(self.source.sum())

    @property
    def length(self) -> int:
        return sum(self._lengths())

    def is_square(self) -> bool:
        return super().is_square() or self.tokens.rows == self.source.shape[1] > 1

    def others(self) -> dict[str, Tensor]:
        return {ENCODER: self.source}

    def idle(self) -> Batch:
        return replace(self, tokens=super().idle().tokens, source=torch.zeros_like(self.source))

    def trimmed(self) -> Batch:
        return self._cut_both(*self._lengths())

    def _lengths(self) -> tuple[int, int]:
        source = self.source.any(0).nonzero()
        return super().length, int(source[-1]) + 1 if len(source) else 1

    def _cut(self, length: int) -> Batch:
        return self._cut_both(length, length)

    def _cut_both(self, target: int, source: int) -> Batch:
        if not self._is_known():
            return self
        inputs = {
            k: v[:, : target if _is_of_target(k) else source] if isinstance(v, Tensor) else v
            for k, v in self._model_inputs.items()
        }
        tokens = selected(self.tokens, self._positions()[:, :target], self.tokens.rows)
        return replace(self, inputs=inputs, tokens=tokens, source=self.source[:, :source])

    def _rows(self, numbers: Tensor) -> Batch:
        part = super()._rows(numbers)
        return replace(self, inputs=part.inputs, tokens=part.tokens, source=self.source[numbers])

    def _columns_of(self, name: str) -> int:
        return self._columns if _is_of_target(name) else self.source.shape[1]


class Seq2Seq(Task):
    """An encoder-decoder with a language-model head. A document is a row, its loss tokens are its labels.

    Raises:
        LoraDAError: the model names no encoder or decoder.
    """

    why_not_sequential = "it has an encoder and a decoder"
    has_experts = False  # T5 keeps the parts of its blocks in lists, as others keep their experts

    def __init__(self, model: PreTrainedModel) -> None:
        self._encoder, self._decoder = model.get_encoder(), model.get_decoder()
        if self._encoder is model or self._decoder is model:
            raise LoraDAError(
                f"{type(model).__name__} names no encoder and decoder (`get_encoder()`, `get_decoder()`), so their "
                "tokens cannot be told apart"
            )
        super().__init__(model, model)
        self.blocks = [*find_blocks(self._encoder), *find_blocks(self._decoder)]
        self.streams = Streams({ENCODER: self._encoder, TOKENS: self._decoder})

    @property
    def embeddings(self) -> list[nn.Module]:
        return [self._encoder.get_input_embeddings(), self._decoder.get_input_embeddings()]

    @property
    def n_logits(self) -> int:
        return head_width(self.model.get_output_embeddings())

    def read(self, inputs: Mapping[str, Any], limit: int) -> Batch:
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise LoraDAError(
                "a batch has no `input_ids` (rows, tokens) for the encoder; use a collator that makes them and "
                "`labels`, e.g. transformers.DataCollatorForSeq2Seq(tokenizer, model=model)"
            )
        tokens = read_tokens(self._target(inputs), limit, shifted=False)
        counted = torch.zeros(tokens.rows, dtype=torch.bool)
        counted[(tokens.document.view(tokens.rows, -1) >= 0).any(1)] = True
        source = real_tokens(inputs, ids, "input_ids") & counted.unsqueeze(1)
        if inputs.get("decoder_input_ids") is None:
            made = self.model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
            inputs = {**inputs, "decoder_input_ids": made}
        return SourceAndTarget(inputs, tokens, source=source)

    def backward(self, batch: Batch, inputs: dict[str, Any], how: LossPass) -> Tensor:
        with how.timed("forward"):
            output, hidden = self._decoded(inputs)

        def mean_loss(states: Tensor, targets: Tensor) -> Tensor:
            answer = output_like(output, states.unsqueeze(0))
            encoded = BaseModelOutput(last_hidden_state=states.detach()[None, :1])  # nobody reads it
            ids = targets.unsqueeze(0)
            with replaced(self._decoder, lambda *args, **kwargs: answer):
                return loss_of(self.model(encoder_outputs=encoded, decoder_input_ids=ids, labels=ids))

        return backward_from_head(mean_loss, hidden, batch.tokens, how)

    def _decoded(self, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
        """What the decoder returns, and the hidden states in it; the model's own forward goes on with one token of it,
        for the head to be cheap."""
        found: list[tuple[Any, Tensor]] = []
        original = self._decoder.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            hidden = hidden_of(output)
            if hidden is None:
                raise LoraDAError(
                    f"{type(self._decoder).__name__} does not return its last hidden state; not supported"
                )
            found.append((output, hidden))
            return output_like(output, hidden[:1, :1].detach())

        with replaced(self._decoder, forward):
            self.model(**inputs)
        return found[0]

    @staticmethod
    def _target(inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The labels, with a mask of the tokens that the decoder reads: what it is told, or all up to the last label.

        It reads token t, made of label t − 1, when it predicts label t; what is behind the last label is padding.
        """
        labels, mask = inputs.get("labels"), inputs.get("decoder_attention_mask")
        if mask is None and isinstance(labels, Tensor) and labels.dim() == 2:
            mask = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0
        return {**{k: v for k, v in inputs.items() if k == "labels"}, "attention_mask": mask}


def _is_of_target(name: str) -> bool:
    return name == "labels" or name.startswith("decoder_")
