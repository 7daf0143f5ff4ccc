"""The methods beside LoRA-DA, end to end: from a model and documents to the factors that their oracles give."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from collecting import PREFIX, distance, documents, llama, packed, padded
from method_oracles import ShiftProblem, oracle_filet, oracle_lora_ga, oracle_lora_one
from models import Stream
from oracle import OracleStatistics, oracle_statistics, projector
from peft import LoraConfig, PeftModel, get_peft_model
from picture import content, differences, picture
from planning import Way, forced, recorded
from test_experts import mixture
from test_quantized import bits, four_bit, twin
from torch import nn

import lora_da.needs
import lora_da.solve
from lora_da import LoraDAConfig, LoraDAError, initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.statistics import InputSums, LayerStatistics, LayerSums

METHODS = ("filet", "cntlora", "lora_one", "lora_ga")
STARTS_AT_THE_BASE = ("filet", "cntlora", "lora_ga")
TAKEN = {  # grad, input_cov, output_fisher
    "filet": (False, True, True),
    "cntlora": (False, True, False),
    "lora_one": (True, False, False),
    "lora_ga": (True, False, False),
}
FLOAT32 = 2e-5  # a float32 model and its sums against the float64 oracle
TURNED = 1e-3  # that rounding, over the gaps of a tiny model's spectrum
RANK = 4
ROWS = documents((9, 14, 6, 11, 13, 8, 15, 12))
BATCHES = [padded(ROWS[:4]), packed(ROWS[4:])]
WAYS = {
    "one pass": Way(),
    "a segment for each block": Way(cuts=2),
    "2 segments in 3 parts": Way(cuts=2, parts=3),
    "3 passes": Way(parts=3, row=False),
}
every_method = pytest.mark.parametrize("method", METHODS)


def nf4(folder: Path) -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return four_bit(folder, "nf4, double")


BASES: dict[str, Callable[[Path], nn.Module]] = {"unquantised": lambda _: llama(), "nf4": nf4}


def with_lora(base: nn.Module, **changes: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(**{"r": RANK, "target_modules": "all-linear", **changes}))


def start(model: PeftModel, method: str, **settings: Any) -> Any:
    config = LoraDAConfig(method=method, samples=len(ROWS), **settings)
    return initialize_lora_da_weights(model, BATCHES, config, show_progress=False)


def factors(model: PeftModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    layers = find_adapter(model).layers
    return {a.name.removeprefix(PREFIX): (a.lora_A.detach().double(), a.lora_B.detach().double()) for a in layers}


def check_sums(seen: dict[str, LayerStatistics], truth: dict[str, OracleStatistics], method: str) -> None:
    """Each mean that the method reads is the oracle's, and no other was taken."""
    assert seen.keys() == truth.keys()
    for name, ours in seen.items():
        for field, taken in zip(("grad", "input_cov", "output_fisher"), TAKEN[method], strict=True):
            mean = getattr(ours, field)
            assert (mean is not None) == taken, field
            assert mean is None or distance(mean, getattr(truth[name], field)) <= FLOAT32, (name, field)


def check_factors(
    found: tuple[torch.Tensor, torch.Tensor], seen: OracleStatistics, weight: torch.Tensor, method: str
) -> None:
    lora_A, lora_B = found
    energy = RANK * seen.input_cov.trace() / (3 * lora_A.shape[1])
    assert (method in STARTS_AT_THE_BASE) == (not lora_B.any())
    if method == "lora_one":
        a, b = oracle_lora_one(seen.grad, RANK, 128.0)
        assert distance(lora_B @ lora_A, b @ a) <= TURNED
        assert distance(lora_A.norm(dim=1), a.norm(dim=1)) <= TURNED
    elif method == "lora_ga":
        a = oracle_lora_ga(seen.grad, RANK, 16.0)
        assert distance(projector(lora_A.T), projector(a.T)) <= TURNED
        assert distance(lora_A.norm(), a.norm()) <= FLOAT32
    else:
        if method == "filet":
            rows = oracle_filet(weight, seen.input_cov, seen.output_fisher, RANK)[1].T
        else:  # on tokens with that very second moment
            values, vectors = torch.linalg.eigh(seen.input_cov)
            root = values.clamp_min(0).sqrt().unsqueeze(1) * vectors.T
            x = torch.cat([root, torch.zeros_like(root)]) * (2 * len(root)) ** 0.5
            rows = torch.linalg.svd(ShiftProblem(x, weight.double(), 0.1).solve(RANK), full_matrices=False).Vh[:RANK]
        assert distance(projector(lora_A.T), projector(rows.T)) <= TURNED
        assert distance(torch.trace(lora_A @ seen.input_cov @ lora_A.T), energy) <= FLOAT32


@every_method
@pytest.mark.parametrize("base", BASES)
def test_it_starts_where_its_oracle_does(method: str, base: str, tmp_path: Path) -> None:
    """The sums, the factors, every bit of the base, and the function at step 0 where lora_B is zero."""
    model = BASES[base](tmp_path)
    dense = twin(model) if base == "nf4" else llama()
    before = bits(model)
    peft_model = with_lora(model).train()  # in evaluation, bitsandbytes repacks weights on a CPU
    layers = [a.name.removeprefix(PREFIX) for a in find_adapter(peft_model).layers]
    truth = oracle_statistics(dense, ROWS, layers, "tokens")
    logits = peft_model(input_ids=ROWS[0]["input_ids"][None]).logits
    with recorded() as seen:
        report = start(peft_model, method)
    assert report.initialized == report.targeted == len(layers) == 14
    check_sums(seen, truth, method)
    for name, found in factors(peft_model).items():
        check_factors(found, truth[name], dense.get_submodule(name).weight.detach(), method)
    after = {k.removeprefix(PREFIX).replace("base_layer.", ""): v for k, v in bits(peft_model).items()}
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    moved = not torch.equal(peft_model(input_ids=ROWS[0]["input_ids"][None]).logits, logits)
    assert moved == (method not in STARTS_AT_THE_BASE)


@every_method
@pytest.mark.parametrize("way", WAYS)
def test_whatever_the_plan(method: str, way: str) -> None:
    expected, model = with_lora(llama()), with_lora(llama())
    reports = [start(expected, method)]
    with forced(WAYS[way]) as plans:
        reports.append(start(model, method))
    assert plans[0].cuts == WAYS[way].cuts and plans[0].passes == WAYS[way].parts
    assert reports[1].loss == pytest.approx(reports[0].loss, rel=FLOAT32)
    for name, (a, b) in factors(expected).items():
        ours = factors(model)[name]
        assert distance(projector(ours[0].T), projector(a.T)) <= TURNED
        assert torch.allclose(ours[1] @ ours[0], b @ a, rtol=TURNED, atol=1e-7)


@every_method
def test_only_the_factors_change(method: str) -> None:
    model = with_lora(llama())
    before = picture(model)
    start(model, method)
    written = differences(before, picture(model))
    assert written and all(".lora_" in name and name.endswith(": bits") for name in written)


@every_method
def test_the_report_says_what_was_done(method: str, tmp_path: Path) -> None:
    model = with_lora(llama())
    report = start(model, method)
    assert f" by {method} from 8 samples" in report.line()
    saved = json.loads(report.save(tmp_path).read_text(), parse_constant=pytest.fail)  # no NaN
    assert saved["settings"]["method"] == method
    (layer, *_) = saved["layers"].values()
    assert (layer["bias_captured"] is None) == (method in ("filet", "cntlora"))
    assert (layer["damping_input"] is None) == (method != "cntlora")
    assert layer["full_fisher"] == (method == "filet")
    assert (layer["relative_step"] > 0) == (method == "lora_one")
    assert report.loss == pytest.approx(start(with_lora(llama()), "lora_da").loss, rel=1e-6)


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
    model = with_lora(llama())
    model.get_base_model().gradient_checkpointing_enable()
    kept: list[bool] = []
    head = model.get_base_model().get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: kept.append(output.requires_grad))
    with forced(WAYS[way]), torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        report = start(model, "cntlora")
    hook.remove()
    assert report.initialized == 14 and kept and not any(kept)


@pytest.mark.usefixtures("no_backward")
@pytest.mark.parametrize("method", [m for m in METHODS if m != "cntlora"])
def test_the_others_do(method: str) -> None:
    with pytest.raises(Backward):
        start(with_lora(llama()), method)


def test_cntlora_serves_a_layer_that_has_no_backward() -> None:
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    model = with_lora(llama())
    block = model.get_base_model().model.layers[0]
    block.mlp.register_forward_hook(lambda module, args, output: NoBackward.apply(output))
    assert start(model, "cntlora").initialized == 14


@every_method
def test_sums_that_nobody_reads_are_not_held(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, list[bool]] = {"xx": [], "dx": [], "dd": []}
    add_input, means = InputSums.add, LayerSums.means

    def add(self: InputSums, x: torch.Tensor) -> None:
        add_input(self, x)
        held["xx"].append(self.sigma_xx_ is not None)

    def look(self: LayerSums, *args: Any) -> Any:
        held["dx"].append(self.sigma_dx_ is not None)
        held["dd"].append(self.sigma_dd_ is not None)
        return means(self, *args)

    monkeypatch.setattr(InputSums, "add", add)
    monkeypatch.setattr(LayerSums, "means", look)
    start(with_lora(llama()), method)
    grad, cov, fisher = TAKEN[method]
    assert {k: set(v) for k, v in held.items()} == {"xx": {cov}, "dx": {grad}, "dd": {fisher}}


def test_the_plan_counts_what_is_taken() -> None:
    """Where the sums are most of the memory: no more than is held, in float32, and not what other methods take."""
    model = with_lora(llama(hidden_size=64, intermediate_size=512, num_hidden_layers=1), target_modules=["down_proj"])
    i, o, found = 512, 64, {}
    for method in ("lora_da", *METHODS):
        with forced(Way()) as plans:
            start(
                with_lora(
                    llama(hidden_size=64, intermediate_size=512, num_hidden_layers=1), target_modules=["down_proj"]
                ),
                method,
            )
        found[method] = plans[0].device_bytes
    sums = {"lora_da": i * o + i * i + o, "filet": i * i + o * o, "cntlora": i * i, "lora_one": i * o, "lora_ga": i * o}
    solving = {m: lora_da.needs.NEEDS[m].solving(i, o) for m in found}
    assert len(find_adapter(model).layers) == 1
    for method, planned in found.items():
        assert 4 * sums[method] + solving[method] <= planned, method
    # the same model, so that what runs is the same: the difference is the sums and the solver
    assert found["lora_ga"] == found["lora_one"] < found["lora_da"]
    assert found["cntlora"] - found["filet"] <= solving["cntlora"] - solving["filet"]


@pytest.mark.parametrize("stage", ["forward", "solve"])
@pytest.mark.parametrize("way", WAYS)
def test_cntlora_goes_on_where_memory_runs_out(
    way: str, stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, model, calls = with_lora(llama()), with_lora(llama()), [0]
    start(expected, "cntlora")
    owner, name = (InputSums, "add") if stage == "forward" else (lora_da.solve, "cntlora")
    original = getattr(owner, name)

    def full(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)
    with forced(WAYS[way]), caplog.at_level(logging.WARNING, "lora_da"):
        if stage == "solve":  # on the CPU there is nowhere to go
            with pytest.raises(LoraDAError, match="layer .* does not fit in the CPU's memory to be solved"):
                start(model, "cntlora")
            return
        assert start(model, "cntlora").initialized == 14
    assert any("out of memory" in record.message for record in caplog.records)
    for layer, (a, _) in factors(expected).items():
        assert distance(projector(factors(model)[layer][0].T), projector(a.T)) <= TURNED


@every_method
def test_a_head_is_started_too(method: str) -> None:
    """Of its inputs those of the tokens that carry loss, as in LoRA-DA."""
    model, base = with_lora(llama(), target_modules=["lm_head", "q_proj"]), llama()
    report = start(model, method)
    assert report.initialized == report.targeted == 3
    assert report.layers[f"{PREFIX}lm_head"].tokens == sum(int((r["labels"][1:] != -100).sum()) for r in ROWS)
    truth = head_statistics(base)
    check_factors(factors(model)["lm_head"], truth, base.lm_head.weight.detach(), method)


def head_statistics(base: nn.Module) -> OracleStatistics:
    twin_, xs, ds = base.double(), [], []
    for row in ROWS:
        states = twin_.model(input_ids=row["input_ids"][None]).last_hidden_state[0, :-1].double().detach()
        kept = row["labels"][1:] != -100
        logits = (states[kept] @ twin_.lm_head.weight.T).detach().requires_grad_()
        nn.functional.cross_entropy(logits, row["labels"][1:][kept], reduction="sum").backward()
        xs.append(states[kept])
        ds.append(logits.grad)
    x, d = torch.cat(xs), torch.cat(ds)
    base.float()
    return OracleStatistics(d.T @ x / len(x), x.T @ x / len(x), d.T @ d / len(x), len(x), len(ROWS), len(x))


def test_filet_leaves_layers_that_are_too_wide_for_a_full_fisher(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lora_da.needs, "WIDEST_FULL_FISHER", 48)
    model = with_lora(llama(), target_modules=["lm_head", "up_proj"])
    before = content(model.get_base_model().lm_head.lora_A["default"].weight)
    with caplog.at_level(logging.WARNING, "lora_da"):
        report = start(model, "filet")
    reason = "method filet needs its full output Fisher, 97 × 97"
    assert report.left == {f"{PREFIX}lm_head": reason} and (report.initialized, report.targeted) == (2, 3)
    assert content(model.get_base_model().lm_head.lora_A["default"].weight) == before
    assert any(reason in record.getMessage() for record in caplog.records)
    assert start(with_lora(llama(), target_modules=["lm_head", "up_proj"]), "lora_ga").initialized == 3
    with pytest.raises(LoraDAError, match="cannot serve 1 targeted .*full output Fisher.*use another method"):
        start(with_lora(llama(), target_modules=["lm_head"]), "filet")


@every_method
def test_experts_are_started_from_the_tokens_they_were_given(method: str) -> None:
    """One of them gets none. LoRA-One has no start for experts with fewer tokens than pairs."""
    model = with_lora(mixture(closed=1), r=2)
    report = start(model, method)
    assert len(report.left) == 6 and all("experts.1." in name for name in report.left)
    assert report.initialized == report.targeted - 6 and not report.failed
    one_batch = with_lora(mixture(closed=1), r=2)
    config = LoraDAConfig(method=method, samples=len(ROWS))
    initialize_lora_da_weights(one_batch, [padded(ROWS, left=True)], config, show_progress=False)
    for name, (a, _) in factors(model).items():
        assert distance(projector(a.T), projector(factors(one_batch)[name][0].T)) <= TURNED


@pytest.mark.parametrize("method", ["filet", "cntlora"])
def test_a_weight_that_cannot_be_read_is_named(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_da.initialize, "dense_weight", lambda base: None)
    model = with_lora(llama())
    before = picture(model)
    with pytest.raises(LoraDAError, match=rf"14 of 14 .*method {method} reads its weight, .* dequantise from Linear"):
        start(model, method)
    assert differences(before, picture(model)) == []


@every_method
def test_the_size_of_the_training_set_is_not_asked_for(method: str) -> None:
    def rows() -> Iterator[dict[str, torch.Tensor]]:
        yield from BATCHES

    for data in (rows(), torch.utils.data.DataLoader(Stream(BATCHES), batch_size=None)):
        config = LoraDAConfig(method=method, samples=len(ROWS))
        report = initialize_lora_da_weights(with_lora(llama()), data, config, show_progress=False)
        assert report.initialized == 14 and report.population_size is None
    with pytest.raises(LoraDAError, match="set `population_size`"):
        initialize_lora_da_weights(with_lora(llama()), rows(), LoraDAConfig(samples=8), show_progress=False)


@every_method
def test_a_kept_solution_is_found_again_by_the_same_method_alone(method: str, tmp_path: Path) -> None:
    first, second, other = with_lora(llama()), with_lora(llama()), with_lora(llama())
    assert not start(first, method, cache_dir=str(tmp_path)).from_cache
    assert start(second, method, cache_dir=str(tmp_path)).from_cache
    assert all(torch.equal(a[0], b[0]) for a, b in zip(factors(first).values(), factors(second).values(), strict=True))
    another = METHODS[METHODS.index(method) - 1]
    assert not start(other, another, cache_dir=str(tmp_path)).from_cache
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_dora_starts_at_the_base() -> None:
    model = with_lora(llama(), use_dora=True)
    ids = ROWS[0]["input_ids"][None]
    before = model(input_ids=ids).logits
    start(model, "cntlora")
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
