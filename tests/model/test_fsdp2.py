"""FSDP2: parameters sharded over processes are gathered for the pass, written in place, and train on as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from many_cases import TIMEOUT, llama
from other_methods import METHODS
from planning import Way
from processes import launch
from sharded_cases import KEPT, MEASURED, MODELS, TO_MEASURE, WAYS, initialized
from tolerances import LOSS, TURNED
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from trainers import same_bits, worst_difference

from lora_da import LoraDAError
from lora_da.model.sharding import is_sharded


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run = launch(2, "sharded_cases.fsdp2", tmp_path_factory.mktemp("two"))
    assert run.code == 0, run.output
    return run.results


def check(results: list[dict[str, Any]], truth: dict[str, Any]) -> None:
    one, other = results
    assert same_bits(one["adapter"], other["adapter"])
    assert worst_difference(one["adapter"], truth["adapter"]) < TURNED
    assert one["loss"] == pytest.approx(truth["loss"], rel=LOSS)
    assert one["same parameters"]
    # the next training step is that of one process: gradients arrive, and change what they should
    assert not same_bits(one["adapter"], one["trained"])
    assert worst_difference(one["trained"], truth["trained"]) < TURNED


@pytest.mark.compat("fsdp2", "fsdp2-nf4")
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_sharded_model_gets_what_a_whole_one_gets(model: str, two: Any, tmp_path: Path) -> None:
    check([result[model] for result in two], initialized(MODELS[model](tmp_path), Way(cuts=3)))


@pytest.mark.compat("fsdp2")
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_whatever_the_plan(way: str, two: Any) -> None:
    check([result[way] for result in two], initialized(llama(), WAYS[way]))


@pytest.mark.compat("fsdp2")
@pytest.mark.slow
@pytest.mark.parametrize("model", TO_MEASURE)
def test_the_first_step_is_measured_alike(model: str, two: Any, tmp_path: Path) -> None:
    results, truth = (
        [result[f"measured, {model}"] for result in two],
        initialized(TO_MEASURE[model](tmp_path), Way(), **MEASURED),
    )
    check(results, truth)
    for result in results:
        assert [x for x, _ in result["tried"]] == pytest.approx([x for x, _ in truth["tried"]], rel=LOSS)
        assert [loss for _, loss in result["tried"]] == pytest.approx([loss for _, loss in truth["tried"]], rel=LOSS)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_whatever_the_method(method: str, two: Any) -> None:
    """Also those that read weights, which all processes gather for the one that solves a layer."""
    check([result[method] for result in two], initialized(llama(), Way(cuts=3), method=method))


@pytest.mark.slow
@pytest.mark.parametrize("method", KEPT)
def test_parameters_that_stay_gathered_are_written_too(method: str, two: Any) -> None:
    """FSDP2 with `reshard_after_forward` off; a pass without a backward would leave them as they were."""
    check([result[f"{method} kept"] for result in two], initialized(llama(), Way(cuts=3), method=method))


@pytest.mark.slow
def test_a_kept_solution_is_found_again(two: Any) -> None:
    for first, second in (result["cache"] for result in two):
        assert (first["from cache"], second["from cache"]) == (False, True)
        assert same_bits(first["adapter"], second["adapter"])
    check([result["cache"][1] for result in two], initialized(llama(), Way()))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["float32", "nf4 in bytes", "nf4 in bfloat16"])
def test_the_size_of_the_first_step_is_right_or_not_said(model: str, two: Any, tmp_path: Path) -> None:
    """Whether accelerate shards 4-bit weights depends on its version, and shards of those cannot be dequantised."""
    truth = initialized(MODELS[model](tmp_path), Way(cuts=3))["steps"]
    steps = two[0][model]["steps"]
    unknown = {name for name, step in steps.items() if step is None}
    assert unknown in (set(), set(steps)) and not (unknown and model == "float32")
    assert {name: step for name, step in steps.items() if name not in unknown} == pytest.approx(
        {name: step for name, step in truth.items() if name not in unknown}, rel=1e-3
    )


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_too(tmp_path: Path) -> None:
    run = launch(2, "sharded_cases.dies", tmp_path)
    assert run.code != 0 and run.seconds < TIMEOUT, "somebody waited"
    assert "the fault of one process" in run.output


@pytest.mark.refused("tensor-parallel")
def test_a_model_in_tensor_parallel_is_refused() -> None:
    model = llama()
    model.get_base_model()._tp_size = 2  # as transformers notes a `tp_plan`
    with pytest.raises(LoraDAError, match="^each layer of the model is divided over 2 processes .*without tp_plan"):
        is_sharded(model)


@pytest.mark.refused("fsdp1")
def test_fsdp1_is_refused() -> None:
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped._fsdp_wrapped_module = nn.Linear(2, 2)
    with pytest.raises(LoraDAError, match="fsdp_version: 2"):
        is_sharded(nn.Sequential(wrapped))
