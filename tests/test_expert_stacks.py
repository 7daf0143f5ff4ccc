"""Adapters on experts that are slices of one parameter (`target_parameters`): what is written, and what is left."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from judge import errors_of
from logs import warnings_of
from models import IGNORED, PREFIX, adapter_weights, batches, documents, few_tokens, pad, with_lora
from oracle import OracleStatistics
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from picture import differences, picture
from settings import as_solved
from stacks import FAMILIES, expert_truth, stacked, stacks_of, with_experts, without_expert
from tolerances import START, TURNED
from torch import Tensor, nn
from trainers import same_bits, worst_difference
from transformers.integrations import moe

from lora_da import LoraDAConfig, LoraDAError, initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.collect.segment import SegmentRun

OTHERS = [{"method": name} for name in ("filet", "cntlora", "lora_ga")]  # `lora_one` wants a gradient of full rank
ROWS = documents((9, 14, 6, 11, 7, 13, 8, 10))
CONFIG = as_solved(samples=len(ROWS), population_size=len(ROWS))


def initialize(model: PeftModel, config: LoraDAConfig = CONFIG, rows: Any = ROWS) -> Any:
    return initialize_lora_da_weights(model, batches(rows, 3), config, show_progress=False)


def wrappers(model: PeftModel) -> Iterator[tuple[str, ParamWrapper]]:
    """What PEFT has wrapped, by the parameter's name in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            place = name.removeprefix(PREFIX).replace(".base_layer", "")
            yield f"{place}.{module.parameter_name}", module


def experts_of(model: PeftModel) -> dict[str, Tensor]:
    """ΔW, (o, i), of each expert as PEFT has it, by the expert's name in the base model."""
    found = {}
    for name, wrapper in wrappers(model):
        delta = wrapper.get_delta_weight("default").detach()
        delta = delta.mT if getattr(wrapper.get_base_layer(), "is_transposed", False) else delta
        found |= {f"{name}.{number}": matrix for number, matrix in enumerate(delta)}
    return found


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


def test_experts_without_tokens_keep_pefts_init_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    model = without_expert(2)
    before = {layer.name: layer.factors()[0] for layer in find_adapter(model).layers}
    with caplog.at_level(logging.WARNING, "lora_da"):
        report = initialize(model)
    idle = {name for name in before if name.endswith(".2")}
    assert set(report.left) == idle and len(idle) == 8 and report.initialized == report.targeted - 8
    assert set(report.left.values()) == {"an expert that no token of the samples was routed to"}
    for layer in find_adapter(model).layers:
        lora_A, lora_B = layer.factors()
        kept = torch.equal(lora_A, before[layer.name]) and not lora_B.any()
        assert kept == (layer.name in idle), layer.name
    (warning,) = warnings_of(caplog)
    assert "8 targeted layers" in warning and warning.count(".2,") == 4 and ".2 and 3 more (an expert that" in warning


@pytest.mark.parametrize(
    "settings",
    [
        {"population_size": 9},
        {"preset": "reference", "population_size": 9},
        {"preset": "paper", "population_size": 9},
        *OTHERS,
    ],
    ids=str,
)
def test_an_expert_of_fewer_tokens_than_its_rank(settings: dict[str, Any]) -> None:
    """Whatever is added to what a single token tells stays finite; where a method wants more, that is no failure."""
    for seed in range(3):
        model = with_experts(stacked("Qwen3Moe", num_experts=16), r=4)
        report = initialize(model, LoraDAConfig(samples=3, **settings), documents((5, 4, 5), seed=seed))
        assert report.failed == {} and report.initialized + len(report.left) == report.targeted
        tokens = [layer.tokens for name, layer in report.layers.items() if ".experts." in name]
        assert min(tokens) < 4
        assert all(torch.isfinite(value).all() for value in adapter_weights(model).values())


def test_experts_whose_tokens_train_nothing_keep_pefts_init() -> None:
    """The last block's output at tokens without loss goes nowhere."""
    rows = documents((6, 7, 6), prompt=4)
    model = with_experts(stacked("Qwen3Moe", num_experts=16))
    report = initialize(model, LoraDAConfig(samples=3, population_size=9, first_step="none"), rows)
    idle = {name for name, why in report.left.items() if "no part in the loss" in why}
    truth = expert_truth(stacked("Qwen3Moe", num_experts=16), rows, "tokens")
    assert idle == {PREFIX + name for name, fields in truth.items() if not fields["grad"].any()} != set()
    assert {name.split(".layers.")[1][0] for name in idle} == {"3"}


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


def fused(self: nn.Module, *args: Tensor) -> Tensor:
    """What a kernel may do: all experts in one."""
    return moe.batched_mm_experts_forward(self, *args)


def from_the_other_side(self: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Square matrices that are stored the other way round than PEFT takes them for."""
    out = torch.zeros_like(hidden)
    for number in range(self.num_experts):
        share = (weights * (index == number)).sum(-1, keepdim=True)
        inner = self._apply_gate(torch.cat([hidden @ self.down_proj[number]] * 2, dim=-1))
        out = out + share * (inner @ self.down_proj[number])
    return out


@pytest.mark.compat("fused-experts")
@pytest.mark.parametrize("forward", [fused, from_the_other_side])
def test_experts_whose_products_are_not_seen_are_left(
    forward: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_experts(stacked("Mixtral", intermediate_size=32), target_parameters=["mlp.experts.down_proj"])
    monkeypatch.setattr(type(next(iter(stacks_of(model).values()))), "forward", forward)
    before = adapter_weights(model)
    with caplog.at_level(logging.WARNING, "lora_da"):
        report = initialize(model)
    assert set(report.layers) == {f"{PREFIX}model.layers.{n}.self_attn.o_proj" for n in range(4)}
    assert len(report.left) == 16 and len(set(report.left.values())) == 1
    (warning,) = warnings_of(caplog)
    assert "no product of MixtralExperts with a matrix of `down_proj` was seen" in warning
    after = adapter_weights(model)
    assert all(torch.equal(after[name], before[name]) for name in before if "experts" in name)


def test_an_adapter_of_nothing_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_experts(stacked("Mixtral"), target_modules=[])
    monkeypatch.setattr(type(next(iter(stacks_of(model).values()))), "forward", fused)
    before = picture(model)
    with pytest.raises(LoraDAError, match="no layer can be started from data: .*experts.gate_up_proj.0.*was seen"):
        initialize(model)
    assert differences(before, picture(model)) == []


def test_parameters_of_one_matrix_are_layers() -> None:
    """PEFT takes any matrix: a router's, which is no layer's, and a linear layer's, which starts as that layer does."""
    by_parameter = with_lora(
        stacked("Mixtral"), target_modules=[], target_parameters=["mlp.gate.weight", "q_proj.weight"], r=2
    )
    by_module = with_lora(stacked("Mixtral"), target_modules=["q_proj"], r=2)
    report = initialize(by_parameter)
    initialize(by_module)
    assert report.initialized == report.targeted == 8
    assert report.layers[f"{PREFIX}model.layers.0.mlp.gate.weight"].relative_step > 0
    of_parameters = {name: value for name, value in adapter_weights(by_parameter).items() if "q_proj" in name}
    assert same_bits(adapter_weights(by_module), of_parameters)


def test_a_parameter_without_a_product_is_left() -> None:
    """An embedding is looked up."""
    model = with_lora(stacked("Mixtral"), target_modules=["o_proj"], target_parameters=["embed_tokens.weight"], r=2)
    report = initialize(model)
    assert list(report.left) == [f"{PREFIX}model.embed_tokens.weight"] and "of `weight` was seen" in str(report.left)


@pytest.mark.compat("quantised-experts")
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_quantised_experts_start_as_their_dequantised_twin(family: str, tmp_path) -> None:
    """By bitsandbytes' parametrisation, which Axolotl's `quantize_moe_experts` puts on; with the measured step and the
    cache. One parameter of each module: of two, PEFT alone passes over the inner one's adapter."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

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
