"""Causal language modelling: each token predicts the next, in text alone or in text with images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_da.errors import LoraDAError
from lora_da.model.forward import handed_to
from lora_da.model.streams import Streams
from lora_da.samples.batch import TOKENS, Batch
from lora_da.samples.draw import read_causal
from lora_da.tasks.head import MeanLoss, body_and_head
from lora_da.tasks.inputs import model_inputs
from lora_da.tasks.task import LanguageModel


class Causal(LanguageModel):
    """A decoder with a language-model head. A document is a row, or a part of a packed one.

    Of a model that reads images too, the towers are run as they are, and layers in its decoder alone are served.

    Raises:
        LoraDAError: the model names no decoder.
    """

    predicts = 1
    checks_rows = True

    def __init__(self, model: PreTrainedModel) -> None:
        decoder = _body_below_the_head(model)
        self._text_only = model.config.get_text_config() is model.config
        whole = model.base_model is not model and not self._text_only
        super().__init__(model, model.base_model if whole else decoder, decoder)
        if not self._text_only:
            self.streams = Streams({TOKENS: decoder})

    def read(self, inputs: Mapping[str, Any], limit: int) -> Batch:
        return read_causal(inputs, limit)

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        inputs = model_inputs(self.model, batch, device, text_only=self._text_only)
        with torch.no_grad():
            handed = handed_to(self.body, self.model, **inputs)
        if handed is None:
            name, body = type(self.model).__name__, type(self.body).__name__
            raise LoraDAError(f"{name} does not run its {body}, which is below its head by the names of its parts")
        return handed

    def decoded(self, inputs: Mapping[str, Any]) -> tuple[Tensor, MeanLoss]:
        return body_and_head(self.model, self.body, inputs)


def _body_below_the_head(model: PreTrainedModel) -> PreTrainedModel:
    """What makes the hidden states that the head reads.

    `get_decoder()` is the library's best guess: of some models it is another one with a head, of some the head itself,
    and of some the model. `base_model` goes by a name, which may be wrong too; the embeddings are where they are.

    Raises:
        LoraDAError: nothing below the head is known.
    """
    found, above = model.get_decoder(), model
    while isinstance(found, PreTrainedModel) and found is not above and found.get_output_embeddings() is not None:
        found, above = found.get_decoder(), found
    embeddings = above.get_input_embeddings()
    beside = (child for child in above.children() if any(module is embeddings for module in child.modules()))
    for body in (found, above.base_model, *beside):
        if isinstance(body, PreTrainedModel) and body is not above:
            return body
    raise LoraDAError(f"{type(above).__name__} names no decoder (`get_decoder()`), so its head cannot be run in chunks")
