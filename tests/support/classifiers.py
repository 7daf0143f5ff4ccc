"""Tiny random classifiers of sequences and tokens, rows with labels, and what the oracle makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from architectures import ARCHITECTURES, BLOCKS, COMMON, SIZES
from models import IGNORED, PROJECTIONS, VOCABULARY, seeded, with_lora
from peft import PeftModel
from task_oracle import Unit, cross_entropy
from torch import Tensor, nn
from transformers import PreTrainedModel

K = 3  # labels
ENCODER = {**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, "cls_token_id": 1, "sep_token_id": 2}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "GPT2": {**COMMON, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 256},
    "Qwen2Moe": ARCHITECTURES["Qwen2Moe"].config,
    "Bert": ENCODER,
    "Roberta": ENCODER,
    "ModernBert": {**ENCODER, "local_attention": 4, "global_attn_every_n_layers": 2},
    "DistilBert": {**COMMON, "dim": 32, "hidden_dim": 48, "n_layers": BLOCKS, "n_heads": 4},
}
HEADS = ("score", "classifier")
# PEFT's "all-linear" includes the head of a token classifier and of DistilBERT, which it then cannot save beside the
# adapter.
LINEAR = {
    "Llama": PROJECTIONS,
    "GPT2": ["c_attn", "c_fc", "c_proj"],
    "Bert": ["query", "key", "value", "dense"],
    "Roberta": ["query", "key", "value", "dense"],
    "ModernBert": ["Wqkv", "Wo", "Wi"],
    "DistilBert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
}


def classifier(kind: str, head: str = "Sequence", **config: Any) -> PreTrainedModel:
    """`head` is Sequence or Token."""
    made = getattr(transformers, f"{kind}Config")(**{**MODELS[kind], "num_labels": K, **config})
    return seeded(getattr(transformers, f"{kind}For{head}Classification"), made)


def adapted(base: PreTrainedModel, **lora: Any) -> PeftModel:
    kind, _, head = type(base).__name__.partition("For")
    if head == "SequenceClassification" and kind != "DistilBert":
        return with_lora(base, task_type="SEQ_CLS", **lora)
    task = "SEQ_CLS" if head == "SequenceClassification" else "TOKEN_CLS"
    return with_lora(base, task_type=task, **{"target_modules": LINEAR[kind], **lora})


def texts(count: int, seed: int = 0, shortest: int = 4, longest: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    return [torch.randint(3, VOCABULARY, (int(n),), generator=generator) for n in lengths]


def single(count: int = 7, seed: int = 0) -> list[Unit]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": ids, "labels": torch.randint(K, (), generator=generator)} for ids in texts(count, seed)]


def several(count: int = 7, seed: int = 0) -> list[Unit]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": ids, "labels": torch.randint(2, (K,), generator=generator).float()} for ids in texts(count, seed)
    ]


def number(count: int = 7, seed: int = 0) -> list[Unit]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": ids, "labels": torch.randn((), generator=generator)} for ids in texts(count, seed)]


def tagged(count: int = 7, seed: int = 0) -> list[Unit]:
    """A label for about every second token, the first included."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for ids in texts(count, seed):
        labels = torch.randint(K, ids.shape, generator=generator)
        labels[1::2] = IGNORED
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def pad(rows: Sequence[Unit], left: bool = False, extra: int = 0) -> dict[str, Tensor]:
    """One batch; padding is token 0, and labels of tokens are padded too."""
    width = max(len(row["input_ids"]) for row in rows) + extra

    def filled(values: Tensor, fill: int) -> Tensor:
        filling = values.new_full((width - len(values),), fill)
        return torch.cat([filling, values] if left else [values, filling])

    per_token = rows[0]["labels"].shape == rows[0]["input_ids"].shape
    return {
        "input_ids": torch.stack([filled(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.stack([filled(torch.ones_like(row["input_ids"]), 0) for row in rows]),
        "labels": torch.stack([filled(row["labels"], IGNORED) if per_token else row["labels"] for row in rows]),
    }


def in_batches(rows: Sequence[Unit], size: int, **padding: Any) -> list[dict[str, Tensor]]:
    return [pad(rows[first : first + size], **padding) for first in range(0, len(rows), size)]


def losses(twin: nn.Module, unit: Unit) -> Tensor:
    """The losses that the documentation of transformers states, in float64, by hand."""
    logits, labels = twin(input_ids=unit["input_ids"][None]).logits[0], unit["labels"]
    if labels.shape == unit["input_ids"].shape:  # no row has as many tokens as there are labels to choose from
        return cross_entropy(logits, labels)
    if labels.dim() == 1:
        chances = logits.sigmoid()
        return -(labels.double() * chances.log() + (1 - labels.double()) * (1 - chances).log()).mean()[None]
    if labels.is_floating_point():
        return (logits - labels.double()).square()
    return cross_entropy(logits[None], labels[None])
