"""Experts that are slices of one parameter and keep PEFT's init: idle ones, and those that are not seen at all."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from expert_oracle import expert_truth, stacks_of
from logs import warnings_of
from models import PREFIX, adapter_weights, documents, with_lora
from peft.tuners.lora.layer import ParamWrapper
from picture import differences, picture
from stacks import initialize, stacked, with_experts, without_expert
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.integrations import moe

import lora_da.methods.lora_da
from lora_da import LoraDAConfig, LoraDAError
from lora_da.adapter import find_adapter
from lora_da.methods.common import UnsolvableLayer

OTHERS = [{"method": name} for name in ("filet", "cntlora", "lora_ga")]  # `lora_one` wants a gradient of full rank


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


def test_an_expert_of_fewer_tokens_than_outputs_has_no_full_fisher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damped by little, whether it can be factored is a matter of rounding: here it never can. That is no failure."""
    factored = lora_da.methods.lora_da._factored_

    def exact(matrix: Tensor, damping: float, name: str) -> Tensor:
        if name == "output Fisher" and torch.linalg.matrix_rank(matrix, rtol=1e-6) < len(matrix):
            raise UnsolvableLayer("its output Fisher is singular")
        return factored(matrix, damping, name)

    monkeypatch.setattr(lora_da.methods.lora_da, "_factored_", exact)
    model = with_experts(stacked("Qwen3Moe", num_experts=16))
    report = initialize(model, LoraDAConfig(samples=3, preset="paper", population_size=9), documents((20, 20, 20)))
    assert report.failed == {} and report.initialized > 0
    assert "an expert of too few tokens to solve it: its output Fisher is singular" in report.left.values()


def test_experts_whose_tokens_train_nothing_keep_pefts_init() -> None:
    """The last block's output at tokens without loss goes nowhere."""
    rows = documents((6, 7, 6), prompt=4)
    model = with_experts(stacked("Qwen3Moe", num_experts=16))
    report = initialize(model, LoraDAConfig(samples=3, population_size=9, first_step="none"), rows)
    idle = {name for name, why in report.left.items() if "no part in the loss" in why}
    truth = expert_truth(stacked("Qwen3Moe", num_experts=16), rows, "tokens")
    assert idle == {PREFIX + name for name, fields in truth.items() if not fields["grad"].any()} != set()
    assert {name.split(".layers.")[1][0] for name in idle} == {"3"}


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


def test_a_parameter_without_a_product_is_left() -> None:
    """An embedding is looked up."""
    model = with_lora(stacked("Mixtral"), target_modules=["o_proj"], target_parameters=["embed_tokens.weight"], r=2)
    report = initialize(model)
    assert list(report.left) == [f"{PREFIX}model.embed_tokens.weight"] and "of `weight` was seen" in str(report.left)


class Halved(nn.Module):
    """What a quantisation puts over a parameter: it is made at each call."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored / 2


@pytest.mark.filterwarnings("ignore:Could not find any LoRA parametrization")  # PEFT 0.21's word for it
def test_quantised_experts_whose_adapter_stays_on_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT 0.21.2 adds what the adapter was in every forward before: a start would be measured by that, and trained."""
    base = stacked("GptOss")
    for module in stacks_of(base).values():
        parametrize.register_parametrization(module, "down_proj", Halved(), unsafe=True)
    names = [f"{name}.down_proj" for name in stacks_of(base)]
    model = with_experts(base, target_parameters=names)
    monkeypatch.setattr(ParamWrapper, "_remove_parametrizations", lambda wrapper: None)
    before = torch.get_rng_state()
    left = find_adapter(model).left
    assert set(left) == {PREFIX + name for name in names} and torch.equal(before, torch.get_rng_state())
    assert all("does not take off again" in why for why in left.values())
