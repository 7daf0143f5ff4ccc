"""DoRA starts where plain LoRA does from the same factors: at W + s·lora_B·lora_A, in direction and in magnitude."""

from __future__ import annotations

import pytest
import torch
from collecting import distance
from models import NO_DROPOUT, PREFIX, batches, documents, tiny_gpt2, tiny_llama, tiny_quantized, with_lora
from picture import differences, picture

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.adapter import find_adapter

DATA = batches(documents(8), 4)
# m over the norm is 1 to the last digits of its dtype, in every one of a dozen layers.
NORMED, NORMED_BFLOAT16 = 1e-5, 2e-2
# Large enough that a magnitude left at ‖W‖ shows.
LONG_STEP = LoraDAConfig(samples=8, gamma=4.0)


def bfloat16(model):
    return model.to(torch.bfloat16)


BASES = {
    "float32": (lambda folder: tiny_llama(), NORMED),
    "bfloat16": (lambda folder: bfloat16(tiny_llama()), NORMED_BFLOAT16),
    "Conv1D": (lambda folder: tiny_gpt2(**NO_DROPOUT), NORMED),
    "nf4": (lambda folder: tiny_quantized(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4"), NORMED),
}


def initialize(model):
    return initialize_lora_da_weights(model, DATA, LONG_STEP, show_progress=False)


def logits(model):
    """In train mode: for evaluation on a CPU bitsandbytes repacks what PEFT's DoRA reads as 4-bit weights."""
    with torch.no_grad():
        return model.train()(torch.arange(3, 40)[None]).logits.double()


@pytest.mark.compat("dora")
@pytest.mark.parametrize("kind", BASES)
def test_dora_starts_where_plain_lora_does(kind, tmp_path):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    build, same = BASES[kind]
    plain, dora = (with_lora(build(tmp_path / str(d)), use_dora=d, fan_in_fan_out=kind == "Conv1D") for d in (0, 1))
    untouched = {name: p.clone() for name, p in dora.named_parameters() if "lora_" not in name}
    for model in (plain, dora):
        report = initialize(model)
        assert report.initialized == report.targeted > 0
    factors = dict(plain.named_parameters())
    for name, parameter in dora.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            assert torch.equal(parameter, factors[name]), name  # estimated on the same base, DoRA switched off
        elif "lora_" not in name:
            assert torch.equal(parameter, untouched[name]), name
    expected, ours = logits(plain), logits(dora)
    assert distance(ours, expected) <= same
    with plain.disable_adapter():
        step = distance(logits(plain), expected)
    assert step > 3 * same  # a DoRA that had stayed at the base would be told apart


def dense(base):
    """A base weight in float64, (o, i), each format by its own definition."""
    if type(base).__name__ == "Conv1D":
        return base.weight.double().T
    if type(base).__name__ == "Linear8bitLt":
        return base.weight.double() * base.state.SCB.double()[:, None] / 127
    return base.weight.double()


@pytest.mark.compat("dora")
@pytest.mark.parametrize("kind", ["Conv1D", "int8"])
def test_magnitudes_are_the_row_norms_of_the_start(kind, tmp_path):
    """On int8 by themselves: there PEFT's DoRA loses the scales on a CPU, so that a second forward fails."""
    if kind == "int8":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        base = tiny_quantized(tmp_path, load_in_8bit=True)
    else:
        base = tiny_gpt2()
    model = with_lora(base, use_dora=True, fan_in_fan_out=kind == "Conv1D")
    initialize(model)
    for layer in find_adapter(model).layers:
        weight, step = dense(layer.base), layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        expected = (weight + step).norm(dim=1)
        assert (layer.magnitude - expected).abs().max() <= 1e-6 * expected.max()
        assert (weight.norm(dim=1) - expected).abs().max() > 1e-4 * expected.max()  # PEFT's start would not do


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 3])
def test_an_interrupt_takes_magnitudes_back_too(call, error):
    model, calls = with_lora(tiny_llama(), use_dora=True), [call]

    class Magnitude(torch.nn.Parameter):
        def copy_(self, value):
            calls[0] -= 1
            if calls[0] == 0:
                raise error("midway")
            return super().copy_(value)

    for layer in find_adapter(model).layers[5:9]:
        layer.magnitude.__class__ = Magnitude
    before = picture(model)
    with pytest.raises(error, match="midway"):
        initialize(model)
    assert calls[0] <= 0
    assert differences(before, picture(model)) == []


def test_layers_that_keep_their_start_keep_their_magnitude():
    """An embedding under DoRA."""
    model = with_lora(tiny_llama(), use_dora=True, target_modules=["q_proj", "embed_tokens"])
    embedding = model.get_submodule(f"{PREFIX}model.embed_tokens")
    before = embedding.lora_magnitude_vector["default"].weight.clone()
    report = initialize(model)
    assert report.initialized == 2 and list(report.left) == [f"{PREFIX}model.embed_tokens"]
    assert torch.equal(embedding.lora_magnitude_vector["default"].weight, before)
