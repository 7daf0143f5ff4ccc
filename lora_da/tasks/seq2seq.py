"""Sequence to sequence: an encoder reads the source, a decoder predicts the target, each with tokens of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_da.errors import LoraDAError
from lora_da.model.blocks import find_blocks
from lora_da.model.forward import handed_to, hidden_of, loss_of, output_like, replaced
from lora_da.model.streams import Streams
from lora_da.samples.batch import ENCODER, TOKENS, Batch, selected
from lora_da.samples.tokens import IGNORED, read_tokens, real_tokens
from lora_da.tasks.head import MeanLoss
from lora_da.tasks.task import LanguageModel


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

    def beginning(self, length: int) -> Batch:
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


class Seq2Seq(LanguageModel):
    """An encoder-decoder with a language-model head. A document is a row, its loss tokens are its labels.

    Raises:
        LoraDAError: the model names no encoder or decoder, or its encoder reads other than tokens.
    """

    predicts = 0

    why_not_sequential = "it has an encoder and a decoder"
    has_experts = False  # T5 keeps the parts of its blocks in lists, as others keep their experts

    def __init__(self, model: PreTrainedModel) -> None:
        name, read = type(model).__name__, model.main_input_name
        if read != "input_ids":
            raise LoraDAError(f"{name} reads `{read}`; LoRA-DA supports encoder-decoders that read token ids")
        self._encoder, self._decoder = model.get_encoder(), model.get_decoder()
        while _holds(self._decoder, self._encoder) and self._decoder is not self._decoder.get_decoder():
            self._decoder = self._decoder.get_decoder()  # Florence-2 names the whole of what it has inside
        if _holds(self._decoder, self._encoder) or _holds(self._encoder, self._decoder):
            raise LoraDAError(
                f"{name} names no encoder and decoder (`get_encoder()`, `get_decoder()`), so their "
                "tokens cannot be told apart"
            )
        super().__init__(model, model)
        self.blocks = [*find_blocks(self._encoder), *find_blocks(self._decoder)]
        self.streams = Streams({ENCODER: self._encoder, TOKENS: self._decoder})

    @property
    def embeddings(self) -> list[nn.Module]:
        parts = (part for part in (self._encoder, self._decoder) if hasattr(part, "get_input_embeddings"))
        found = [part.get_input_embeddings() for part in parts]
        return found or super().embeddings

    def read(self, inputs: Mapping[str, Any], limit: int) -> Batch:
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise LoraDAError(
                "a batch has no `input_ids` (rows, tokens) for the encoder; use a collator that makes them and "
                "`labels`, e.g. transformers.DataCollatorForSeq2Seq(tokenizer, model=model)"
            )
        tokens = read_tokens(self._target(inputs), limit, shifted=False)
        counted = torch.zeros(tokens.rows, dtype=torch.bool, device=tokens.document.device)
        counted[(tokens.document.view(tokens.rows, -1) >= 0).any(1)] = True
        source = real_tokens(inputs, ids, "input_ids") & counted.unsqueeze(1)
        return SourceAndTarget(inputs, tokens, source=source)

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """What the model takes, its labels included: its own forward makes of them what the decoder reads."""
        return {**super().inputs(batch, device), "labels": batch.inputs["labels"].to(device)}

    def decoded(self, inputs: Mapping[str, Any]) -> tuple[Tensor, MeanLoss]:
        encoded, _ = self._returned_by(self._encoder, inputs)
        output, hidden = self._returned_by(self._decoder, {**inputs, "encoder_outputs": encoded})

        def mean_loss(states: Tensor, targets: Tensor) -> Tensor:
            answer = output_like(output, states.unsqueeze(0))
            source = output_like(encoded, states.detach()[None, :1])  # nobody reads it
            ids = targets.unsqueeze(0)
            with replaced(self._decoder, lambda *args, **kwargs: answer):
                return loss_of(self.model(encoder_outputs=source, decoder_input_ids=ids.clamp_min(0), labels=ids))

        return hidden, mean_loss

    def _returned_by(self, part: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """What the encoder or the decoder makes of what the model's own forward hands it, and the hidden states in it.

        Raises:
            LoraDAError: it is not run, or returns none.
        """
        model, name = type(self.model).__name__, type(part).__name__
        handed = handed_to(part, self.model, **inputs)
        if handed is None:
            raise LoraDAError(f"{model} does not run its {name}, which it names (`get_encoder()`, `get_decoder()`)")
        output = part(**handed)
        hidden = hidden_of(output)
        if hidden is None:
            raise LoraDAError(f"{name} does not return its last hidden state; not supported")
        return output, hidden

    @staticmethod
    def _target(inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The labels, with a mask of the tokens that the decoder reads: what it is told, or all up to the last label.

        It reads token t, made of label t − 1, when it predicts label t; what is behind the last label is padding.
        """
        labels, mask = inputs.get("labels"), inputs.get("decoder_attention_mask")
        if mask is None and isinstance(labels, Tensor) and labels.dim() == 2:
            mask = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0
        return {**{k: v for k, v in inputs.items() if k == "labels"}, "attention_mask": mask}


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def _is_of_target(name: str) -> bool:
    return name == "labels" or name.startswith("decoder_")
