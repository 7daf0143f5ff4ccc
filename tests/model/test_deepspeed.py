"""DeepSpeed ZeRO 1 to 3, the real one on its CPU accelerator: its float32 copies are started too, so that the first
step goes on from the initialisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_cases import CASES, SMALL_RATE, trained
from many_cases import TIMEOUT
from processes import launch
from tolerances import TURNED
from trainers import same_bits, worst_difference

pytest.importorskip("deepspeed")

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run = launch(2, "deepspeed_cases.all_cases", tmp_path_factory.mktemp("two"), **ENVIRONMENT)
    assert run.code == 0, run.output
    return run.results


@pytest.mark.compat("zero-1", "zero-2", "zero-3")
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_adapter_and_its_master_copies_are_started(case: str, two: Any, tmp_path: Path) -> None:
    _, way, args = CASES[case]
    truth = trained(tmp_path, None, way, **args)
    one, other = (result[case] for result in two)
    begun = one["before step 0"]
    assert same_bits(begun, other["before step 0"])
    assert one["initialized"] == truth["initialized"]
    if args.get("first_step") == "measured":
        assert one["rate"].learning_rate == SMALL_RATE and one["rate"].times == truth["rate"].times > 1
    if "bf16" in args:  # rounds otherwise in other batches: as far from float32 as one process is, and no farther
        exact = trained(tmp_path, None, way)["before step 0"]
        assert worst_difference(begun, exact) < 2 * worst_difference(truth["before step 0"], exact)
    else:
        assert worst_difference(begun, truth["before step 0"]) < TURNED
    masters = one["before step 0, float32"]
    assert all(torch.equal(masters[name].to(begun[name].dtype), begun[name]) for name in begun)


@pytest.mark.compat("zero-1", "zero-2", "zero-3")
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_first_step_goes_on_from_there(case: str, two: Any) -> None:
    """Adam's first step moves each entry by the learning rate at most; undone, lora_B would be zero again."""
    result = two[0][case]
    before, after = result["before step 0, float32"], result["after step 1, float32"]
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert 0 < max(moved.values()) < 2 * SMALL_RATE
    assert all(after[name].abs().max() > 10 * SMALL_RATE for name in after if "lora_B" in name)


@pytest.mark.slow
def test_experts_in_one_parameter_keep_pefts_init_in_zero_3(tmp_path: Path) -> None:
    run = launch(2, "deepspeed_cases.kept", tmp_path, **ENVIRONMENT)
    assert run.code == 0, run.output
    for left in run.results:
        assert len(left) == 8 and set(left.values()) == {"a targeted parameter under DeepSpeed ZeRO-3"}


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_too(tmp_path: Path) -> None:
    run = launch(2, "deepspeed_cases.dies", tmp_path, **ENVIRONMENT)
    assert run.code != 0 and run.seconds < TIMEOUT, "somebody waited"
    assert "the fault of one process" in run.output
