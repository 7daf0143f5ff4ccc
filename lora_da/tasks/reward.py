"""Reward models: of two rows, the chosen one is to score higher than the rejected one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_da.errors import LoraDAError
from lora_da.model.forward import logits_of
from lora_da.samples.batch import NOT_FOR_THE_MODEL, Batch
from lora_da.samples.tokens import read_labelled_rows
from lora_da.tasks.classification import SequenceClassification
from lora_da.tasks.head import LossPass


@dataclass(frozen=True)
class RewardLoss:
    """The Bradley-Terry loss of pairs, as TRL's RewardTrainer computes it.

    `-logsigmoid(r_chosen − r_rejected − margin) + center_coefficient · (r_chosen + r_rejected)²`

    Args:
        center_coefficient: `center_rewards_coefficient` of its config; none if None.
    """

    center_coefficient: float | None = None


class Reward(SequenceClassification):
    """One number for each row. A document is a pair, with one loss token: a batch holds its chosen rows, then the
    rejected ones in the same order, and a `margin` of each pair if there is one.

    Args:
        model: a sequence classifier of one label.
        loss: what it is trained with.

    Raises:
        LoraDAError: another kind of model, or one without a padding token.
    """

    def __init__(self, model: PreTrainedModel, loss: RewardLoss) -> None:
        if model.num_labels != 1:
            raise LoraDAError(f"{type(model).__name__} has {model.num_labels} labels; a reward model has num_labels=1")
        super().__init__(model)
        self._loss = loss

    def read(self, inputs: Mapping[str, Any], limit: int) -> Batch:
        """The rows of a pair are put beside each other, so that they stay together where the batch is divided."""
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) % 2:
            seen = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else "none"
            raise LoraDAError(
                f"a batch of pairs has `input_ids` (2 · pairs, tokens), the chosen rows first, seen {seen}; use "
                "TRL's DataCollatorForPreference"
            )
        pairs = len(ids) // 2
        beside = torch.arange(2 * pairs, device="cpu").view(2, pairs).T.flatten()  # chosen, rejected, chosen, …
        ordered = {k: self._ordered(k, v, beside) for k, v in inputs.items() if k not in NOT_FOR_THE_MODEL}
        tokens = read_labelled_rows(ordered, torch.ones(pairs, dtype=torch.bool, device="cpu"), limit)
        return Batch(ordered, tokens, by_row=frozenset({"margin"}), rows_of_document=2).counted_rows()

    def backward(self, batch: Batch, inputs: dict[str, Any], how: LossPass) -> Tensor:
        with how.timed("forward"):
            rewards = logits_of(self.model(**inputs), with_loss=False).squeeze(-1)  # (rows,)
        with how.timed("head"):
            chosen, rejected = rewards.float().view(-1, 2).unbind(1)
            ahead = chosen - rejected
            if batch.inputs.get("margin") is not None:
                ahead = ahead - batch.inputs["margin"][::2].to(ahead.device)
            of_pairs = -torch.nn.functional.logsigmoid(ahead)
            if self._loss.center_coefficient is not None:
                of_pairs = of_pairs + self._loss.center_coefficient * (chosen + rejected).square()
            total = of_pairs[: batch.tokens.n_documents].sum()  # all of them, or none
        if total.requires_grad:
            with how.timed("backward"):
                (total * how.scale).backward()
        return total.detach()

    @staticmethod
    def _ordered(name: str, value: Any, beside: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        if name == "margin" and value.shape == (len(beside) // 2,):
            return value.repeat_interleave(2)
        if value.dim() == 2 and len(value) == len(beside):
            return value[beside]
        raise LoraDAError(
            f"`{name}` has shape {tuple(value.shape)}, which does not fit {len(beside) // 2} pairs of rows"
        )
