"""What training adds at random is off while statistics are taken: they are those of the same model without it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from collecting import PLAIN_PASS, watching
from models import (
    VOCABULARY,
    batches,
    checkpoint,
    documents,
    seeded,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
    with_lora,
)
from picture import differences, picture
from settings import as_solved
from transformers import DbrxConfig, DbrxForCausalLM, FalconConfig, FalconForCausalLM
from transformers.integrations.neftune import neftune_post_forward_hook

from lora_da import initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.model.state import estimation_mode
from lora_da.samples.draw import Size, draw, read_causal
from lora_da.tasks.head import backward

DATA = batches(documents(6), 3)


def tiny_falcon(**config):
    """Reads its dropout from the config while it computes."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "new_decoder_architecture": False}
    return seeded(FalconForCausalLM, FalconConfig(**{**sizes, **plain, **config}))


def tiny_dbrx(dropout=0.0):
    """Calls its dropouts `pdrop`."""
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": VOCABULARY}
    attention = {"attn_pdrop": dropout, "kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}
    experts = {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1}
    config = DbrxConfig(**sizes, attn_config=attention, ffn_config=experts, resid_pdrop=dropout, emb_pdrop=dropout)
    return seeded(DbrxForCausalLM, config)


def with_neftune(model):
    """Switch it on as transformers' trainer does."""
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 50.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    return model


def with_noise_of_its_own(model):
    """The same, with a strength that no attribute tells."""

    def add_noise(module, args, output):
        return output + torch.randn_like(output) if module.training else output

    model.get_input_embeddings().register_forward_hook(add_noise)
    return model


def layerdrop_only():
    return tiny_opt(dropout=0.0, layerdrop=0.5, num_hidden_layers=6)


# Each without its noise and with it; weights are the same.
NOISE = {
    "attention": (tiny_llama, lambda: tiny_llama(attention_dropout=0.5)),
    "attention, eager": (
        lambda: tiny_llama(attn_implementation="eager"),
        lambda: tiny_llama(attn_implementation="eager", attention_dropout=0.5),
    ),
    "modules": (
        lambda: tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        lambda: tiny_gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    ),
    "functional": (
        lambda: tiny_opt(dropout=0.0),
        lambda: tiny_opt(dropout=0.5, attention_dropout=0.5, activation_dropout=0.5),
    ),
    "layerdrop": (lambda: tiny_opt(dropout=0.0, num_hidden_layers=6), layerdrop_only),
    "router jitter": (tiny_mixtral, lambda: tiny_mixtral(router_jitter_noise=0.5)),
    "config": (tiny_falcon, lambda: tiny_falcon(hidden_dropout=0.5, attention_dropout=0.5)),
    "pdrop": (tiny_dbrx, lambda: tiny_dbrx(0.5)),
    "NEFTune": (tiny_llama, lambda: with_neftune(tiny_llama())),
    "embeddings": (tiny_llama, lambda: with_noise_of_its_own(tiny_llama())),
}
# Linear layers in the families above; experts and routers are parameter tensors or custom layers.
TARGETS = r".*\.(q_proj|v_proj|o_proj|out_proj|Wqkv|query_key_value|c_attn|down_proj|fc2|dense_4h_to_h|c_proj)"
EXPERTS = ("router jitter", "pdrop")


def adapted(kind, noisy, **lora):
    targets = r".*\.(q_proj|o_proj|Wqkv|out_proj)" if kind in EXPERTS else TARGETS
    return with_lora(NOISE[kind][noisy](), target_modules=targets, lora_dropout=0.5 * noisy, **lora)


def statistics(model, mode):
    """Take every layer's, as the product does, with the model in the given mode."""
    layers = {layer.name: layer.base for layer in find_adapter(model).layers}
    collector, base = watching(layers), model.get_base_model()
    data = draw(DATA, Size(6), None, None, read_causal, True)
    with mode, collector.observing():
        for batch in data.batches:
            collector.reading(batch.counted(), torch.device("cpu"), {})
            inputs = {name: value for name, value in batch.inputs.items() if name != "labels"}
            backward(base, base.get_decoder(), inputs, batch.tokens, PLAIN_PASS)
    found = {name: collector.sums.take_statistics(name, data.n_samples, 1.0) for name in layers}
    return {
        f"{name}.{field}": getattr(statistics, field)
        for name, statistics in found.items()
        if statistics is not None  # noise may leave a layer out
        for field in ("grad", "input_cov", "output_fisher")
    }


@contextlib.contextmanager
def training_mode(model):
    """The model as a training step finds it, adapters aside: the estimation without its care for noise."""
    with model.train().disable_adapter():
        yield


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", NOISE)
def test_statistics_are_without_noise(kind):
    """Bit for bit those of the model without any; without the estimation mode they are not."""
    clean, noisy = adapted(kind, False), adapted(kind, True)
    expected = statistics(clean, estimation_mode(clean))
    torch.manual_seed(1)
    assert equal(statistics(noisy, estimation_mode(noisy)), expected)

    assert equal(statistics(clean, training_mode(clean)), expected)
    assert not equal(statistics(noisy, training_mode(noisy)), expected)


@pytest.mark.parametrize("kind", NOISE)
def test_noise_is_on_again(kind):
    """After the initialisation every dropout and hook is what it was, and the factors are those without noise."""
    clean, noisy = adapted(kind, False), adapted(kind, True)
    before = picture(noisy)
    config = as_solved(samples=6)
    report = initialize_lora_da_weights(noisy, DATA, config, show_progress=False)
    assert all(": bits" in name and "lora_" in name for name in differences(before, picture(noisy)))
    initialize_lora_da_weights(clean, DATA, config, show_progress=False)
    weights = dict(clean.named_parameters())
    assert report.initialized == report.targeted
    assert all(torch.equal(p, weights[name]) for name, p in noisy.named_parameters() if "lora_" in name)


def test_checkpointing_stays_on():
    """Also a model that comes in eval mode is in train mode, where checkpointing works: layers are computed twice."""
    model = with_lora(tiny_llama()).eval()
    checkpoint(model.get_base_model(), reentrant=True)
    calls = []
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    statistics(model, estimation_mode(model))
    assert calls == [False, True] * len(DATA)


@pytest.mark.parametrize("asked", [False, True])
def test_a_balancing_loss_that_is_left_out_is_noted(asked):
    """In the report and by a warning; the config is as it was."""
    model = with_lora(tiny_mixtral(output_router_logits=asked), target_modules=["q_proj"])
    report = initialize_lora_da_weights(model, DATA, as_solved(samples=6), show_progress=False)
    assert [note for note in report.notes if "`output_router_logits`" in note] == report.notes
    assert len(report.notes) == asked and model.get_base_model().config.output_router_logits is asked
