"""The language-model head as a target: its statistics are taken over the tokens that carry loss."""

from __future__ import annotations

import copy

import pytest
import torch
from collecting import PLENTY, distance
from every_class import built
from models import (
    IGNORED,
    LENGTHS,
    PREFIX,
    VOCABULARY,
    Document,
    batches,
    documents,
    packed,
    pad,
    tiny_gpt2,
    tiny_llama,
    with_lora,
)
from oracle import oracle_solve
from peft import PeftModel
from picture import differences, picture
from planning import CPU, ONE, WAYS, Forced, Way, collected_by, recorded, surveyed_model
from settings import as_solved
from tolerances import FLOAT32, TURNED
from torch import Tensor
from transformers import PreTrainedModel

import lora_da.tasks.head
from lora_da import initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.collect.plan import make_plan
from lora_da.methods import METHODS
from lora_da.processes import Processes, Run
from lora_da.samples.draw import Size, draw, read_causal
from lora_da.statistics import LayerStatistics

TARGETS = ["q_proj", "down_proj", "lm_head"]
LAYOUTS = {"padded": lambda rows: [pad(rows)], "packed": lambda rows: [packed(rows)]}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_da.tasks.head, "CHUNK", 7)  # several calls of the head, the last one short


def adapted(base: PreTrainedModel, targets: list[str] = TARGETS) -> PeftModel:
    return with_lora(base, target_modules=targets)


@torch.enable_grad()
def expected(model: PreTrainedModel, rows: list[Document], averaging: str) -> LayerStatistics:
    """From one document at a time in float64: x and d at the head, where the next label counts."""
    twin = copy.deepcopy(model).double().eval()
    xs, ds, n_loss = [], [], 0
    for document in batches(rows, 1):
        ids, targets = document["input_ids"], document["labels"][0, 1:]
        hidden = twin.get_decoder()(ids, use_cache=False).last_hidden_state[0].detach()
        logits = twin.get_output_embeddings()(hidden).detach().requires_grad_()
        counts = targets != IGNORED
        entropy = torch.nn.functional.cross_entropy(logits[:-1][counts], targets[counts], reduction="sum")
        d = torch.autograd.grad(entropy, logits)[0][:-1][counts]
        xs.append(hidden[:-1][counts])
        ds.append(d / counts.sum() if averaging == "samples" else d)
        n_loss += int(counts.sum())
    x, d = torch.cat(xs), torch.cat(ds)
    units = len(rows) if averaging == "samples" else n_loss
    return LayerStatistics(d.T @ x / units, x.T @ x / n_loss, d.T @ d / n_loss, n_loss)


def check(ours: LayerStatistics, truth: LayerStatistics) -> None:
    assert ours.n_tokens == truth.n_tokens
    for part in ("grad", "input_cov", "output_fisher"):
        assert distance(getattr(ours, part), getattr(truth, part)) <= FLOAT32, part


@pytest.mark.compat("lm-head")
@pytest.mark.parametrize("averaging", ["tokens", "samples"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_are_those_of_the_loss_tokens(layout: str, averaging: str) -> None:
    rows = documents(LENGTHS)
    found = collected_by(adapted(tiny_llama()), LAYOUTS[layout](rows), averaging=averaging)
    check(found["lm_head"], expected(tiny_llama(), rows, averaging))


@pytest.mark.compat("lm-head")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_plan_gives_the_same(way: Way) -> None:
    rows = documents(LENGTHS)
    found = collected_by(adapted(tiny_llama(num_hidden_layers=4)), [pad(rows)], way, "samples")
    check(found["lm_head"], expected(tiny_llama(num_hidden_layers=4), rows, "samples"))


@pytest.mark.parametrize("averaging", ["tokens", "samples"])
def test_the_head_alone(averaging: str) -> None:
    """Nothing below it is served, so nothing is backpropagated below it."""
    rows = documents(LENGTHS)
    found = collected_by(adapted(tiny_llama(), ["lm_head"]), [pad(rows)], ONE, averaging)
    assert found.keys() == {"lm_head"}
    check(found["lm_head"], expected(tiny_llama(), rows, averaging))


def test_other_layers_do_not_depend_on_it() -> None:
    data = [pad(documents(LENGTHS))]
    with_head = collected_by(adapted(tiny_llama()), data, averaging="samples")
    without = collected_by(adapted(tiny_llama(), TARGETS[:2]), data, averaging="samples")
    for name in without:
        for part in ("grad", "input_cov", "output_fisher"):
            assert torch.equal(getattr(with_head[name], part), getattr(without[name], part))


@pytest.mark.compat("lm-head", "tied-weights")
@pytest.mark.parametrize("build", [lambda: tiny_llama(tie_word_embeddings=True), tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|tied|tying)")
def test_a_head_whose_weight_is_the_embeddings(build) -> None:
    """The adapter is the head's alone, and so is its gradient; the shared weight stays."""
    rows, model = documents(LENGTHS), adapted(build(), ["lm_head"])
    check(collected_by(model, [pad(rows)])["lm_head"], expected(build(), rows, "tokens"))
    before = picture(model)
    report = initialize_lora_da_weights(model, [pad(rows)], as_solved(samples=4), show_progress=False)
    assert report.initialized == report.targeted == 1
    written = differences(before, picture(model))
    assert len(written) == 2 and all("lm_head.lora_" in name and name.endswith(": bits") for name in written)


@pytest.mark.parametrize("preset", ["default", "reference", "paper"])
def test_its_factors_are_the_oracles(preset: str) -> None:
    """The step lora_B·lora_A, which is unique where single factors have signs."""
    rows, model = documents((9, 14, 6, 11, 13, 8)), adapted(tiny_llama())
    config = as_solved(preset=preset, samples=6, population_size=600, damping=0.1)
    with recorded() as seen:
        initialize_lora_da_weights(model, [pad(rows)], config, show_progress=False)
    numbers = config.numbers()
    truth = expected(tiny_llama(), rows, numbers.averaging)
    if numbers.full_fisher_up_to < VOCABULARY:
        truth = LayerStatistics(truth.grad, truth.input_cov, truth.output_fisher.diagonal(), truth.n_tokens)
    assert seen["lm_head"].output_fisher.shape == truth.output_fisher.shape
    (layer,) = [layer for layer in find_adapter(model).layers if layer.is_head]
    solution = oracle_solve(
        truth.grad,
        truth.input_cov,
        truth.output_fisher,
        layer.rank // 2 if preset == "default" else layer.rank,
        population=600.0 * (truth.n_tokens / len(rows) if numbers.averaging == "tokens" else 1),
        variance_weight=numbers.variance_weight,
        damping=numbers.damping,
        relative_damping=numbers.relative_damping,
        gamma=numbers.gamma,
        normalize_step=numbers.normalize_step,
    )
    assert distance(layer.lora_B @ layer.lora_A, solution.lora_B @ solution.lora_A) <= TURNED


def test_the_plan_counts_its_sums() -> None:
    """V × h in float32, and copies of it in the solver; its rows are summed when most of a chunk's logits are gone."""
    given = [pad(documents(LENGTHS))]
    plans = []
    for targets in (TARGETS, TARGETS[:2]):
        model = adapted(tiny_llama(), targets)
        surveyed, data = surveyed_model(model, given), draw(given, Size(100), None, 100, read_causal, True)
        assert surveyed.sequence is not None and surveyed.why_not == ""
        run = Run(Processes(), CPU, PLENTY, False)
        layers, lora_da = find_adapter(model).layers, METHODS["lora_da"].needs
        plans.append(make_plan(surveyed, layers, data.batches, lora_da, run).device_bytes)
    more, sums = plans[0] - plans[1], 4 * (VOCABULARY * 32 + 32 * 32)
    assert sums <= more <= 10 * sums


def beside_the_output_layer(base: PreTrainedModel, rows: list[Document], name: str) -> LayerStatistics:
    """Do as `expected` does, for a layer between the body and the output layer: x and d where the next label counts."""
    twin = copy.deepcopy(base).double().eval()
    seen: list[tuple[Tensor, Tensor]] = []
    twin.get_submodule(name).register_forward_hook(lambda _module, args, y: seen.append((args[0].detach(), y)))
    xs, ds = [], []
    for document in batches(rows, 1):
        counts = document["labels"][0, 1:] != IGNORED
        loss = twin(**document, use_cache=False).loss * counts.sum()
        x, y = seen.pop()
        xs.append(x[0, :-1][counts])
        ds.append(torch.autograd.grad(loss, y)[0][0, :-1][counts])
    x, d = torch.cat(xs), torch.cat(ds)
    return LayerStatistics(d.T @ x / len(x), x.T @ x / len(x), d.T @ d / len(d), len(x))


@pytest.mark.compat("lm-head")
@pytest.mark.parametrize("way", [ONE, WAYS["3 passes"]], ids=["one pass", "3 passes"])
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("ModernBertDecoderForCausalLM", "lm_head.dense"),
        ("RobertaForCausalLM", "lm_head.dense"),
        ("BertLMHeadModel", "cls.predictions.transform.dense"),
    ],
)
def test_layers_beside_the_output_layer_are_served_like_it(name: str, layer: str, way: Way) -> None:
    rows, base = documents(LENGTHS), built(name)
    model = with_lora(base, task_type=None)  # all-linear, as people ask for it
    found = collected_by(model, [pad(rows)], way)
    check(found[layer], beside_the_output_layer(built(name), rows, layer))


def test_it_is_streamed_with_the_last_block() -> None:
    model, data = adapted(tiny_llama(num_hidden_layers=4)), [pad(documents(LENGTHS))]
    planner = Forced(Way(cuts=4))
    report = initialize_lora_da_weights(model, data, as_solved(samples=4), show_progress=False, plan=planner)
    (plan,) = planner.plans
    assert report.initialized == 9 and plan.cuts == 4
    assert [layer.name.removeprefix(PREFIX) for layer in plan.segments[-1].layers][-1] == "lm_head"
