"""Tiny random encoder-decoders, sources with targets, and what the oracle makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from classifiers import texts
from models import IGNORED, VOCABULARY, seeded, with_lora
from peft import PeftModel
from task_oracle import Unit, cross_entropy
from tiny_configs import tiny_config
from torch import Tensor, nn
from transformers import PreTrainedModel

IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {**IDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
BART = {
    **IDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "T5": {**T5, "decoder_start_token_id": 0},
    "T5, gated": {**T5, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "Bart": BART,
    "M2M100": {},
    "Blenderbot": {},
    "T5Gemma": {"decoder_start_token_id": 1},  # what its own forward begins with
}


def translator(kind: str, **config: Any) -> PreTrainedModel:
    name = kind.partition(",")[0]
    made = tiny_config(getattr(transformers, f"{name}Config"), **{**MODELS[kind], **config})
    return seeded(getattr(transformers, f"{name}ForConditionalGeneration"), made)


def adapted(base: PreTrainedModel, **lora: Any) -> PeftModel:
    return with_lora(base, task_type="SEQ_2_SEQ_LM", **lora)


def pairs(count: int = 7, seed: int = 0) -> list[Unit]:
    """A source of random length and a target of another."""
    return [
        {"input_ids": source, "labels": target}
        for source, target in zip(texts(count, seed), texts(count, seed + 99, 2, 9), strict=True)
    ]


def of_one_length(count: int = 6, length: int = 8) -> list[Unit]:
    """Sources and targets are of one length, so that no shape tells an encoder's tokens from a decoder's."""
    sources, targets = texts(count, 1, length, length), texts(count, 2, length, length)
    return [{"input_ids": source, "labels": target} for source, target in zip(sources, targets, strict=True)]


def pad(rows: Sequence[Unit], source_extra: int = 0, target_extra: int = 0) -> dict[str, Tensor]:
    def filled(name: str, fill: int, extra: int) -> Tensor:
        width = max(len(row[name]) for row in rows) + extra
        return torch.stack([torch.cat([r[name], r[name].new_full((width - len(r[name]),), fill)]) for r in rows])

    ids = filled("input_ids", 0, source_extra)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": filled("labels", IGNORED, target_extra)}


def in_batches(rows: Sequence[Unit], size: int, **extra: int) -> list[dict[str, Tensor]]:
    return [pad(rows[first : first + size], **extra) for first in range(0, len(rows), size)]


def losses(twin: nn.Module, unit: Unit) -> Tensor:
    """The decoder is started by its start token and fed the target, each label predicted from those before."""
    start = torch.tensor([twin.config.decoder_start_token_id])
    fed = torch.cat([start, unit["labels"][:-1]]).clamp_min(0)
    logits = twin(input_ids=unit["input_ids"][None], decoder_input_ids=fed[None]).logits[0]
    return cross_entropy(logits, unit["labels"])
