"""Tiny random reward models, pairs of rows, and what the oracle makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from classifiers import classifier, texts
from task_oracle import Unit
from torch import Tensor, nn
from transformers import PreTrainedModel

CENTER = 0.3


def reward_model(kind: str = "Llama", **config: Any) -> PreTrainedModel:
    return classifier(kind, num_labels=1, **config)


def pairs(count: int = 7, margins: bool = False) -> list[Unit]:
    chosen, rejected = texts(count, 1), texts(count, 2)
    margin = torch.linspace(-1, 2, count)
    return [
        {"chosen": c, "rejected": r, **({"margin": m} if margins else {})}
        for c, r, m in zip(chosen, rejected, margin, strict=True)
    ]


def pad(batch: Sequence[Unit], extra: int = 0) -> dict[str, Tensor]:
    """Stack rows as TRL's collator does: the chosen ones, then the rejected ones."""
    rows = [row["chosen"] for row in batch] + [row["rejected"] for row in batch]
    ids = torch.nn.utils.rnn.pad_sequence([*rows, torch.zeros(max(map(len, rows)) + extra).long()], True)[:-1]
    margin = {"margin": torch.stack([row["margin"] for row in batch])} if "margin" in batch[0] else {}
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), **margin}


def in_batches(found: Sequence[Unit], size: int, extra: int = 0) -> list[dict[str, Tensor]]:
    return [pad(found[first : first + size], extra) for first in range(0, len(found), size)]


def losses(center: float) -> Callable[[nn.Module, Unit], Tensor]:
    def of(twin: nn.Module, pair: Unit) -> Tensor:
        chosen, rejected = (twin(input_ids=pair[name][None]).logits[0, 0] for name in ("chosen", "rejected"))
        ahead = chosen - rejected - (pair["margin"].double() if "margin" in pair else 0)
        return (torch.log1p(torch.exp(-ahead)) + center * (chosen + rejected) ** 2)[None]

    return of
