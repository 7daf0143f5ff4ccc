"""The initializer as TRL users pass it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments

from lora_da.callback import LoraDACallback


class LoraDAInitializer(LoraDACallback):
    """`SFTTrainer(..., peft_config=LoraConfig(...), callbacks=[LoraDAInitializer()])`

    The same with `RewardTrainer`, and with transformers' `Trainer` and `Seq2SeqTrainer` on a PEFT model. See
    `LoraDACallback` for arguments and errors.
    """

    def offloading(self, args: TrainingArguments, model: PeftModel) -> AbstractContextManager[Any]:
        if not getattr(args, "activation_offloading", False):
            return super().offloading(args, model)
        # The trainer opens its own context in training steps only; without one the pass may not fit.
        return _offloaded(model)


@contextmanager
def _offloaded(model: PeftModel) -> Iterator[None]:
    """TRL's context, which is left with nothing: where memory runs out it holds a graph that holds the context, in a
    circle that no collector sees."""
    from trl.models.activation_offloading import OffloadActivations

    offload = OffloadActivations()
    offload.update_model_params(model)
    try:
        with offload:
            yield
    finally:
        offload.tracker.clear()
