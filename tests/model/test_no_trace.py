"""A successful initialisation changes lora_A and lora_B of the targeted layers, in place, and nothing else anywhere."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from models import (
    checkpoint,
    documents,
    lived_in,
    packed,
    pad,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
    tiny_quantized,
    with_lora,
)
from peft import PeftModel
from picture import content, differences, model_picture, named_tensors, picture
from safetensors.torch import load_file
from settings import as_solved
from torch.utils.data import DataLoader

from lora_da import LoraDAConfig, initialize_lora_da_weights

SMALL = as_solved(samples=8)
BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt, "mixtral": tiny_mixtral}


def loader(collate=pad):
    return DataLoader(documents(12), batch_size=4, shuffle=True, collate_fn=collate)


def initialize(model, data=None, config=SMALL, **options):
    return initialize_lora_da_weights(model, data or loader(), config, show_progress=False, **options)


def expected_changes(report):
    return sorted(f"{layer}.lora_{factor}.default.weight: bits" for layer in report.layers for factor in "AB")


def attention_only(build, **config):
    """Layers that every family names alike enough; mixtral's experts are not what this is about."""
    targets = ["c_attn", "c_proj"] if build is tiny_gpt2 else ["q_proj", "k_proj", "v_proj"]
    return with_lora(build(), target_modules=targets, **config)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "re-entrant", "non-re-entrant"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_only_the_factors_change(kind, checkpointing):
    """Weights, gradients, flags, hooks, attributes, configs and random states, on a model with a life of its own."""
    model = attention_only(BUILDERS[kind], lora_dropout=0.1)
    if checkpointing is not None:
        checkpoint(model.get_base_model(), checkpointing)
    lived_in(model)
    before = picture(model)
    report = initialize(model)
    assert report.initialized == report.targeted > 0
    assert differences(before, picture(model)) == expected_changes(report)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [LoraDAConfig(samples=8, preset=name) for name in ("reference", "paper")])
def test_only_the_factors_change_under_any_preset(config, training):
    model = with_lora(tiny_llama()).train(training)
    before = picture(model)
    report = initialize(model, config=config)
    assert differences(before, picture(model)) == expected_changes(report)
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_written_in_their_dtype(dtype):
    """An adapter in low precision stays in it, and its parameters stay the same objects in the same storage."""
    model = with_lora(tiny_llama().to(dtype))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    before = picture(model)
    report = initialize(model)
    assert differences(before, picture(model)) == expected_changes(report)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_packed_row_and_memory_for_one_layer_at_a_time():
    """Several passes leave as little behind as one."""
    model = lived_in(with_lora(tiny_llama()))
    before = picture(model)
    report = initialize(model, loader(packed), LoraDAConfig(samples=8, memory_budget=1e-6))
    assert (
        report.plan.startswith("streamed: 2 segments of 1 layer, each run 7 times")
        and report.sample_unit == "document (from position_ids)"
    )
    assert differences(before, picture(model)) == expected_changes(report)


@pytest.mark.parametrize("width", [{"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}])
def test_a_quantised_base(width, tmp_path):
    """The quantised weights, their statistics and the state of their layers are those of before."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = lived_in(with_lora(tiny_quantized(tmp_path, **width)))
    before = picture(model)
    report = initialize(model)
    assert differences(before, picture(model)) == expected_changes(report)


@pytest.mark.compat("several-adapters")
def test_other_adapters_do_not_change():
    """Nor do they matter: a trained, active adapter stays both, and what is initialised is the base's own start."""
    model, alone = (with_lora(tiny_llama()) for _ in range(2))
    model.add_adapter("second", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.fill_(0.1)
    before = picture(model)
    assert initialize(model, adapter_name="second").initialized == 14
    changed = differences(before, picture(model))
    assert len(changed) == 28 and all(name.endswith(".second.weight: bits") for name in changed)
    assert model.active_adapters == ["default"]

    initialize(alone)
    bits, expected = model_bits(model), model_bits(alone)
    assert all(bits[name.replace("default", "second")] == expected[name] for name in expected if "lora_" in name)


def test_a_collator_that_draws_at_random():
    """Whichever generator it draws from, it stays where it was."""
    model = with_lora(tiny_llama())

    def collate(rows):
        random.random(), np.random.rand(), torch.rand(1)
        return pad(rows)

    before = picture(model)
    report = initialize(model, loader(collate))
    assert differences(before, picture(model)) == expected_changes(report)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_switched_off(off):
    """A caller who has switched gradients off gets the same factors, and finds them switched off again."""
    model, other = (with_lora(tiny_llama()) for _ in range(2))
    before = picture(model)
    with off():
        report = initialize(model)
        assert not torch.is_grad_enabled() and torch.is_inference_mode_enabled() is (off is torch.inference_mode)
    assert differences(before, picture(model)) == expected_changes(report)
    initialize(other)
    assert differences(model_bits(model), model_bits(other)) == []


def model_bits(model):
    return {name: content(tensor) for name, tensor in named_tensors(model)}


TRACES = {
    "a bit of a weight": lambda m: m.lm_head.weight.data[0, :1].mul_(2),
    "a bit of a buffer": lambda m: m.model.rotary_emb.inv_freq[:1].mul_(2),
    "another storage": lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight.data.clone()),
    "a gradient": lambda m: setattr(m.lm_head.weight, "grad", torch.zeros_like(m.lm_head.weight)),
    "a flag of a parameter": lambda m: m.lm_head.weight.requires_grad_(not m.lm_head.weight.requires_grad),
    "a flag of a module": lambda m: setattr(m.model.layers[1].mlp, "training", False),
    "a hook": lambda m: m.model.layers[0].register_forward_hook(print),
    "a backward hook": lambda m: m.model.layers[0].register_full_backward_hook(print),
    "a patched forward": lambda m: setattr(m.model, "forward", m.model.forward),
    "an attribute": lambda m: setattr(m.model.layers[0].self_attn, "attention_dropout", 0.25),
    "a parked attribute": lambda m: setattr(m.model.layers[0], "statistics", object()),
    "an entry of the config": lambda m: setattr(m.config, "use_cache", False),
    "torch's generator": lambda m: torch.rand(1),
    "numpy's generator": lambda m: np.random.rand(),
    "python's generator": lambda m: random.random(),
}


@pytest.mark.parametrize("kind", TRACES)
def test_every_trace_would_be_seen(kind):
    """The counterpart of everything above: pictures tell."""
    model = with_lora(tiny_llama())
    before = picture(model)
    assert differences(before, picture(model)) == []
    TRACES[kind](model.get_base_model())
    assert len(differences(before, picture(model))) >= 1


def test_a_changed_peft_config_would_be_seen():
    model = with_lora(tiny_llama())
    before = model_picture(model)
    model.peft_config["default"].init_lora_weights = False
    assert differences(before, model_picture(model)) == ["peft_config[default]"]


@pytest.mark.compat("gaussian", "rslora", "reload")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("start", [True, "gaussian"])
def test_the_saved_adapter_is_a_plain_one(kind, start, tmp_path):
    """Loaded onto a fresh base it gives the same logits, and its config says of its start what it said before."""
    build = BUILDERS[kind]
    model = with_lora(build(), init_lora_weights=start, use_rslora=True)
    model.save_pretrained(tmp_path / "before", save_embedding_layers=False)
    initialize(model)
    model.save_pretrained(tmp_path / "after", save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(build(), tmp_path / "after")

    batch = pad(documents(3, seed=7))
    logits, again, base = (
        m.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for m in (model, loaded, build())
    )
    assert torch.equal(logits, again)
    assert not torch.allclose(logits, base, rtol=0, atol=1e-6)  # the start is not where the base is

    configs = [json.loads((tmp_path / time / "adapter_config.json").read_text()) for time in ("before", "after")]
    assert configs[0] == configs[1] and configs[1]["init_lora_weights"] == start
    assert shapes(tmp_path / "before") == shapes(tmp_path / "after")
    assert {path.name for path in (tmp_path / "after").iterdir()} == {
        path.name for path in (tmp_path / "before").iterdir()
    }


def shapes(folder):
    return {name: (value.shape, value.dtype) for name, value in load_file(folder / "adapter_model.safetensors").items()}
