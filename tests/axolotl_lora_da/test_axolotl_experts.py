"""`lora_target_parameters` in Axolotl, trained for real: the experts at step 0 are those of the PEFT call."""

from __future__ import annotations

import pytest
from tolerances import REBATCHED

pytest.importorskip("axolotl", reason="Axolotl is not installed")

from axolotl_runs import Project, difference
from stacks import TARGETS, stacked

pytestmark = [pytest.mark.axolotl, pytest.mark.slow, pytest.mark.filterwarnings("default")]

LAYERS = 4 + 2 * 4 * 4  # of the attention in four blocks, and two matrices of four experts in each


@pytest.mark.compat("axolotl-target-parameters")
@pytest.mark.parametrize(
    ("family", "changes"),
    [("Qwen3Moe", {}), ("GptOss", {"gradient_checkpointing": True})],
    ids=["Qwen3Moe", "GptOss, checkpointed"],
)
def test_experts_start_as_by_the_peft_call(tmp_path, family, changes):
    project = Project(tmp_path, stacked(family))
    targets = {"lora_target_modules": ["o_proj"], "lora_target_parameters": TARGETS}
    run = project.run("run", lora_target_linear=None, lora_dropout=0.0, **targets, **changes)
    assert run.lines() == [f"LoRA-DA: initialised {LAYERS} of {LAYERS}"]
    assert run.steps == 1
    assert difference(run.adapter(), project.by_hand(target_modules=["o_proj"], target_parameters=TARGETS)) < REBATCHED
