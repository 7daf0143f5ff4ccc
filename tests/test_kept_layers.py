"""Layers that keep PEFT's init: by their kind, or because their statistics are not finite; each is named."""

from __future__ import annotations

import logging

import pytest
import torch
from faults import poison
from logs import warnings_of
from models import LAYERS, PREFIX, adapter_weights, batches, documents, tiny_llama, tiny_opt, with_lora
from oracle import oracle_statistics
from picture import differences, picture
from settings import as_solved
from torch import nn

from lora_da import LoraDAConfig, LoraDAError, initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.statistics import LayerStatistics

DATA = batches(documents(8), 4)
SMALL = as_solved(samples=8)


def initialize(model, **options):
    return initialize_lora_da_weights(model, DATA, SMALL, **{"show_progress": False, **options})


def changed(before, model):
    """The layers whose adapter is other than it was."""
    now = adapter_weights(model)
    return {name.split(".lora_")[0] for name in before if not torch.equal(before[name], now[name])}


@pytest.mark.parametrize(
    ("factor", "reason"),
    [(float("inf"), "its gradient is not finite"), (float("nan"), "not finite"), (0.0, "its gradient is zero")],
)
def test_one_layer_without_a_solution(factor, reason, caplog, capsys):
    """One of 21 layers: it keeps PEFT's init, bit by bit, and is named; all others are as without it."""
    healthy, model = (with_lora(tiny_llama(num_hidden_layers=3)) for _ in range(2))
    path = "0.self_attn.q_proj"  # nothing is upstream of it but the embedding
    poison(model, f"{LAYERS}.{path}", factor)
    initialize(healthy)
    before = adapter_weights(model)
    report = initialize(model, show_progress=True)

    layer = f"{LAYERS}.{path}"
    after, expected = adapter_weights(model), adapter_weights(healthy)
    for name in after:
        start = before if name.startswith(layer) else expected
        assert torch.equal(after[name], start[name]), name
    assert len(changed(before, model)) == report.initialized == len(report.layers) == 20
    assert report.targeted == 21 and layer not in report.layers
    assert list(report.failed) == [layer] and reason in report.failed[layer]
    (warning,) = warnings_of(caplog)
    assert layer in warning and reason in warning
    line = capsys.readouterr().out
    assert "initialised 20 of 21 layers" in line and layer in line


@pytest.mark.parametrize(("n_layers", "paths"), [(2, [0]), (3, [0, 1])])
def test_too_many_layers_without_a_solution(n_layers, paths):
    """One of 14, or two of 21, is above 5 %: an error that names the first, and the model as it was."""
    model = with_lora(tiny_llama(num_hidden_layers=n_layers))
    # a query projection's gradient goes on to the layers before; a zero stays with the layer
    for index in paths:
        poison(model, f"{LAYERS}.{index}.self_attn.q_proj", 0.0)
    before = picture(model)
    message = rf"{len(paths)} of {7 * n_layers} layers have no solution; .*0\.self_attn\.q_proj: its gradient is zero"
    with pytest.raises(LoraDAError, match=message):
        initialize(model)
    assert differences(before, picture(model)) == []


def test_a_solution_that_the_adapter_cannot_hold():
    """Finite in float64 and not in float16: the layer counts as one without a solution."""
    model = with_lora(tiny_llama())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    config = LoraDAConfig(samples=8, preset="paper", damping=1e-6, gamma=1e-12)
    before = picture(model)
    with pytest.raises(LoraDAError, match="overflows torch.float16"):
        initialize_lora_da_weights(model, DATA, config, show_progress=False)
    assert differences(before, picture(model)) == []


class WithConvolution(nn.Module):
    """An activation with a convolution over the tokens before it."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 1)

    def forward(self, x):
        return nn.functional.silu(self.conv(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.compat("embeddings", "lm-head", "convolutions")
def test_layers_of_other_kinds(caplog, capsys):
    """An embedding and a convolution: one warning names them, the rest is initialised, the head with it."""
    base = tiny_llama()
    base.model.layers[0].mlp.act_fn = WithConvolution(48)
    model = with_lora(base, target_modules=["q_proj", "down_proj", "embed_tokens", "lm_head", "conv"])
    left = {
        f"{PREFIX}model.embed_tokens": "Embedding",
        f"{LAYERS}.0.mlp.act_fn.conv": "Conv1d",
    }
    before = adapter_weights(model)
    report = initialize(model, show_progress=True)
    served = {f"{LAYERS}.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert changed(before, model) == {*served, f"{PREFIX}lm_head"}
    assert report.left == left and report.failed == {}
    (warning,) = warnings_of(caplog)
    assert "2 targeted layers, which keep PEFT's init" in warning
    assert all(f"{name} ({kind})" in warning for name, kind in left.items())
    assert "initialised 5 of 7 layers" in capsys.readouterr().out


@pytest.mark.compat("ensure-weight-tying")
def test_a_tied_head(caplog):
    """Where the head shares the embedding's adapter, both are left alone."""
    base = tiny_llama(tie_word_embeddings=True)
    model = with_lora(base, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    before = adapter_weights(model)
    report = initialize(model)
    assert changed(before, model) == {f"{LAYERS}.{i}.self_attn.q_proj" for i in (0, 1)}
    assert report.left == {
        f"{PREFIX}model.embed_tokens": "Embedding",
        f"{PREFIX}lm_head": "the language-model head, whose adapter is the embedding's",
    }
    assert report.initialized == 2 and len(warnings_of(caplog)) == 1


def test_many_layers_of_other_kinds(caplog):
    """The warning stays one readable line: five names, and how many more, and their kind once."""
    base = tiny_llama(num_hidden_layers=7)
    for layer in base.model.layers:
        layer.mlp.act_fn = WithConvolution(48)
    report = initialize(with_lora(base, target_modules=["q_proj", "conv"]))
    assert len(report.left) == 7
    (warning,) = warnings_of(caplog)
    assert warning.count("conv,") == 4 and warning.endswith("conv and 2 more (Conv1d)")


@pytest.fixture(autouse=True)
def listen(caplog):
    caplog.set_level(logging.WARNING, "lora_da")


QUERIES_AND_KEYS = {"q_proj", "k_proj"}


def pairs_of_tokens():
    """The first of two tokens has a loss and sees itself alone: no query and no key changes what it sees."""
    return with_lora(tiny_llama()), documents([2] * 6, prompt=0)


def one_token_over_and_over():
    """All that is looked at is the same, whatever looks where."""
    model = tiny_opt(dropout=0.0, attention_dropout=0.0)
    nn.init.zeros_(model.model.decoder.embed_positions.weight)
    labels = documents([60] * 40, prompt=0)
    return with_lora(model), [{**row, "input_ids": [5 + number] * 60} for number, row in enumerate(labels)]


@pytest.mark.parametrize("method", ["lora_da", "lora_one"])
@pytest.mark.parametrize("data", [pairs_of_tokens, one_token_over_and_over])
def test_a_gradient_of_rounding_errors_is_none(data, method):
    """A solver would make as much of it as of any: it normalises what it is given."""
    model, rows = data()
    names = [layer.name.removeprefix(PREFIX) for layer in find_adapter(model).layers]
    truth = oracle_statistics(model.unload(), rows, names, "samples")
    largest = max(s.grad.norm() for s in truth.values())
    assert {n.rsplit(".")[-1] for n, s in truth.items() if s.grad.norm() < 1e-9 * largest} == QUERIES_AND_KEYS
    model, rows = data()
    before = picture(model)
    message = r"4 of \d\d layers have no solution; .*\.(q|k)_proj: its gradient is zero"
    with pytest.raises(LoraDAError, match=message):
        initialize_lora_da_weights(
            model, batches(rows, 3), LoraDAConfig(samples=40, method=method), show_progress=False
        )
    assert differences(before, picture(model)) == []


@pytest.mark.parametrize("scale", [1e-5, 1e-2])
def test_a_small_gradient_is_one(scale):
    """A layer behind a small gate is served: its gradient is small, and all there is to it."""
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj.weight.data *= scale
    report = initialize(with_lora(model))
    assert report.initialized == report.targeted and report.failed == {}


def test_how_often_a_layer_is_asked_does_not_make_its_gradient_small():
    """An expert of few tokens among many has the size of a layer that reads them all."""
    generator = torch.Generator().manual_seed(0)
    x, d = torch.randn(10_000, 4, generator=generator), 1 + torch.randn(10_000, 3, generator=generator)

    def size(n):
        grad, cov = d[:n].T @ x[:n] / 10_000, x[:n].T @ x[:n] / n
        return LayerStatistics(grad, cov, None, n).gradient_size(10_000)

    # the mean of a few random x is some ten times that of many; by all units it would be 1e-3 of that
    assert 0.1 < size(5) / size(10_000) < 100
