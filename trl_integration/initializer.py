"""The initializer as TRL users pass it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments

from lora_da.callback import LoraDACallback


class LoraDAInitializer(LoraDACallback):
    """`SFTTrainer(..., peft_config=LoraConfig(...), callbacks=[LoraDAInitializer()])`

    The same with `RewardTrainer`, and with transformers' `Trainer` and `Seq2SeqTrainer` on a PEFT model. See
    `LoraDACallback` for arguments and errors.
    """

    def around(self, args: TrainingArguments, model: PeftModel) -> AbstractContextManager[Any]:
        if not getattr(args, "activation_offloading", False):
            return super().around(args, model)
        # The trainer opens its own offloading context in training steps only; without one the pass may not fit.
        from trl.models.activation_offloading import OffloadActivations

        offload = OffloadActivations()
        offload.update_model_params(model)
        return offload
