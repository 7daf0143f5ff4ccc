"""The kinds of training that a model's statistics can be taken for."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from lora_da.errors import LoraDAError
from lora_da.tasks.causal import Causal
from lora_da.tasks.classification import SequenceClassification, TokenClassification
from lora_da.tasks.reward import Reward, RewardLoss
from lora_da.tasks.seq2seq import Seq2Seq
from lora_da.tasks.task import SUPPORTED, Task

__all__ = ["RewardLoss", "Task", "find_task"]


def find_task(model: nn.Module, reward: RewardLoss | None = None) -> Task:
    """What a model is trained for.

    Args:
        model: inside the PEFT model.
        reward: the loss, where a classifier is trained on pairs of rows; its own loss on its labels if None.

    Raises:
        LoraDAError: no transformers model, or one that is trained for something else.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise LoraDAError(f"{name} is not a transformers model; LoRA-DA reads the loss of one")
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    if model.loss_type == "ForSequenceClassification" and not is_encoder_decoder:
        return SequenceClassification(model) if reward is None else Reward(model, reward)
    if reward is not None:
        raise LoraDAError(f"{name} is no reward model: load AutoModelForSequenceClassification with num_labels=1")
    if model.loss_type == "ForTokenClassification" and not is_encoder_decoder:
        return TokenClassification(model)
    if model.get_output_embeddings() is None:
        raise LoraDAError(f"{name} has no language-model head (`get_output_embeddings()`); {SUPPORTED}")
    return Seq2Seq(model) if is_encoder_decoder else Causal(model)
