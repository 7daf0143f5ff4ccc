"""Adapters on experts that are slices of one parameter (`target_parameters`): what is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_oracle import expert_truth, stacks_of
from judge import errors_of
from models import IGNORED, PREFIX, adapter_weights, documents, few_tokens, pad, with_lora
from oracle import OracleStatistics
from peft import PeftModel
from picture import differences, picture
from stacks import FAMILIES, ROWS, experts_of, initialize, stacked, with_experts, without_expert, wrappers
from tolerances import START, TURNED
from torch import Tensor
from trainers import same_bits, worst_difference

import lora_da.adapter.stacks
from lora_da import LoraDAConfig
from lora_da.adapter import find_adapter
from lora_da.collect.segment import SegmentRun


@pytest.mark.compat("target-parameters")
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_starts_where_lora_da_says(family: str, gaussian: bool) -> None:
    """What was solved is the oracle's solution, and PEFT's own product of the factors is what was solved."""
    base, units = stacked(family), sum(label != IGNORED for row in ROWS for label in row["labels"][1:])
    model = with_experts(stacked(family), init_lora_weights="gaussian" if gaussian else True)
    report = initialize(model)
    layers = {layer.name.removeprefix(PREFIX): layer for layer in find_adapter(model).layers}
    deltas, worst = experts_of(model), 0.0
    truth = expert_truth(base, ROWS, "tokens")
    assert truth.keys() == deltas.keys() & {name.removeprefix(PREFIX) for name in report.layers}
    for name, fields in truth.items():
        layer = layers[name]
        a, b = (factor.double() for factor in layer.factors())
        torch.testing.assert_close(deltas[name].double(), layer.scaling * b @ a, rtol=1e-5, atol=1e-9)
        tokens = report.layers[PREFIX + name].tokens
        statistics = OracleStatistics(**fields, n_tokens=tokens, n_samples=len(ROWS), n_loss_tokens=units)
        worst = max(worst, *errors_of(a, b, statistics, len(ROWS), gaussian))
    assert worst <= START


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("method", ["filet", "cntlora", "lora_one"])
def test_other_methods_read_the_experts_own_weights(family: str, method: str) -> None:
    """The step, where there is one, is told relative to the expert's own weight."""
    model = with_experts(stacked(family))
    report = initialize(model, LoraDAConfig(method=method, samples=len(ROWS)))
    assert report.initialized == report.targeted and report.failed == {}
    weights = dict(model.get_base_model().named_parameters())
    for name, wrapper in wrappers(model):
        weight = weights[next(key for key in weights if key.replace("base_layer.", "") == name)]
        delta = wrapper.get_delta_weight("default")
        for number in range(wrapper.num_experts):
            relative = (delta[number].norm() / weight[number].norm()).item()
            found = report.layers[f"{PREFIX}{name}.{number}"].relative_step
            assert found == pytest.approx(relative, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("gaussian", [False, True])
def test_the_plain_variance_is_that_of_what_peft_draws(gaussian: bool) -> None:
    model = with_experts(stacked("Mixtral", hidden_size=64), init_lora_weights="gaussian" if gaussian else True)
    layers = [layer for layer in find_adapter(model).layers if layer.slice is not None]
    drawn = torch.cat([(layer.factors()[0].square() / layer.plain_variance).flatten() for layer in layers])
    assert drawn.mean().item() == pytest.approx(1, rel=0.05)  # of thousands


@pytest.mark.compat("first-step", "target-parameters")
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_a_first_step_is_measured(family: str) -> None:
    model = with_experts(stacked(family))
    rows = few_tokens(documents(40))
    report = initialize(model, LoraDAConfig(samples=24, population_size=40), rows)
    assert report.first_step.length > 0 and report.first_step.loss_after < report.first_step.loss_before
    for name, delta in experts_of(model).items():
        assert delta.any() == (PREFIX + name in report.layers)


@pytest.mark.compat("cache")
def test_a_start_is_kept_and_used_again(tmp_path) -> None:
    """One expert without tokens is kept as such."""
    config = LoraDAConfig(samples=6, population_size=8, cache_dir=str(tmp_path))
    solved, read = without_expert(2), without_expert(2)
    first, second = initialize(solved, config), initialize(read, config)
    assert not first.from_cache and second.from_cache and second.left == first.left != {}
    assert same_bits(adapter_weights(solved), adapter_weights(read))
    other = with_experts(stacked("GptOss"))
    assert not initialize(other, config).from_cache


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_experts_own_implementation_is_put_aside_and_back(implementation: str) -> None:
    """The loss is the same in each, and so is the start."""
    eager, chosen = (
        with_experts(stacked("Mixtral", experts_implementation=kind)) for kind in ("eager", implementation)
    )
    reports = [initialize(model) for model in (eager, chosen)]
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-5)
    batch = pad(ROWS)
    with torch.no_grad(), chosen.disable_adapter():
        assert chosen(**batch).loss.item() == pytest.approx(reports[1].loss, rel=1e-5)
    assert worst_difference(adapter_weights(chosen), adapter_weights(eager)) < TURNED
    assert chosen.config._experts_implementation == implementation


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither after a run nor after an exception."""
    model = with_experts(stacked("Mixtral", experts_implementation="grouped_mm"))
    before = picture(model)

    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        patch.setattr(SegmentRun, "_run_top", broken)
        initialize(model)
    assert differences(before, picture(model)) == []
    initialize(model)
    changed = differences(before, picture(model))
    assert changed and all("lora_" in name and name.endswith("bits") for name in changed)


def test_parameters_of_one_matrix_are_layers() -> None:
    """PEFT takes any matrix: a router's, which is no layer's, and a linear layer's, which starts as that layer does."""
    by_parameter = with_lora(
        stacked("Mixtral"), target_modules=[], target_parameters=["mlp.gate.weight", "q_proj.weight"], r=2
    )
    by_module = with_lora(stacked("Mixtral"), target_modules=["q_proj"], r=2)
    config = LoraDAConfig(samples=len(ROWS), chosen_rows=1, first_step="gamma")  # random rows go by the layer's name
    report = initialize(by_parameter, config)
    initialize(by_module, config)
    assert report.initialized == report.targeted == 8
    assert report.layers[f"{PREFIX}model.layers.0.mlp.gate.weight"].relative_step > 0
    of_parameters = {name: value for name, value in adapter_weights(by_parameter).items() if "q_proj" in name}
    assert same_bits(adapter_weights(by_module), of_parameters)


@pytest.mark.compat("quantised-experts")
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_quantised_experts_start_as_their_dequantised_twin(family: str, tmp_path) -> None:
    """By bitsandbytes' parametrisation, which Axolotl's `quantize_moe_experts` puts on; with the measured step and the
    cache. One parameter of each module: of two, PEFT alone passes over the inner one's adapter."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    if not lora_da.adapter.stacks._comes_off():
        pytest.skip("this PEFT cannot train them")

    def quantised() -> tuple[PeftModel, dict[str, Tensor]]:
        base = stacked(family, hidden_size=64)
        stacks = stacks_of(base)
        for module in stacks.values():
            replace_parameter_4bit(module, "gate_up_proj", compress_statistics=True)
        values = {f"{name}.gate_up_proj": module.gate_up_proj for name, module in stacks.items()}
        return with_experts(base, target_parameters=list(values)), values

    ours, values = quantised()
    twin = stacked(family, hidden_size=64)
    for name, value in values.items():
        twin.get_parameter(name).data.copy_(value)
    twin = with_experts(twin, target_parameters=["mlp.experts.gate_up_proj"])
    rows, config = few_tokens(documents(24)), LoraDAConfig(samples=16, population_size=24, cache_dir=str(tmp_path))
    reports = [initialize(model, config, rows) for model in (ours, twin)]
    assert reports[0].left == reports[1].left and reports[0].failed == {} and reports[0].first_step.length > 0
    assert reports[0].first_step.tried == reports[1].first_step.tried
    assert same_bits(adapter_weights(ours), adapter_weights(twin))
    for name, layer in reports[1].layers.items():
        assert reports[0].layers[name].relative_step == pytest.approx(layer.relative_step, rel=1e-6)
    again, _ = quantised()
    assert initialize(again, config, rows).from_cache
    assert same_bits(adapter_weights(again), adapter_weights(ours))
