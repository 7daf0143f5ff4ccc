"""Cells differ in their start alone, and leave the base as it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from letters import SWEEP, sweep

from benchmarks.quality import run
from benchmarks.quality.results import append, read

pytestmark = [pytest.mark.once, pytest.mark.slow]


def trained(runner, folder, cell, predict=True):
    """The result of a cell, and the batches that were trained on."""
    batches: list[list[list[int]]] = []
    original = run.collate

    def noting(rows):
        batches.append([row["input_ids"] for row in rows])
        return original(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_DA_DATA", str(folder))
        patch.setattr(run, "collate", noting)
        made = {"versions": {}, "hardware": "", "command": "", "commit": ""}
        result = runner.run(cell, sweep(folder).corpora["letters"], made, predict)
    return result, batches[-cell.steps :]


@pytest.fixture(scope="module")
def finished(folder, runner):
    """Run the sweep's first seed at the larger rate: results, batches by start, and whether the base is as before."""
    before = {name: value.clone() for name, value in runner._model.state_dict().items()}
    cells = [cell for cell in sweep(folder).cells if cell.seed == 3 and cell.rate == 0.01]
    runs = {cell.start: trained(runner, folder, cell) for cell in cells}
    after = runner._model.state_dict()
    same = after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    return {name: result for name, (result, _) in runs.items()}, {name: seen for name, (_, seen) in runs.items()}, same


def test_the_same_start_gives_the_same_run(finished):
    lines, _, _ = finished
    assert lines["plain"].heldout == lines["again"].heldout
    assert lines["plain"].train_loss == lines["again"].train_loss
    assert lines["plain"].heldout[1:] != lines["ours"].heldout[1:]


def test_all_starts_see_the_same_batches(finished):
    _, seen, _ = finished
    assert len(seen["plain"]) == SWEEP["steps"] and all(len(batch) == SWEEP["batch"] for batch in seen["plain"])
    assert seen["plain"] == seen["ours"]


def test_the_base_is_as_it_was(finished):
    assert finished[2]


def test_a_result_holds_what_happened(finished, tmp_path):
    plain, ours = finished[0]["plain"], finished[0]["ours"]
    append(tmp_path / "results.jsonl", ours)
    assert read([tmp_path / "results.jsonl"]).results == (ours,)
    assert [step for step, _ in ours.heldout] == list(range(SWEEP["steps"] + 1))
    assert len(ours.train_loss) == SWEEP["steps"]
    assert ours.initialized == 14 and plain.initialized is None
    assert ours.heldout[0][1] < plain.heldout[0][1]  # a step downhill
    assert plain.base_loss == ours.base_loss and ours.final != ours.heldout[-1][1]  # on more rows
    assert set(ours.accuracy) == {"heldout", "majority"}
    # rounding turns the sign of gradients next to zero, and they are stepped along by sign
    assert finished[0]["again"].prediction == pytest.approx(plain.prediction, rel=0.1)
    assert ours.prediction != pytest.approx(plain.prediction, rel=0.1)


@pytest.mark.parametrize("method", ["eva", "pissa", "olora", "orthogonal", "corda"])
def test_starts_of_pefts_own_are_trained(folder, runner, method):
    cell = dataclasses.replace(sweep(folder).cells[0], start=method, method=method)
    result, _ = trained(runner, folder, cell)
    assert not result.diverged and result.own_base == (method != "eva")
    again, _ = trained(runner, folder, sweep(folder).cells[0])
    assert again.base_loss == result.base_loss  # the runner's own base is as it was
    assert result.heldout[0][1] == pytest.approx(again.heldout[0][1], rel=0.1)  # another rounding of the base at most
