"""An exception or an interrupt in the middle of the work leaves the model as it was, wherever it strikes."""

from __future__ import annotations

import pytest
import torch
from models import documents, lived_in, pad, tiny_gpt2, tiny_llama, with_lora
from picture import differences, picture
from torch.utils.data import DataLoader

import lora_da.adapter
import lora_da.solve
from lora_da import LoraDAConfig, initialize_lora_da_weights

ROWS = documents(12)
ERRORS = [RuntimeError, KeyboardInterrupt]
MLP = {tiny_llama: "model.layers.1.mlp", tiny_gpt2: "transformer.h.1.mlp"}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr("lora_da.data.BATCH_TOKENS", 24)  # several batches of these short rows


class Bomb:
    """Goes off at the n-th call, and never again."""

    def __init__(self, error, calls):
        self.error, self.calls = error, calls

    def tick(self, *args):
        self.calls -= 1
        if self.calls == 0:
            raise self.error("midway")


def initialize(model, rows=ROWS, **settings):
    data = DataLoader(rows, batch_size=3, shuffle=True, collate_fn=pad)
    config = LoraDAConfig(**{"samples": 12, **settings})
    return initialize_lora_da_weights(model, data, config, show_progress=False)


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def check_no_trace(model, bomb, rows=ROWS, **settings):
    """The bomb goes off, nothing is left of it; the next call does what the first would have done."""
    before = picture(model)
    with pytest.raises(bomb.error, match="midway"):
        initialize(model, rows, **settings)
    assert bomb.calls <= 0
    assert differences(before, picture(model)) == []


def model_with(checkpointing, build=tiny_llama):
    model = with_lora(build())
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    return lived_in(model)


checkpointings = pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "re-entrant", "other"])
errors = pytest.mark.parametrize("error", ERRORS)


@errors
@checkpointings
@pytest.mark.parametrize("build", MLP)
@pytest.mark.parametrize("call", [1, 5])
def test_in_the_forward(call, build, checkpointing, error):
    """Where the model is surveyed, and in a batch."""
    model, bomb = model_with(checkpointing, build), Bomb(error, call)
    model.get_base_model().get_submodule(MLP[build]).register_forward_hook(bomb.tick)
    check_no_trace(model, bomb)


@errors
@checkpointings
@pytest.mark.parametrize("call", [1, 3])
def test_in_the_backward(call, checkpointing, error):
    model, bomb = model_with(checkpointing), Bomb(error, call)

    def watch(module, args, output):
        if output.requires_grad:
            output.register_hook(bomb.tick)

    model.get_base_model().model.layers[0].mlp.register_forward_hook(watch)
    check_no_trace(model, bomb)


@errors
@pytest.mark.parametrize("call", [1, 3])
def test_in_the_loss(call, error):
    """While the decoder is stood in for by its own output."""
    model, bomb = model_with(None), Bomb(error, call)
    model.get_base_model().lm_head.register_forward_hook(bomb.tick)
    check_no_trace(model, bomb)


@errors
def test_in_the_data(error):
    bomb = Bomb(error, 8)

    class Rows:
        def __len__(self):
            return len(ROWS)

        def __getitem__(self, index):
            bomb.tick()
            return ROWS[index]

    check_no_trace(model_with(None), bomb, Rows())


@errors
@pytest.mark.parametrize("budget", [None, 1e-6], ids=["one pass", "a pass for each layer"])
def test_in_the_solver(budget, error, monkeypatch):
    bomb, solve = Bomb(error, 5), lora_da.solve.lora_da

    def solver(*args, **numbers):
        bomb.tick()
        return solve(*args, **numbers)

    monkeypatch.setattr(lora_da.solve, "lora_da", solver)
    check_no_trace(model_with(None), bomb, memory_budget=budget)


class Parameter(torch.nn.Parameter):
    """A parameter whose writing fails once."""

    bomb: Bomb

    def copy_(self, value):
        self.bomb.tick()
        return super().copy_(value)


@errors
@pytest.mark.parametrize("call", [1, 4])
def test_while_writing(call, error):
    """What was written already is taken back."""
    model, bomb = model_with(None), Bomb(error, call)
    for path in ("0.mlp.up_proj", "1.mlp.up_proj"):
        layer = model.get_submodule(f"base_model.model.model.layers.{path}")
        for half in (layer.lora_A, layer.lora_B):
            half["default"].weight.__class__ = Parameter
            half["default"].weight.bomb = bomb
    check_no_trace(model, bomb)


@errors
def test_the_next_call_is_not_affected(error):
    """After an interrupted call, another one gives what it gives on a model that was never touched."""
    fresh, model = model_with(None), model_with(None)
    initialize(fresh)
    bomb = Bomb(error, 6)
    handle = model.get_base_model().model.layers[1].register_forward_hook(bomb.tick)
    with pytest.raises(error, match="midway"):
        initialize(model)
    handle.remove()
    initialize(model)
    assert all(torch.equal(factors(model)[name], value) for name, value in factors(fresh).items())
