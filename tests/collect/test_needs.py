"""What the engine does for a method and what it does not: no sum that nobody reads, no backward pass without need."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from collecting import distance
from models import PREFIX, VOCABULARY, Stream, checkpoint, tiny_llama, with_lora
from oracle import projector
from other_methods import BATCHES, ROWS, TAKEN, WAYS, every_method, factors, start
from picture import content, differences, picture
from planning import Forced, Way
from tolerances import TURNED

import lora_da.methods.cntlora
import lora_da.solve
from lora_da import LoraDAConfig, LoraDAError, initialize_lora_da_weights
from lora_da.adapter import AdapterLayer
from lora_da.collect.plan import Plan
from lora_da.collect.survey import Survey
from lora_da.memory import GIB
from lora_da.methods import METHODS
from lora_da.statistics import InputSums, LayerSums


class Backward(Exception):
    """A backward pass, which nobody was to run."""


@pytest.fixture
def no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise Backward

    for owner, name in ((torch.Tensor, "backward"), (torch.autograd, "backward"), (torch.autograd, "grad")):
        monkeypatch.setattr(owner, name, refuse)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("no_backward")
def test_cntlora_runs_no_backward_and_keeps_no_graph(way: str) -> None:
    model = with_lora(tiny_llama())
    checkpoint(model.get_base_model())
    kept: list[bool] = []
    head = model.get_base_model().get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: kept.append(output.requires_grad))
    with torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        report = start(model, "cntlora", Forced(WAYS[way]))
    hook.remove()
    assert report.initialized == 14 and kept and not any(kept)


@pytest.mark.usefixtures("no_backward")
@pytest.mark.parametrize("method", [m for m in METHODS if m != "cntlora"])
def test_the_others_do(method: str) -> None:
    with pytest.raises(Backward):
        start(with_lora(tiny_llama()), method)


def test_cntlora_serves_a_layer_that_has_no_backward() -> None:
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    model = with_lora(tiny_llama())
    block = model.get_base_model().model.layers[0]
    block.mlp.register_forward_hook(lambda module, args, output: NoBackward.apply(output))
    assert start(model, "cntlora").initialized == 14


@every_method
def test_sums_that_nobody_reads_are_not_held(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, list[bool]] = {"xx": [], "dx": [], "dd": []}
    add_input, take_means = InputSums.add, LayerSums.take_means

    def add(self: InputSums, x: torch.Tensor) -> None:
        add_input(self, x)
        held["xx"].append(self.sigma_xx_ is not None)

    def look(self: LayerSums, *args: Any) -> Any:
        held["dx"].append(self.sigma_dx_ is not None)
        held["dd"].append(self.sigma_dd_ is not None)
        return take_means(self, *args)

    monkeypatch.setattr(InputSums, "add", add)
    monkeypatch.setattr(LayerSums, "take_means", look)
    start(with_lora(tiny_llama()), method)
    grad, cov, fisher = TAKEN[method]
    assert {k: set(v) for k, v in held.items()} == {"xx": {cov}, "dx": {grad}, "dd": {fisher}}


class Unmasked(Forced):
    """Masks, of which other rows have others, are no matrices."""

    def __call__(self, surveyed: Survey, *args: Any) -> Plan:
        return super().__call__(replace(surveyed, makes_masks=False), *args)


def test_the_plan_counts_what_is_taken() -> None:
    """The same model, so that what runs is the same: forecasts differ by the sums alone, or by what a solver takes."""
    i, o = 512, 64

    def planned(method: str, solving: int) -> int:
        changed = replace(METHODS[method].needs, solving=lambda i, o: solving)
        base = tiny_llama(hidden_size=o, intermediate_size=i, num_hidden_layers=1)
        planner = Unmasked(Way())
        start(with_lora(base, target_modules=["down_proj"]), replace(METHODS[method], needs=changed), planner)
        return planner.plans[0].device_bytes

    held = {"lora_da": i * o + i * i + o, "filet": i * i + o * o, "cntlora": i * i, "lora_one": i * o, "lora_ga": i * o}
    for method in METHODS:
        less = planned("lora_da", 0) - planned(method, 0)
        if method == "cntlora":  # no activations of the whole model either
            assert less >= 4 * (held["lora_da"] - held[method])
        else:
            assert less == 4 * (held["lora_da"] - held[method]), method
        assert planned(method, GIB) == GIB + 4 * held[method]


def test_a_forward_pass_is_planned_with_one_blocks_activations() -> None:
    """However many blocks there are; a backward pass keeps those of all."""
    found = {}
    for method in ("cntlora", "lora_ga"):
        for blocks in (2, 16):
            model = with_lora(tiny_llama(num_hidden_layers=blocks), target_modules=r".*layers\.0\.self_attn\.q_proj")
            planner = Forced(Way())
            start(model, method, planner)
            found[method, blocks] = planner.plans[0].device_bytes
    assert found["cntlora", 16] == found["cntlora", 2] <= found["lora_ga", 2]
    assert found["lora_ga", 16] > 2 * found["lora_ga", 2]


@pytest.mark.parametrize("stage", ["forward", "solve"])
@pytest.mark.parametrize("way", WAYS)
def test_cntlora_goes_on_where_memory_runs_out(
    way: str, stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, model, calls = with_lora(tiny_llama()), with_lora(tiny_llama()), [0]
    start(expected, "cntlora")
    owner, name = (InputSums, "add") if stage == "forward" else (lora_da.methods.cntlora, "cntlora")
    original = getattr(owner, name)

    def full(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)
    with caplog.at_level(logging.WARNING, "lora_da"):
        if stage == "solve":  # on the CPU there is nowhere to go
            with pytest.raises(LoraDAError, match="layer .* does not fit in the CPU's memory to be solved"):
                start(model, "cntlora", Forced(WAYS[way]))
            return
        assert start(model, "cntlora", Forced(WAYS[way])).initialized == 14
    assert any("out of memory" in record.message for record in caplog.records)
    for layer, (a, _) in factors(expected).items():
        assert distance(projector(factors(model)[layer][0].T), projector(a.T)) <= TURNED


def test_filet_leaves_layers_that_are_too_wide_for_a_full_fisher(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lora_da.solve, "WIDEST_FULL_FISHER", 48)
    model = with_lora(tiny_llama(), target_modules=["lm_head", "up_proj"])
    before = content(model.get_base_model().lm_head.lora_A["default"].weight)
    with caplog.at_level(logging.WARNING, "lora_da"):
        report = start(model, "filet")
    reason = f"method filet needs its full output Fisher, {VOCABULARY} × {VOCABULARY}"
    assert report.left == {f"{PREFIX}lm_head": reason} and (report.initialized, report.targeted) == (2, 3)
    assert content(model.get_base_model().lm_head.lora_A["default"].weight) == before
    assert any(reason in record.getMessage() for record in caplog.records)
    assert start(with_lora(tiny_llama(), target_modules=["lm_head", "up_proj"]), "lora_ga").initialized == 3
    with pytest.raises(LoraDAError, match="cannot serve 1 targeted .*full output Fisher.*use another method"):
        start(with_lora(tiny_llama(), target_modules=["lm_head"]), "filet")


@pytest.mark.parametrize("method", ["filet", "cntlora"])
def test_a_weight_that_cannot_be_read_is_named(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterLayer, "weight", lambda layer: None)
    model = with_lora(tiny_llama())
    before = picture(model)
    with pytest.raises(
        LoraDAError, match=f"serve 14 targeted .*method {method} needs its weight, which PEFT cannot dequantise"
    ):
        start(model, method)
    assert differences(before, picture(model)) == []


@every_method
def test_the_size_of_the_training_set_is_not_asked_for(method: str) -> None:
    def rows() -> Iterator[dict[str, torch.Tensor]]:
        yield from BATCHES

    for data in (rows(), torch.utils.data.DataLoader(Stream(BATCHES), batch_size=None)):
        config = LoraDAConfig(method=method, samples=len(ROWS))
        report = initialize_lora_da_weights(with_lora(tiny_llama()), data, config, show_progress=False)
        assert report.initialized == 14 and report.population_size is None
    with pytest.raises(LoraDAError, match="set `population_size`"):
        initialize_lora_da_weights(with_lora(tiny_llama()), rows(), LoraDAConfig(samples=8), show_progress=False)
