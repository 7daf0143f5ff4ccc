"""DeepSpeed ZeRO on its CPU accelerator, set up by the Trainer from a config as users write it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from many_cases import ROWS, SAMPLES, Broken, fails_in, llama
from peft import PeftModel
from planning import ONE, Forced, Way
from pytest import MonkeyPatch
from settings import as_solved
from stacks import stacked, with_experts
from torch import Tensor, nn
from trainers import plain
from transformers import TrainerCallback, training_args

import lora_da.tasks.head
from lora_da.callback import LoraDACallback
from lora_da.collect.segment import SegmentRun
from lora_da.model.sharding import copied

SMALL_RATE = 1e-6  # a learning rate at which one step of Adam changes an entry by this much and no more


def config(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class Watch(TrainerCallback):
    """The adapter when training has begun and after each step, and DeepSpeed's own float32 copies of it."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Tensor]] = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._look(f"before step {state.global_step}", model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._look(f"after step {state.global_step}", model)

    def _look(self, when: str, model: nn.Module) -> None:
        lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
        self.found[when] = {name: copied(p) for name, p in lora.items()}
        if find_spec("deepspeed") is None:
            return
        from deepspeed.utils import safe_get_full_fp32_param

        self.found[f"{when}, float32"] = {name: safe_get_full_fp32_param(p) for name, p in lora.items()}


SCHEDULE = {  # begins at a rate of its own, and says nothing of where it goes
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": SMALL_RATE / 10,
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "total_num_steps": "auto",
    },
}


def settings(stage: int | None, **more: Any) -> dict[str, Any]:
    return {"deepspeed": {**config(stage), **more}, "use_cpu": False, "dataloader_pin_memory": False} if stage else {}


def trained(folder: Path, stage: int | None, way: Way = ONE, **args: Any) -> dict[str, Any]:
    """One step of training; without a stage, in one process and without DeepSpeed."""
    config = as_solved(samples=SAMPLES, population_size=1000, first_step=args.pop("first_step", "gamma"))
    initializer, watch = LoraDACallback(config, plan=Forced(way)), Watch()
    model = args.pop("model", llama)()
    if args.get("bf16") and stage is None:
        model = model.bfloat16()  # as DeepSpeed does it
        args = {}
    own = {"scheduler": args.pop("scheduler")} if "scheduler" in args else {}
    args = {"learning_rate": SMALL_RATE, **settings(stage, **own), **args}
    plain(model, ROWS, folder, initializer, watch, **args).train()
    report = initializer.report
    return {**watch.found, "loss": report.loss, "initialized": report.initialized, "rate": report.rate}


def experts() -> PeftModel:
    return with_experts(stacked("GptOss"))


FEW = 16  # loss tokens at a time in the head, which then runs more often in one process than in another
CASES: dict[str, tuple[int, Way, dict[str, Any]]] = {
    "ZeRO-1": (1, ONE, {}),
    "ZeRO-2": (2, ONE, {}),
    "ZeRO-3": (3, ONE, {}),
    "ZeRO-2, streamed": (2, Way(cuts=3), {}),
    "ZeRO-3, streamed": (3, Way(cuts=3), {}),
    "ZeRO-3, 3 passes": (3, Way(parts=3, cut=False), {}),
    "ZeRO-1 in bf16": (1, ONE, {"bf16": True}),
    "ZeRO-2 in bf16": (2, ONE, {"bf16": True}),
    "ZeRO-3 in bf16": (3, ONE, {"bf16": True}),
    "ZeRO-2, first step measured": (2, ONE, {"first_step": "measured"}),
    "ZeRO-3, first step measured": (3, ONE, {"first_step": "measured"}),
    "ZeRO-2, with DeepSpeed's schedule": (2, ONE, {"first_step": "measured", "scheduler": SCHEDULE}),
    "ZeRO-1, experts in one parameter": (1, ONE, {"model": experts}),
    "ZeRO-2, experts in one parameter": (2, Way(cuts=3), {"model": experts, "first_step": "measured"}),
}


def all_cases(folder: Path) -> dict[str, Any]:
    with MonkeyPatch.context() as patch:
        patch.setattr(lora_da.tasks.head, "CHUNK", FEW)
        # transformers asks for a GPU with bf16 where DeepSpeed needs none
        patch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
        return {name: trained(folder, stage, way, **args) for name, (stage, way, args) in CASES.items()}


def kept(folder: Path) -> dict[str, str]:
    """What is left of an adapter on experts in ZeRO-3."""
    initializer = LoraDACallback(as_solved(samples=SAMPLES, population_size=1000))
    plain(experts(), ROWS, folder, initializer, learning_rate=SMALL_RATE, **settings(3)).train()
    return initializer.report.left


def dies(folder: Path) -> None:
    with MonkeyPatch.context() as patch:
        fails_in(patch, SegmentRun, "_run_top", 1, Broken("the fault of one process"))
        trained(folder, 3)
