"""The key of a solution: the same for the same run, another where anything that the solution depends on is another."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from models import (
    QUANTISED,
    VOCABULARY,
    batches,
    checkpoint,
    documents,
    packed,
    pad,
    tiny_llama,
    tiny_quantized,
    with_lora,
)
from picture import content, model_picture
from torch.utils.data import DataLoader

import lora_da.cache.fingerprint
from lora_da import LoraDAConfig, LoraDAError
from lora_da.adapter import find_adapter
from lora_da.cache.fingerprint import fingerprint
from lora_da.model.state import estimation_mode
from lora_da.samples.draw import Size, draw, read_causal

ROWS = documents(12)
SMALL = LoraDAConfig(samples=8)


def key(model=None, data=None, config=SMALL):
    model = with_lora(tiny_llama()) if model is None else model
    with estimation_mode(model):
        drawn = draw(
            data or batches(ROWS, 4), Size(*config.size()), config.seed, config.population_size, read_causal, True
        )
        return fingerprint(model, find_adapter(model), drawn, config)


PLAIN = key()


def base_of(folder, kind):
    if kind == "unquantised":
        return tiny_llama()
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return tiny_quantized(folder, **QUANTISED[kind])


def stored(model):
    """Every tensor a base is made of, found one by one: parameters, buffers, and the states of quantised weights."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, parameter in list(found.items()):
        state = getattr(parameter, "quant_state", None)
        for owner, inner in ((state, ""), (getattr(state, "state2", None), "state2.")):
            held = {} if owner is None else vars(owner)
            found |= {f"{name}.{inner}{n}": t for n, t in held.items() if isinstance(t, torch.Tensor)}
        if getattr(parameter, "SCB", None) is not None:
            found[f"{name}.SCB"] = parameter.SCB
    return found


def flip(tensor, chance):
    """Turn one bit over; done twice with the same chance, nothing has changed."""
    raw = tensor.data.view(-1).view(torch.uint8)
    raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)


@pytest.mark.compat("cache")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unquantised", *QUANTISED])
def test_one_bit_of_anything_stored_is_another_key(tmp_path, kind):
    base = base_of(tmp_path, kind)
    tensors = stored(base)
    states = {"unquantised": 0, "4-bit": 14 * 5, "8-bit": 14}[kind]  # absmax, map, offset and the absmax's own two
    assert len(tensors) == 21 + len(list(base.buffers())) + states
    model = with_lora(base)
    before = key(model)
    for seed, (name, tensor) in enumerate(tensors.items()):
        flip(tensor, random.Random(seed))
        assert key(model) != before, name
        flip(tensor, random.Random(seed))
    assert key(model) == before


def swap(one, other):
    one.data, other.data = other.data.clone(), one.data.clone()


def swap_numbers(weight):
    weight.data[3, [1, 4]] = weight.data[3, [4, 1]]


BASE_CHANGES = {
    "two numbers change places": lambda m: swap_numbers(m.lm_head.weight),
    "two rows change places": lambda m: m.lm_head.weight.data.copy_(m.lm_head.weight.data[[1, 0, *range(2, 128)]]),
    "two layers change places": lambda m: swap(
        m.model.layers[0].mlp.up_proj.weight, m.model.layers[1].mlp.up_proj.weight
    ),
    "two signs": lambda m: m.lm_head.weight.data[7, 3:5].neg_(),
    "all signs": lambda m: m.lm_head.weight.data.neg_(),
    "another dtype": lambda m: m.model.norm.bfloat16(),  # of ones: the same numbers
    "the config": lambda m: setattr(m.config, "rms_norm_eps", 1e-3),
    "the attention": lambda m: m.set_attn_implementation("eager"),
    "the loss": lambda m: setattr(m, "loss_function", print),
}


@pytest.mark.parametrize("change", BASE_CHANGES)
def test_another_base_is_another_key(change):
    model = with_lora(tiny_llama())
    BASE_CHANGES[change](model.get_base_model())
    assert key(model) != PLAIN


class OtherLlama(type(tiny_llama())):
    """The same weights under another class."""


def test_another_class_is_another_key():
    base = tiny_llama()
    base.__class__ = OtherLlama
    assert key(with_lora(base)) != PLAIN


def without_loss(rows):
    return [{**rows[0], "labels": [-100] * 3 + rows[0]["labels"][3:]}, *rows[1:]]


def other_token(rows):
    ids = [(rows[0]["input_ids"][0] + 1) % VOCABULARY, *rows[0]["input_ids"][1:]]
    return [{**rows[0], "input_ids": ids}, *rows[1:]]


DATA_CHANGES = {
    "a token of a prompt": batches(other_token(ROWS), 4),
    "a label that is masked": batches(without_loss(ROWS), 4),
    "another row": batches([*ROWS[:3], documents(1, seed=9)[0], *ROWS[4:]], 4),
    "a row less": batches(ROWS[:7], 4),
    "another number of rows to train on": batches(ROWS + ROWS, 4),
    "another padding": batches(ROWS, 4, side="left"),
    "packed": [packed(ROWS)],
    "a number for the model": [{**b, "extra": 3} for b in batches(ROWS, 4)],
    "a switch for the model": [{**b, "extra": None} for b in batches(ROWS, 4)],
    "a list for the model": [{**b, "extra": [torch.ones(1)]} for b in batches(ROWS, 4)],
    "another list for the model": [{**b, "extra": [torch.zeros(1)]} for b in batches(ROWS, 4)],
}


def test_other_data_are_another_key():
    keys = {name: key(data=data) for name, data in DATA_CHANGES.items()}
    assert len({PLAIN, *keys.values()}) == 1 + len(keys), keys


def test_documents_told_apart_otherwise_are_another_key():
    """The same tokens in one row, as two documents or as one."""
    rows = [{**packed(ROWS[:2])}, {**packed(ROWS[:2])}]
    rows[1]["position_ids"] = torch.arange(rows[1]["position_ids"].numel()).view(1, -1)
    assert key(data=rows[:1]) != key(data=rows[1:])


def with_factors_in(dtype):
    model = with_lora(tiny_llama())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


ADAPTERS = {
    "rank": lambda: with_lora(tiny_llama(), r=3),
    "alpha": lambda: with_lora(tiny_llama(), lora_alpha=9),
    "rsLoRA": lambda: with_lora(tiny_llama(), use_rslora=True),
    "gaussian": lambda: with_lora(tiny_llama(), init_lora_weights="gaussian"),
    "layers": lambda: with_lora(tiny_llama(), target_modules=["q_proj", "v_proj"]),
    "layers that are left": lambda: with_lora(tiny_llama(), target_modules=["q_proj", "v_proj", "embed_tokens"]),
    "the rank of one layer": lambda: with_lora(tiny_llama(), rank_pattern={"0.mlp.up_proj": 2}),
    "dtype": lambda: with_factors_in(torch.bfloat16),
}


def test_another_adapter_is_another_key():
    keys = {name: key(build()) for name, build in ADAPTERS.items()}
    assert len({PLAIN, *keys.values()}) == 1 + len(keys), keys


SETTINGS = {
    "method": "lora_one",
    "preset": "reference",
    "samples": 7,
    "seed": 1,
    "population_size": 1000,
    "averaging": "samples",
    "variance_weight": 0.5,
    "damping": 0.2,
    "gamma": 512.0,
    "first_step": "none",
    "chosen_rows": 0.25,
    "full_fisher_up_to": 64,
}
ONLY_ROUNDING = {"memory_budget": 1e-3, "cache_dir": "elsewhere"}
AFTERWARDS = {"match_rate": False}  # done with what was solved


def loader(shuffle=False, batch_size=4):
    return DataLoader(ROWS, batch_size, shuffle=shuffle, collate_fn=pad)


def test_another_setting_is_another_key():
    """Every field is either one that changes the key or one that is known not to."""
    assert {f.name for f in dataclasses.fields(LoraDAConfig)} == {*SETTINGS, *ONLY_ROUNDING, *AFTERWARDS}
    plain = key(data=loader())
    keys = {name: key(None, loader(), dataclasses.replace(SMALL, **{name: v})) for name, v in SETTINGS.items()}
    assert len({plain, *keys.values()}) == 1 + len(keys), keys
    for name, value in (ONLY_ROUNDING | AFTERWARDS).items():
        assert key(None, loader(), dataclasses.replace(SMALL, **{name: value})) == plain, name


@pytest.mark.parametrize("package", ["torch", "peft", "transformers", "lora-da"])
def test_another_version_is_another_key(package, monkeypatch):
    original = lora_da.cache.fingerprint.version
    if package == "lora-da":
        monkeypatch.setattr(lora_da.cache.fingerprint, "__version__", "9.9.9")
    else:
        monkeypatch.setattr(lora_da.cache.fingerprint, "version", lambda n: "9.9" if n == package else original(n))
    assert key() != PLAIN


def test_mixed_precision_is_another_key():
    keys = []
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            keys.append(key())
    assert len({PLAIN, *keys}) == 3


def with_another_adapter():
    model = with_lora(tiny_llama())
    model.add_adapter("second", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second." in name:
                parameter.fill_(0.1)
    return model


def checkpointed():
    model = with_lora(tiny_llama())
    checkpoint(model.get_base_model())
    return model


def elsewhere():
    base = tiny_llama()
    base.config._name_or_path = "/another/folder"
    return with_lora(base)


ALIKE = {
    "a fresh one": lambda: with_lora(tiny_llama()),
    "another draw of lora_A": lambda: with_lora(tiny_llama(), seed=5),
    "lora_dropout": lambda: with_lora(tiny_llama(), lora_dropout=0.1),
    "attention dropout": lambda: with_lora(tiny_llama(attention_dropout=0.1)),
    "evaluation": lambda: with_lora(tiny_llama()).eval(),
    "no cache": lambda: with_lora(tiny_llama(use_cache=False)),
    "another adapter beside it": with_another_adapter,
    "checkpointing": checkpointed,
    "another place on the disk": elsewhere,
}


@pytest.mark.parametrize("kind", ALIKE)
def test_what_does_not_matter(kind):
    assert key(ALIKE[kind]()) == PLAIN


def test_the_loader_of_the_same_rows_does_not_matter():
    assert key(data=loader(shuffle=True, batch_size=3)) == key(data=loader())


@pytest.mark.compat("cache")
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_base_keeps_its_key_and_every_bit(tmp_path, kind):
    """Loaded again, and after a forward, which moves the scales of 8-bit layers."""
    model = with_lora(base_of(tmp_path, kind))
    before = model_picture(model)
    first = key(model)
    assert model_picture(model) == before
    model.train()(**pad(ROWS[:2]))
    assert first == key(model) == key(with_lora(base_of(tmp_path, kind)))


def test_a_base_in_another_quantisation_is_another_key(tmp_path):
    keys = [key(with_lora(base_of(tmp_path / kind, kind))) for kind in QUANTISED]
    single = tiny_quantized(tmp_path / "single", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    fp4 = tiny_quantized(tmp_path / "fp4", load_in_4bit=True, bnb_4bit_quant_type="fp4")
    assert len({*keys, key(with_lora(single)), key(with_lora(fp4))}) == 4


def test_a_weight_packed_for_inference_is_refused(tmp_path):
    """Its state would be unpacked by asking for it: the base's bits would change."""
    base = base_of(tmp_path, "4-bit")
    base.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(LoraDAError, match=r"layers\.0\.mlp\.up_proj\.base_layer\.weight for CPU inference; load"):
        key(with_lora(base))


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(LoraDAError, match=r"^extra in a batch is a object, which .*; leave `cache_dir` unset$"):
        key(data=[{**b, "extra": object()} for b in batches(ROWS, 4)])
    model = with_lora(tiny_llama())
    model.get_base_model().model.norm.to("meta")
    with pytest.raises(LoraDAError, match=r"^model\.norm\.weight in the model is not in memory .* `cache_dir` unset$"):
        key(model)


def test_reading_a_base_leaves_its_bits():
    model = with_lora(tiny_llama())
    before = {name: content(p) for name, p in model.named_parameters()}
    key(model)
    assert {name: content(p) for name, p in model.named_parameters()} == before
