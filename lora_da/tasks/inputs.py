"""From a batch of the user's collator to what a model is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_da.errors import LoraDAError
from lora_da.samples.batch import NOT_FOR_THE_MODEL, NOT_TEXT, Batch


def model_inputs(model: PreTrainedModel, batch: Batch, device: torch.device, text_only: bool = True) -> dict[str, Any]:
    """What the model takes but for the labels, on its device.

    Raises:
        LoraDAError: the batch holds more than text and is `text_only`.
    """
    unread = [key for key in batch.inputs if NOT_TEXT.match(key) and batch.inputs[key] is not None]
    if unread and text_only:
        raise LoraDAError(
            f"the batches hold {', '.join(unread)}: LoRA-DA estimates on text only with {type(model).__name__}; "
            "initialise on text rows instead"
        )
    dropped = {"labels", *NOT_FOR_THE_MODEL, *batch.by_row}
    if batch.tokens.boundaries == "position_ids" and "flash" not in (model.config._attn_implementation or ""):
        # Given a padding mask, transformers does not look for documents in a row, and they would see each other;
        # padding starts anew too, and so is a document that nobody sees. Flash attention reads the mask's numbers.
        dropped.add("attention_mask")
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v
        for k, v in batch.inputs.items()
        if k not in dropped
    }
