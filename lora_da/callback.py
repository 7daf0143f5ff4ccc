"""The `TrainerCallback` that both hosts attach: LoRA-DA after everything is loaded and before the first step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_da.collect import Planner, make_plan
from lora_da.config import LoraDAConfig
from lora_da.errors import LoraDAError
from lora_da.initialize import initialize_lora_da_weights, say
from lora_da.rate import largest_rate
from lora_da.report import InitReport
from lora_da.tasks import RewardLoss

SUPERVISED_LOSSES = (None, "nll", "chunked_nll")
# Sizes in accelerate's parallelism_config, and what above 1 they mean.
NOT_BY_SAMPLES = {
    "tp_size": "tensor parallelism divides each layer over processes",
    "cp_size": "context parallelism divides each row over processes",
    "sp_size": "sequence parallelism divides each row over processes",
}


class LoraDACallback(TrainerCallback):
    """Initialise the trainer's adapter when training begins. List it before callbacks that look at the initial weights.

    Resumed runs and adapters that carry trained weights are left alone, with a line that says so.

    Args:
        config: settings; the defaults if None.
        during: a context to estimate in, given the PEFT model: what the host must lift or open for the pass.
        plan: see `initialize_lora_da_weights`.
        offloading: makes the context in which the host moves activations off the device, given the PEFT model; see
            `initialize_lora_da_weights`.

    Attributes:
        report: what was done; None before training.
    """

    def __init__(
        self,
        config: LoraDAConfig | None = None,
        during: Callable[[PeftModel], AbstractContextManager[Any]] | None = None,
        plan: Planner = make_plan,
        offloading: Callable[[PeftModel], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.config = config or LoraDAConfig()
        self.report: InitReport | None = None
        self._during, self._plan, self._offloading = during, plan, offloading

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Initialise, print the line and save the report into `args.output_dir`.

        Raises:
            LoraDAError: the run is of a kind that LoRA-DA does not serve; the message says which and why.
        """
        refuse_unsupported(args)
        if state.global_step > 0:
            self.report = InitReport(skipped=f"training resumes at step {state.global_step}")
            if state.is_world_process_zero:
                say(self.report)
            return
        with _autocast(args), self.around(args, model):
            self.report = initialize_lora_da_weights(
                model,
                train_dataloader,
                self.config,
                show_progress=state.is_world_process_zero,
                reward=_reward_loss(args),
                plan=self._plan,
                step_rows=args.per_device_train_batch_size * args.gradient_accumulation_steps,
                offloading=partial(self.offloading, args, model),
                learning_rate=largest_rate(optimizer, args.learning_rate),
            )
        if self.report.skipped is None and state.is_world_process_zero:
            self.report.save(args.output_dir)

    def around(self, args: TrainingArguments, model: PeftModel) -> AbstractContextManager[Any]:
        """The context the pass runs in; hosts add theirs."""
        return contextlib.nullcontext() if self._during is None else self._during(model)

    def offloading(self, args: TrainingArguments, model: PeftModel) -> AbstractContextManager[Any]:
        """The context that activations are moved away in; hosts make theirs."""
        return contextlib.nullcontext() if self._offloading is None else self._offloading(model)


def refuse_unsupported(args: TrainingArguments) -> None:
    """Refuse training arguments under which the statistics would not be those of the training loss, or not complete.

    Raises:
        LoraDAError: nn.DataParallel, tensor, context or sequence parallelism, preference or RL training, a modified
            loss.
    """
    trainer = _trl_config(args)
    if trainer not in (None, "SFTConfig", "RewardConfig"):
        raise LoraDAError(
            f"{trainer}: LoRA-DA starts the adapter away from the base model, which this training takes as its "
            "reference (with the adapter disabled it would differ from the policy at step 0) or descends from by a "
            "loss that LoRA-DA does not estimate; use it for supervised fine-tuning or reward models"
        )
    if args.n_gpu > 1:
        raise LoraDAError(
            f"one process trains on {args.n_gpu} GPUs (nn.DataParallel), which LoRA-DA does not serve; launch one "
            "process for each (accelerate launch, torchrun), or set CUDA_VISIBLE_DEVICES=0"
        )
    _check_parallelism(args)
    if args.label_smoothing_factor:
        raise LoraDAError(
            f"label_smoothing_factor={args.label_smoothing_factor}: the model's own loss is not the training loss; "
            "set it to 0"
        )
    if getattr(args, "loss_type", None) not in SUPERVISED_LOSSES:
        raise LoraDAError(f"loss_type={args.loss_type!r}: LoRA-DA estimates the cross-entropy's gradient; set 'nll'")


def _reward_loss(args: TrainingArguments) -> RewardLoss | None:
    if _trl_config(args) != "RewardConfig":
        return None
    return RewardLoss(getattr(args, "center_rewards_coefficient", None))


def _trl_config(args: TrainingArguments) -> str | None:
    """The name of the config of TRL's that these arguments are, or are made of; None if they are none."""
    return next((c.__name__ for c in type(args).__mro__ if _is_trl_config(c)), None)


def _is_trl_config(cls: type) -> bool:
    return (
        cls.__module__.split(".")[0] == "trl" and cls.__name__.endswith("Config") and not cls.__name__.startswith("_")
    )


def _check_parallelism(args: TrainingArguments) -> None:
    parallelism = getattr(args, "parallelism_config", None)
    for name, what in NOT_BY_SAMPLES.items():
        if getattr(parallelism, name, 1) > 1:
            raise LoraDAError(
                f"parallelism_config.{name}={getattr(parallelism, name)}: {what}, and LoRA-DA divides the samples over "
                "the processes only; set it to 1, and use DDP, FSDP2 or DeepSpeed ZeRO"
            )


def _autocast(args: TrainingArguments) -> AbstractContextManager[Any]:
    """Mixed precision as the trainer applies it: its wrapper sits on a forward that the pass does not go through."""
    # Not `args.bf16` and `args.fp16`: `accelerate launch --mixed_precision` sets neither of them.
    if args.deepspeed_plugin is not None:
        return contextlib.nullcontext()  # it casts the model instead
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(args.device.type, dtype)
