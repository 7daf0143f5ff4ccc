"""Tiny random models that read images, rows with images among their tokens, and what the oracle makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from architectures import SIZES
from classifiers import texts
from models import IGNORED, seeded, with_lora
from peft import PeftModel
from task_oracle import Unit, cross_entropy
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

IMAGE = 126  # the token that stands for a piece of an image
LANGUAGE = r".*language_model\..*_proj"
KINDS = ("Llava", "Qwen2VL")


def reader(kind: str, **text: Any) -> PreTrainedModel:
    if kind == "Llava":  # an image of 8 × 8 is 4 tokens
        eye = CLIPVisionConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        config = LlavaConfig(vision_config=eye, text_config=LlamaConfig(**{**SIZES, **text}), image_token_id=IMAGE)
        return seeded(LlavaForConditionalGeneration, config)
    eye = {"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        vision_config=eye, text_config={**SIZES, "rope_parameters": rope, **text}, image_token_id=IMAGE
    )
    return seeded(Qwen2VLForConditionalGeneration, config)


def adapted(base: PreTrainedModel, targets: str = LANGUAGE, **lora: Any) -> PeftModel:
    return with_lora(base, target_modules=targets, **lora)


def rows(kind: str, count: int = 7, seed: int = 0) -> list[Unit]:
    """Two images in every fourth row, none in the next, one in the others; text around them, the first of it without
    loss. Qwen2-VL's are of two sizes."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, ids in enumerate(texts(count, seed, 5, 12)):
        ids = ids.clamp_max(IMAGE - 2)  # between two images is a token of its own
        row: Unit = {"labels": ids.clone()}
        n_images = {0: 2, 1: 0}.get(number % 4, 1)
        sizes = [[1, 4, 4] if (number + k) % 2 else [1, 2, 4] for k in range(n_images)]
        pieces = [4 if kind == "Llava" else size[1] * size[2] // 4 for size in sizes]
        images = torch.tensor([token for n in pieces for token in [*[IMAGE] * n, IMAGE - 1]][:-1], dtype=torch.long)
        row["input_ids"] = torch.cat([ids[:2], images, ids[2:]])
        row["labels"] = torch.cat([torch.full((2 + len(images),), IGNORED), ids[2:]])
        if kind == "Llava" and n_images:
            row["pixel_values"] = torch.randn(n_images, 3, 8, 8, generator=generator)
        if kind == "Qwen2VL":
            row["mm_token_type_ids"] = (row["input_ids"] == IMAGE).long()
            if n_images:
                row["pixel_values"] = torch.randn(sum(h * w for _, h, w in sizes), 3 * 2 * 4 * 4, generator=generator)
                row["image_grid_thw"] = torch.tensor(sizes)
        found.append(row)
    return found


def pad(batch: Sequence[Unit], extra: int = 0) -> dict[str, Tensor]:
    """Batch rows as processors do: tokens padded, images of all rows in one tensor."""
    width = max(len(row["input_ids"]) for row in batch) + extra
    fills = {"input_ids": 0, "labels": IGNORED, "mm_token_type_ids": 0}

    def filled(values: Tensor, fill: int) -> Tensor:
        return torch.cat([values, values.new_full((width - len(values),), fill)])

    found = {k: torch.stack([filled(row[k], fill) for row in batch]) for k, fill in fills.items() if k in batch[0]}
    found["attention_mask"] = (found["input_ids"] > 0).long()
    for name in ("pixel_values", "image_grid_thw"):
        images = [row[name] for row in batch if name in row]
        if images:
            found[name] = torch.cat(images)
    return found


def in_batches(found: Sequence[Unit], size: int, extra: int = 0) -> list[dict[str, Tensor]]:
    return [pad(found[first : first + size], extra) for first in range(0, len(found), size)]


def losses(twin: nn.Module, unit: Unit) -> Tensor:
    inputs = {k: v[None] for k, v in unit.items() if k in ("input_ids", "mm_token_type_ids")}
    images = {k: v.double() if v.is_floating_point() else v for k, v in unit.items() if k not in (*inputs, "labels")}
    logits = twin(**inputs, **images).logits[0]
    return cross_entropy(logits[:-1], unit["labels"][1:])
