"""Cells differ in their start alone, and leave the base as it was."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from letters import SWEEP, sweep
from peft import get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.errors import BenchmarkError
from benchmarks.qlora import lora_config
from benchmarks.quality import run
from benchmarks.quality.corpora import split_rows
from benchmarks.quality.exact_match import exact_match
from benchmarks.quality.results import append, read
from benchmarks.quality.run import DTYPES, check_adapters

pytestmark = [pytest.mark.once, pytest.mark.slow]

BF16 = 2**-7  # rounding of products, relative to their size


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
@pytest.mark.parametrize("base", ["nf4", "twin"])
def test_starts_of_pefts_own_are_trained(folder, request, method, base):
    runner = request.getfixturevalue("runner" if base == "nf4" else "twin_runner")
    cell = dataclasses.replace(sweep(folder).cells[0], start=method, method=method, base=base)
    before = {name: value.clone() for name, value in runner._model.state_dict().items()}
    result, _ = trained(runner, folder, cell)
    assert not result.diverged and result.own_base == (method != "eva")
    after = runner._model.state_dict()  # the runner's own base is as it was
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    again, _ = trained(runner, folder, dataclasses.replace(sweep(folder).cells[0], base=base))
    assert result.heldout[0][1] == pytest.approx(again.heldout[0][1], rel=0.1)  # another rounding of the base at most


@pytest.mark.parametrize("base", ["nf4", "twin"])
@pytest.mark.parametrize("adapters", DTYPES)
def test_adapters_are_trained_in_the_dtype_that_is_asked_for(folder, request, base, adapters):
    """Seen from the optimiser: whatever the trainer makes of them, in every step, and with the start's own values."""
    runner = request.getfixturevalue("runner" if base == "nf4" else "twin_runner")
    cells = {cell.start: cell for cell in sweep(folder, base=base, adapters=adapters).cells}
    steps: list[list[torch.Tensor]] = []

    def note(optimizer, _args, _kwargs):
        steps.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])

    hook = register_optimizer_step_pre_hook(note)
    try:
        result, _ = trained(runner, folder, cells["ours"], predict=False)
    finally:
        hook.remove()
    assert len(steps) == SWEEP["steps"] and result.prediction is None
    assert {p.dtype for step in steps for p in step} == {DTYPES[adapters]}
    rounded = [torch.equal(p.float(), p.bfloat16().float()) for p in steps[0]]
    assert all(rounded) if adapters == "bf16" else not any(rounded)


def test_adapters_of_another_dtype_are_refused(runner):
    model = get_peft_model(runner._model, lora_config(2))
    try:
        check_adapters(model, "float32")
        next(p for p in model.parameters() if p.requires_grad).data = torch.zeros(2, dtype=torch.bfloat16)
        for adapters in DTYPES:
            with pytest.raises(BenchmarkError, match=f"torch.bfloat16.*; the cell asks for {adapters}"):
                check_adapters(model, adapters)
    finally:
        model.unload()


def test_a_twin_is_trained_as_its_quantised_base_is(folder, runner, twin_runner):
    cell = dataclasses.replace(sweep(folder).cells[0], adapters="float32")
    nf4, _ = trained(runner, folder, cell, predict=False)
    twin, _ = trained(twin_runner, folder, dataclasses.replace(cell, base="twin"), predict=False)
    assert twin.base_loss == pytest.approx(nf4.base_loss, rel=BF16)
    assert twin.train_loss == pytest.approx(nf4.train_loss, rel=BF16)
    assert twin.final == pytest.approx(nf4.final, rel=BF16)


@pytest.mark.parametrize("method", ["plain", "lora_da", "eva", "olora"])
def test_alpha_is_the_cells(data, runner, method):
    cell = dataclasses.replace(sweep(data).cells[0], method=method, alpha_over_r=0.5)
    rows = split_rows(sweep(data).corpora["letters"], runner._tokenizer, "development", 20, 4, 10, seed=0)
    model, _ = runner._start(rows, cell)()
    try:
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        assert {layer.scaling["default"] for layer in layers} == {0.5}
    finally:
        model.unload()


def test_all_held_out_rows_are_looked_at_where_it_is_asked_for(folder, runner):
    cells = sweep(folder, full_at=[0.4, 0.8], curve_rows=SWEEP["heldout_rows"]).cells
    result, _ = trained(runner, folder, cells[0], predict=False)
    assert [step for step, _ in result.full] == [2, 4, 5]  # of 5, and the end
    curve = dict(result.heldout)  # of the same rows here
    assert [loss for _, loss in result.full] == [curve[step] for step in (2, 4, 5)]
    assert result.full[-1][1] == result.final
    assert 0 < result.step_seconds < result.train_seconds / SWEEP["steps"]
    fewer, _ = trained(runner, folder, sweep(folder).cells[0], predict=False)
    assert fewer.full == [(5, result.final)] and fewer.heldout != result.heldout


@pytest.mark.parametrize("method", ["plain", "lora_da"])
def test_a_frozen_A_stays_as_it_is_started(folder, twin_runner, method):
    cell = dataclasses.replace(sweep(folder).cells[0], method=method, base="twin", settings={"frozen_A": True})
    steps: list[list[torch.Tensor]] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, _args, _kwargs: steps.append([p for g in optimizer.param_groups for p in g["params"]])
    )
    try:
        trained(twin_runner, folder, cell, predict=False)
    finally:
        hook.remove()
    assert {p.shape[1] for p in steps[-1]} == {cell.rank}  # the optimiser has every lora_B, (o, r), and nothing else
    assert len(steps[-1]) == 14


@pytest.mark.parametrize("unclipped", [False, True])
def test_gradients_are_clipped_unless_a_start_asks_otherwise(folder, twin_runner, unclipped):
    """At an A that is so large that those of lora_B are."""
    settings = {"A_times": 1e4, "unclipped": unclipped}
    cell = dataclasses.replace(sweep(folder).cells[0], method="plain", base="twin", settings=settings)
    norms: list[float] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, _args, _kwargs: norms.append(
            math.sqrt(sum(p.grad.square().sum().item() for g in optimizer.param_groups for p in g["params"]))
        )
    )
    try:
        trained(twin_runner, folder, cell, predict=False)
    finally:
        hook.remove()
    assert norms[0] > 10 if unclipped else norms[0] == pytest.approx(1, rel=0.01)  # bf16's digits


def test_answers_are_generated_by_the_trained_model(folder, runner):
    rows: list[Any] = []
    cell = dataclasses.replace(sweep(folder).cells[0], exact_match_rows=3)

    def noting(model, tokenizer, asked):
        rows.extend(asked)
        assert any(name.endswith("lora_B.default.weight") and p.any() for name, p in model.named_parameters())
        return exact_match(model, tokenizer, asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "exact_match", noting)
        result, _ = trained(runner, folder, cell, predict=False)
    assert len({tuple(row["input_ids"]) for row in rows}) == 3
    assert result.exact_match in (0, 1 / 3, 2 / 3, 1)
    assert trained(runner, folder, sweep(folder).cells[0], predict=False)[0].exact_match is None
