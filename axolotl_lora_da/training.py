"""What must hold of a run before LoRA-DA may initialise its adapter. Only training asks: a merge or a chat need not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_da.errors import LoraDAError

SUPERVISED = "LoRA-DA estimates on the loss of supervised fine-tuning"
OWN_LOSS = f"{SUPERVISED}, and the run would train another loss than its adapter was initialised for"

# A set key on the left cannot be served, for the reason on the right.
REFUSED = {
    "rl": f"{SUPERVISED}, and a start away from zero would make the reference model differ from the policy at step 0; "
    "fine-tune first and go on from that adapter with lora_model_dir",
    "process_reward_model": SUPERVISED,
    "tiled_mlp": "it cuts a sequence into pieces that LoRA-DA cannot match to their tokens; unset it",
    "use_eaft": OWN_LOSS,
    "use_dft": OWN_LOSS,
    "liger_use_token_scaling": OWN_LOSS,  # weighs a token by its own probability
}
# Sizes of groups of processes of which each holds a part: of a sequence, of a layer, of the experts. 1 is no group.
REFUSED_ABOVE_ONE = {
    "context_parallel_size": "each process would see a part of every sequence; unset it",
    "sequence_parallel_degree": "each process would see a part of every sequence; unset it",
    "tensor_parallel_size": "each process would hold a part of every layer; unset it",
    "expert_parallel_size": "each process would hold some of the experts only; unset it",
}
PLAIN_INITS = (None, True, "gaussian")
# Whose compute_loss leaves the loss to the model. Others (distillation, diffusion) make a loss LoRA-DA never sees.
PLAIN_LOSS = ("transformers.trainer", "axolotl.core.trainers.base")
PAIRS_LOSS = "trl.trainer.reward_trainer"  # of `reward_model`, which LoRA-DA estimates too


def check_training(cfg: Mapping[str, Any], trainer: Any) -> None:
    """Refuses what LoRA-DA cannot serve.

    Raises:
        LoraDAError: the message names the key of the config.
    """
    adapter = cfg.get("adapter")
    if adapter not in ("lora", "qlora"):
        raise LoraDAError(f"adapter is {adapter!r}; LoRA-DA initialises LoRA adapters: set adapter: lora, or qlora")
    for key, reason in REFUSED.items():
        if cfg.get(key):
            raise LoraDAError(f"{key} is set, which LoRA-DA cannot serve: {reason}")
    for key, reason in REFUSED_ABOVE_ONE.items():
        if (cfg.get(key) or 1) > 1:
            raise LoraDAError(f"{key} is {cfg[key]}, which LoRA-DA cannot serve: {reason}")
    init = cfg.get("peft_init_lora_weights")
    if init not in PLAIN_INITS:
        raise LoraDAError(
            f"peft_init_lora_weights is {init!r}; LoRA-DA is the initialisation here and leaves the base as it is: "
            "unset it, or set true or gaussian"
        )
    if (cfg.get("peft") or {}).get("loftq_config"):
        raise LoraDAError("peft.loftq_config is set, which is an initialisation as LoRA-DA is; unset it")
    _check_loss(trainer)


def _check_loss(trainer: Any) -> None:
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise LoraDAError(f"the trainer has a compute_loss_func of its own, which LoRA-DA cannot serve: {OWN_LOSS}")
    owner = next((cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls)), None)
    if owner is not None and owner.__module__ not in (*PLAIN_LOSS, PAIRS_LOSS):
        raise LoraDAError(f"{owner.__name__} computes a loss of its own, which LoRA-DA cannot serve: {OWN_LOSS}")
