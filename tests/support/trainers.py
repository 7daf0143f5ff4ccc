"""Small SFTTrainers and Trainers on tiny models, and what is seen of them at their first step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, WIDE, adapter_weights, lora, pad, tiny_llama, with_lora
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from words import word_tokenizer

from lora_da import LoraDAConfig, initialize_lora_da_weights

BATCH_SIZE = 4
KINDS = ("unquantised", "4-bit", "8-bit")

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
NUMBERED = tuple(f"w{i}" for i in range(VOCABULARY - len(SPECIAL)))
# The assistant's words and the end of its turn carry loss.
MARKED_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + ' <eos>' }}{% endgeneration %}{{ ' ' }}{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for a word, as many as the tiny models know; padding is token 0."""
    return word_tokenizer([*SPECIAL, *NUMBERED], MARKED_TEMPLATE)


def sentences(count: int, seed: int = 0, longest: int = 8) -> list[list[str]]:
    """Random words, from two to `longest` of them each."""
    chance = random.Random(seed)
    return [chance.choices(NUMBERED, k=chance.randint(2, longest)) for _ in range(count)]


def base(folder: Path, kind: str = "unquantised", dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """The same random model every time, as loaded from disk."""
    if not (folder / "config.json").exists():
        tiny_llama(**WIDE).save_pretrained(folder)
    if kind != "unquantised":
        config["quantization_config"] = (
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
            if kind == "4-bit"
            else BitsAndBytesConfig(load_in_8bit=True)
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **config)


# What torch.compile does while it traces TRL's head.
COMPILING = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", r"ignore:The \.grad attribute of a Tensor:UserWarning"
)

COMMON = {
    "per_device_train_batch_size": BATCH_SIZE,
    "learning_rate": 1e-2,
    "max_steps": 1,
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def in_its_words(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a trainer by the names that this version of transformers has for them."""
    if "activation_checkpointing" not in TrainingArguments.__dataclass_fields__:
        return args
    return {name.replace("gradient_checkpointing", "activation_checkpointing"): value for name, value in args.items()}


def sft(
    model: Any,
    rows: Any,
    output: Path,
    *callbacks: TrainerCallback,
    kind: type[SFTTrainer] = SFTTrainer,
    lora_config: LoraConfig | None = None,
    **args: Any,
) -> SFTTrainer:
    return kind(
        model=model,
        args=SFTConfig(output_dir=str(output), **in_its_words({**COMMON, "loss_type": "nll", **args})),
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=None if isinstance(model, PeftModel) else lora_config or lora(),
        callbacks=list(callbacks),
    )


def plain(
    model: nn.Module, rows: Any, output: Path, *callbacks: TrainerCallback, kind: type[Trainer] = Trainer, **args: Any
) -> Trainer:
    return kind(
        model=model,
        args=TrainingArguments(output_dir=str(output), **in_its_words({**COMMON, **args})),
        train_dataset=rows,
        data_collator=pad,
        callbacks=list(callbacks),
    )


class FirstStep(TrainerCallback):
    """What the first training step finds. List it after the initializer."""

    def __init__(self) -> None:
        self.adapter: dict[str, Tensor] = {}
        self.seen: dict[str, Any] = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.adapter:
            return
        self.adapter = adapter_weights(model)
        self.seen = {
            "torch": torch.get_rng_state().tolist(),
            "python": random.getstate(),
            "training": {name: module.training for name, module in model.named_modules()},
            "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
            "grad": [name for name, p in model.named_parameters() if p.grad is not None],
            "hooks": {
                name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), "forward" in vars(m))
                for name, m in model.named_modules()
            },
            "dropout": {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)},
            "config": model.config.to_dict(),
            "state": {k: v for k, v in vars(state).items() if k not in ("stateful_callbacks", "log_history")},
        }


def by_hand(
    model: nn.Module, rows: Any, config: LoraDAConfig, bf16: bool = True, batch_size: int = BATCH_SIZE
) -> dict[str, Tensor]:
    """The adapter of the PEFT call on rows of token ids and labels, batched without the trainer."""
    peft_model = model if isinstance(model, PeftModel) else with_lora(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        initialize_lora_da_weights(
            peft_model, DataLoader(list(rows), batch_size, collate_fn=pad), config, show_progress=False
        )
    return adapter_weights(peft_model)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal in every bit; `other` is first cast to the dtype of `one`."""
    assert one and set(one) == set(other)
    return all(torch.equal(one[name], other[name].to(one[name].dtype)) for name in one)


def steps(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """lora_B @ lora_A of each layer."""
    return {
        name: weights[name.replace("lora_A", "lora_B")].float() @ lora_A.float()
        for name, lora_A in weights.items()
        if "lora_A" in name
    }


def worst_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative difference of the layers' steps, or of their lora_A where both have no step yet."""
    first, second = steps(one), steps(other)
    assert first and set(first) == set(second)
    for name in first:
        if not (first[name].any() or second[name].any()):
            first[name], second[name] = one[name].float(), other[name].float()
    return max(((first[name] - second[name]).norm() / second[name].norm()).item() for name in first)
