"""What Unsloth puts over modules is put aside for the pass, which is then that of the plain model, and put back.

On stand-ins for its functions, which need a GPU; tests/trl_integration/test_unsloth.py has its own.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from models import N_PROJECTIONS, adapter_weights, batches, documents, tiny_llama, with_lora
from settings import as_solved
from unsloth_stand_ins import StandIns, blocks, fired, on_instances

from lora_da import initialize_lora_da_weights
from lora_da.model.fused import layer_by_layer

DATA = batches(documents(8), 4)
CONFIG = as_solved(samples=8)
EVERYTHING = {
    "attention": lambda put, model: put.attention(model),
    "mlp": lambda put, model: put.mlp(model),
    "partial mlp": lambda put, model: put.mlp(model, partial=True),
    "tiled mlp": lambda put, model: put.tiled(model),
    "fused and tiled mlp": lambda put, model: put.tiled(model, fused=True),
    "compiled blocks": lambda put, model: put.compiled(model),
}
FUSED = [kind for kind in EVERYTHING if kind not in ("compiled blocks", "tiled mlp")]
every_kind = pytest.mark.parametrize("kind", EVERYTHING)


def started(model):
    report = initialize_lora_da_weights(model, DATA, CONFIG, show_progress=False)
    assert report.initialized == N_PROJECTIONS
    return adapter_weights(model)


def assert_same(one, other):
    """Equal in every bit."""
    assert one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.fixture
def put(monkeypatch):
    return StandIns(monkeypatch)


@pytest.fixture(scope="module")
def expected():
    """The plain model's start."""
    return started(with_lora(tiny_llama()))


@pytest.mark.compat("unsloth-fused")
@every_kind
def test_the_start_is_the_plain_models_and_the_same_objects_come_back(put, expected, kind):
    model = with_lora(tiny_llama())
    EVERYTHING[kind](put, model)
    before = on_instances(model)
    assert_same(started(model), expected)
    assert not put.calls, "the pass called what it was to put aside"
    after = on_instances(model)
    assert before.keys() == after.keys() and all(after[key] is before[key] for key in before)
    assert not any("_unsloth_block_checked" in vars(block) for block in blocks(model))
    model(**DATA[0])
    assert put.calls, "training no longer calls it"


@pytest.mark.parametrize("kind", FUSED)
def test_fused_layers_are_seen_by_no_hook_unless_lifted(put, kind):
    """The stand-ins are what they stand for."""
    plain, model = with_lora(tiny_llama()), with_lora(tiny_llama())
    EVERYTHING[kind](put, model)
    with model.disable_adapter(), plain.disable_adapter():
        hidden = fired(model, lambda: model(**DATA[0]))
        with layer_by_layer(model):
            lifted = fired(model, lambda: model(**DATA[0]))
        assert len(hidden) < N_PROJECTIONS == len(lifted) and set(lifted.values()) == {1}
        torch.testing.assert_close(model(**DATA[0]).loss, plain(**DATA[0]).loss)


@every_kind
def test_an_exception_in_the_pass_puts_them_back_too(put, kind):
    model = with_lora(tiny_llama())
    EVERYTHING[kind](put, model)
    before = on_instances(model)

    def interrupt(*args):
        raise KeyboardInterrupt

    model.get_base_model().model.norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        started(model)
    after = on_instances(model)
    assert before.keys() == after.keys() and all(after[key] is before[key] for key in before)


@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor:UserWarning")  # while blocks are traced
def test_nothing_is_compiled_in_the_pass_of_a_process_with_unsloth(monkeypatch, expected):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
    model = with_lora(tiny_llama())
    for block in blocks(model):
        block.compile(backend=backend)
    assert_same(started(model), expected)
    assert not compilations
    model(**DATA[0])
    assert compilations, "training no longer compiles"


def test_a_forward_without_labels_before_is_not_remembered():
    model = with_lora(tiny_llama())
    decoder, seen = model.get_base_model().model, []
    decoder._has_no_labels = True
    decoder.register_forward_pre_hook(lambda module, args: seen.append(module._has_no_labels))
    started(model)
    assert seen and not any(seen) and decoder._has_no_labels is True
