"""The methods beside LoRA-DA, end to end: from a model and documents to the factors that their oracles give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from collecting import distance
from dequantized import dequantized, four_bit
from mixtures import mixture
from models import IGNORED, PREFIX, WIDE, batches, pad, tiny_llama, with_lora
from oracle import OracleStatistics, oracle_statistics, projector
from other_methods import (
    METHODS,
    ROWS,
    STARTS_AT_THE_BASE,
    TAKEN,
    WAYS,
    check_factors,
    every_method,
    factors,
    start,
)
from picture import differences, picture
from planning import Forced, recorded
from tolerances import FLOAT32, TURNED
from torch import nn
from transformers import PreTrainedModel

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.statistics import LayerStatistics

IDS = pad(ROWS[:1])["input_ids"]


def nf4(folder: Path) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return four_bit(tiny_llama(**WIDE), folder, "double-quantisation")


BASES: dict[str, Callable[[Path], PreTrainedModel]] = {"unquantised": lambda _: tiny_llama(), "nf4": nf4}


def dense_twin(model: PreTrainedModel, base: str) -> PreTrainedModel:
    return tiny_llama() if base == "unquantised" else dequantized(model, tiny_llama(**WIDE))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def check_sums(seen: dict[str, LayerStatistics], truth: dict[str, OracleStatistics], method: str) -> None:
    """Each mean that the method reads is the oracle's, and no other was taken."""
    assert seen.keys() == truth.keys()
    for name, ours in seen.items():
        for field, taken in zip(("grad", "input_cov", "output_fisher"), TAKEN[method], strict=True):
            mean = getattr(ours, field)
            assert (mean is not None) == taken, field
            assert mean is None or distance(mean, getattr(truth[name], field)) <= FLOAT32, (name, field)


@every_method
@pytest.mark.parametrize("base", BASES)
def test_it_starts_where_its_oracle_does(method: str, base: str, tmp_path: Path) -> None:
    """The sums, the factors, every bit of the base, and the function at step 0 where lora_B is zero."""
    model = BASES[base](tmp_path)
    dense = dense_twin(model, base)
    before = bits(model)
    peft_model = with_lora(model).train()  # in evaluation, bitsandbytes repacks weights on a CPU
    layers = [a.name.removeprefix(PREFIX) for a in find_adapter(peft_model).layers]
    truth = oracle_statistics(dense, ROWS, layers, "tokens")
    logits = peft_model(input_ids=IDS).logits
    with recorded() as seen:
        report = start(peft_model, method)
    assert report.initialized == report.targeted == len(layers) == 14
    check_sums(seen, truth, method)
    for name, found in factors(peft_model).items():
        check_factors(found, truth[name], dense.get_submodule(name).weight.detach(), method)
    after = {k.removeprefix(PREFIX).replace("base_layer.", ""): v for k, v in bits(peft_model).items()}
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    moved = not torch.equal(peft_model(input_ids=IDS).logits, logits)
    assert moved == (method not in STARTS_AT_THE_BASE)


@every_method
@pytest.mark.parametrize("way", WAYS)
def test_whatever_the_plan(method: str, way: str) -> None:
    expected, model = with_lora(tiny_llama()), with_lora(tiny_llama())
    reports = [start(expected, method)]
    planner = Forced(WAYS[way])
    reports.append(start(model, method, planner))
    (plan,) = planner.plans
    assert plan.cuts == WAYS[way].cuts and plan.passes == WAYS[way].parts
    assert reports[1].loss == pytest.approx(reports[0].loss, rel=FLOAT32)
    for name, (a, b) in factors(expected).items():
        ours = factors(model)[name]
        assert distance(projector(ours[0].T), projector(a.T)) <= TURNED
        assert torch.allclose(ours[1] @ ours[0], b @ a, rtol=TURNED, atol=1e-7)


@every_method
def test_only_the_factors_change(method: str) -> None:
    model = with_lora(tiny_llama())
    before = picture(model)
    start(model, method)
    written = differences(before, picture(model))
    assert written and all(".lora_" in name and name.endswith(": bits") for name in written)


@every_method
def test_the_report_says_what_was_done(method: str, tmp_path: Path) -> None:
    model = with_lora(tiny_llama())
    report = start(model, method)
    assert f" by {method} from 8 samples" in report.line()
    saved = json.loads(report.save(tmp_path).read_text(), parse_constant=pytest.fail)  # no NaN
    assert saved["settings"]["method"] == method
    (layer, *_) = saved["layers"].values()
    assert (layer["bias_captured"] is None) == (method in ("filet", "cntlora"))
    assert (layer["damping_input"] is None) == (method != "cntlora")
    assert layer["full_fisher"] == (method == "filet")
    assert (layer["relative_step"] > 0) == (method == "lora_one")
    assert report.loss == pytest.approx(start(with_lora(tiny_llama()), "lora_da", first_step="gamma").loss, rel=1e-6)


@every_method
def test_a_head_is_started_too(method: str) -> None:
    """Its statistics are taken over the tokens that carry loss, as in LoRA-DA."""
    model, base = with_lora(tiny_llama(), target_modules=["lm_head", "q_proj"]), tiny_llama()
    report = start(model, method)
    assert report.initialized == report.targeted == 3
    loss_tokens = sum(label != IGNORED for row in ROWS for label in row["labels"][1:])
    assert report.layers[f"{PREFIX}lm_head"].tokens == loss_tokens
    truth = head_statistics(base)
    check_factors(factors(model)["lm_head"], truth, base.lm_head.weight.detach(), method)


def head_statistics(base: nn.Module) -> OracleStatistics:
    twin_, xs, ds = base.double(), [], []
    for document in batches(ROWS, 1):
        states = twin_.model(input_ids=document["input_ids"]).last_hidden_state[0, :-1].double().detach()
        targets = document["labels"][0, 1:]
        kept = targets != IGNORED
        logits = (states[kept] @ twin_.lm_head.weight.T).detach().requires_grad_()
        nn.functional.cross_entropy(logits, targets[kept], reduction="sum").backward()
        xs.append(states[kept])
        ds.append(logits.grad)
    x, d = torch.cat(xs), torch.cat(ds)
    base.float()
    return OracleStatistics(d.T @ x / len(x), x.T @ x / len(x), d.T @ d / len(x), len(x), len(ROWS), len(x))


@every_method
def test_experts_are_started_from_the_tokens_they_were_given(method: str) -> None:
    """One of them gets none. LoRA-One has no start for experts with fewer tokens than pairs."""
    model = with_lora(mixture(closed=1), r=2)
    report = start(model, method)
    assert len(report.left) == 6 and all("experts.1." in name for name in report.left)
    assert report.initialized == report.targeted - 6 and not report.failed
    one_batch = with_lora(mixture(closed=1), r=2)
    config = LoraDAConfig(method=method, samples=len(ROWS))
    initialize_lora_da_weights(one_batch, [pad(ROWS, "left")], config, show_progress=False)
    for name, (a, _) in factors(model).items():
        assert distance(projector(a.T), projector(factors(one_batch)[name][0].T)) <= TURNED


@every_method
def test_a_kept_solution_is_found_again_by_the_same_method_alone(method: str, tmp_path: Path) -> None:
    first, second, other = with_lora(tiny_llama()), with_lora(tiny_llama()), with_lora(tiny_llama())
    assert not start(first, method, cache_dir=str(tmp_path)).from_cache
    assert start(second, method, cache_dir=str(tmp_path)).from_cache
    assert all(torch.equal(a[0], b[0]) for a, b in zip(factors(first).values(), factors(second).values(), strict=True))
    another = METHODS[METHODS.index(method) - 1]
    assert not start(other, another, cache_dir=str(tmp_path)).from_cache
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_dora_starts_at_the_base() -> None:
    model = with_lora(tiny_llama(), use_dora=True)
    before = model(input_ids=IDS).logits
    start(model, "cntlora")
    assert torch.allclose(model(input_ids=IDS).logits, before, atol=1e-5)
