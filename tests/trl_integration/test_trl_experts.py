"""SFTTrainer on experts that are slices of one parameter: the start is that of the PEFT call on the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from models import adapter_weights, documents, lora, with_lora
from settings import as_solved
from stacks import TARGETS, stacked
from tolerances import REBATCHED

pytest.importorskip("trl", reason="TRL is not installed")

from trainers import FirstStep, by_hand, same_bits, sft, worst_difference

from trl_integration import LoraDAInitializer

ROWS = documents(16)
CONFIG = as_solved(samples=10)
LORA = {"r": 2, "target_modules": ["o_proj"], "target_parameters": TARGETS}


@pytest.mark.compat("sft", "target-parameters")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_experts_start_as_by_the_peft_call(family: str, checkpointing: bool, tmp_path: Path) -> None:
    """Trained by the implementation that is transformers' own choice."""
    model, expected = (stacked(family, experts_implementation=None) for _ in range(2))
    chosen, first, initializer = model.config._experts_implementation, FirstStep(), LoraDAInitializer(CONFIG)
    rows = Dataset.from_list(ROWS)
    settings = {"gradient_checkpointing": checkpointing, "bf16": False, "max_steps": 2}
    trainer = sft(model, rows, tmp_path, initializer, first, lora_config=lora(**LORA), **settings)
    trainer.train()
    report = initializer.report
    assert report.initialized + len(report.left) == report.targeted == 4 + 2 * 4 * 4
    by_call = by_hand(with_lora(expected, **LORA), ROWS, CONFIG, bf16=False)
    assert worst_difference(first.adapter, by_call) < REBATCHED
    assert chosen != "eager" and trainer.model.config._experts_implementation == chosen
    assert not same_bits(adapter_weights(trainer.model), first.adapter)  # it trains
