"""Several processes: each takes its share, all write the same bits, and what one meets, all meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from many_cases import CASES, FAULTS, ROWS, TIMEOUT, cached, initialized, llama, trained
from models import batches
from planning import Way
from processes import Run, launch
from tolerances import LOSS, TURNED
from trainers import same_bits, worst_difference


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The truth: the same cases in this process alone."""
    return {name: case(tmp_path_factory.mktemp("alone")) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return _results(launch(2, "many_cases.everything", tmp_path_factory.mktemp("two")))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return _results(launch(4, "many_cases.one_case", tmp_path_factory.mktemp("four")))


def _results(run: Run) -> list[dict[str, Any]]:
    assert run.code == 0, run.output
    return run.results


def check(results: list[dict[str, Any]], truth: dict[str, Any]) -> None:
    """The same bits in every process, the result of one process within rounding, each layer solved once."""
    first = results[0]
    for other in results[1:]:
        assert same_bits(first["adapter"], other["adapter"])
        assert other["counts"] == first["counts"] and other["layer tokens"] == first["layer tokens"]
    assert worst_difference(first["adapter"], truth["adapter"]) < TURNED
    assert first["counts"] == truth["counts"] and first["layer tokens"] == truth["layer tokens"]
    assert first["loss"] == pytest.approx(truth["loss"], rel=LOSS)
    assert dict(first["gradient norms"]) == pytest.approx(dict(truth["gradient norms"]), rel=LOSS)
    if first["tried"] is not None:
        for lengths, losses in zip(*(zip(*found["tried"], strict=True) for found in (first, truth)), strict=True):
            assert lengths == pytest.approx(losses, rel=LOSS)
    solved = [name for result in results for name in result["solved"]]
    assert sorted(solved) == truth["solved"]
    assert all(result["solved"] for result in results), "a process had nothing to solve"


@pytest.mark.compat("processes-2")
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_one_gives(case: str, two: Any, alone: dict[str, Any]) -> None:
    check([result[case] for result in two], alone[case])


@pytest.mark.compat("processes-4")
@pytest.mark.slow
def test_four_processes_give_what_one_gives(four: Any, alone: dict[str, Any]) -> None:
    check([result["one pass"] for result in four], alone["one pass"])


def test_other_samples_are_told_apart(alone: dict[str, Any]) -> None:
    """Another set of samples is outside the tolerance of these tests."""
    fewer = initialized(llama(), Way(), rows=batches(ROWS[1:], 3))
    assert worst_difference(fewer["adapter"], alone["one pass"]["adapter"]) > 10 * TURNED


@pytest.mark.slow
@pytest.mark.parametrize("stage", FAULTS)
def test_what_one_process_raises_all_raise(stage: str, two: Any) -> None:
    failing = 0 if stage == "data" else 1
    for rank, result in enumerate(two):
        message, left_behind = result["faults"][stage]
        assert "broken" in message and left_behind == []
        if rank != failing and stage != "data":
            assert "rank 1 of 2 failed" in message


@pytest.mark.slow
def test_after_a_fault_the_next_initialisation_is_whole(two: Any, alone: dict[str, Any]) -> None:
    check([result["faults"]["afterwards"] for result in two], alone["one pass"])


@pytest.mark.slow
def test_the_cache_is_read_and_written_for_all(two: Any, tmp_path: Path) -> None:
    one, other = (result["cache"] for result in two)
    truth = cached(tmp_path)
    for run, found in {"first": False, "second": True, "damaged": False}.items():
        assert one[run]["from cache"] == other[run]["from cache"] == truth[run]["from cache"] == found
        assert same_bits(one[run]["adapter"], one["first"]["adapter"])
        assert same_bits(one[run]["adapter"], other[run]["adapter"])
    assert one["second"]["solved"] == other["second"]["solved"] == []


@pytest.mark.slow
@pytest.mark.parametrize("place", ["borders", "pass", "segment"])
def test_memory_that_one_process_lacks_makes_all_batches_smaller(place: str, two: Any, alone: dict[str, Any]) -> None:
    check([result["memory"][place] for result in two], alone["3 segments"])


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return _results(launch(2, "many_cases.trained", tmp_path_factory.mktemp("trainers")))


@pytest.mark.compat("ddp-2")
@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["Trainer", "SFTTrainer"])
def test_trainers_start_every_replica_alike(trainer: str, trainers: Any, tmp_path: Path) -> None:
    one, other = (result[trainer] for result in trainers)
    truth = trained(tmp_path)[trainer]
    assert one["processes"] == 2 and truth["processes"] == 1
    assert one["counts"] == truth["counts"]
    assert same_bits(one["start"], other["start"])
    assert worst_difference(one["start"], truth["start"]) < TURNED
    assert one["hooks"] == truth["hooks"] and one["requires_grad"] == truth["requires_grad"]
    assert same_bits(one["end"], other["end"]) and not same_bits(one["end"], one["start"])


@pytest.mark.slow
def test_a_failing_process_ends_the_run_in_seconds(tmp_path: Path) -> None:
    run = launch(2, "many_cases.dies", tmp_path)
    assert run.code != 0 and run.seconds < TIMEOUT, "somebody waited"
    assert run.output.count("the fault of one process") >= 2, "each process says why"
