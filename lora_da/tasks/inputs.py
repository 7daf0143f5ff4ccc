"""From a batch of the user's collator to what a model is called with."""

from __future__ import annotations

from collections.abc import Sequence
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
    if _is_told_apart_by_positions(model, batch):
        # Padding starts anew too, and so is a document that nobody sees.
        dropped.add("attention_mask")
    if text_only and model.config.is_encoder_decoder is False and _masks_nothing(batch):
        dropped.add("attention_mask")  # known here, where asking the device about it would be to wait
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v
        for k, v in batch.inputs.items()
        if k not in dropped
    }


def notes_on(model: PreTrainedModel, batches: Sequence[Batch]) -> list[str]:
    """Sentences on what the model in training reads otherwise in these batches."""
    masks = [batch.inputs.get("attention_mask") for batch in batches if _is_told_apart_by_positions(model, batch)]
    if any(isinstance(mask, Tensor) and bool((mask <= 1).all()) for mask in masks):
        return [
            "documents in a row are estimated on apart, as `position_ids` tell them; the batches' `attention_mask` "
            "lets them see each other in training; let the collator leave the mask out"
        ]
    return []


def _masks_nothing(batch: Batch) -> bool:
    """Whether a mask says no more than that all is text: nobody takes what is missing then for several documents in a
    row, as transformers does where positions start anew."""
    mask, positions = batch.inputs.get("attention_mask"), batch.inputs.get("position_ids")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool((mask == 1).all()):
        return False
    return positions is None or (isinstance(positions, Tensor) and bool((positions.diff(dim=-1) == 1).all()))


def _is_told_apart_by_positions(model: PreTrainedModel, batch: Batch) -> bool:
    """Whether documents in a row would see each other for a mask: given one, transformers does not look at positions,
    but for flash attention, which reads the mask's numbers."""
    flash = "flash" in (model.config._attn_implementation or "")
    return batch.tokens.boundaries == "position_ids" and not flash
