"""The chunked head: the model's own loss and gradients, without the logits of a whole batch."""

from dataclasses import replace

import pytest
import torch
from collecting import PLAIN_PASS
from models import LENGTHS, NO_DROPOUT, VOCABULARY, documents, packed, pad, seeded, with_lora
from tolerances import LOSS, REORDERED
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import lora_da.tasks.head
from lora_da.model.state import estimation_mode
from lora_da.samples.tokens import read_tokens
from lora_da.tasks.head import backward

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma2": {"final_logit_softcapping": 3.0},  # does something to its logits
    "gemma3_text": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, **NO_DROPOUT},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "mixtral": {"num_local_experts": 2},
}


def build(kind: str):
    known = CONFIG_MAPPING[kind]
    config = known(
        **{k: v for k, v in SIZES.items() if k != "head_dim" or "head_dim" in vars(known())}, **ARCHITECTURES[kind]
    )
    return seeded(AutoModelForCausalLM.from_config, config)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradients_are_those_of_the_models_own_loss(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_da.tasks.head, "CHUNK", 7)  # several chunks, the last one short
    model = build(kind).train()
    batch = pad(documents(LENGTHS))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    tokens, doubled = read_tokens(batch, 100), replace(PLAIN_PASS, scale=2.0)
    n_loss = int(tokens.loss_tokens.sum())

    def embedding_gradient(run) -> torch.Tensor:
        """The gradient at the decoder's input sees everything between it and the loss."""
        seen = []
        hook = model.get_input_embeddings().register_forward_hook(
            lambda m, a, out: seen.append(out) or out.retain_grad()
        )
        try:
            run()
        finally:
            hook.remove()
        return seen[0].grad

    losses = []
    chunked = embedding_gradient(
        lambda: losses.append(backward(model, model.get_decoder(), inputs, tokens, doubled).item())
    )
    whole = embedding_gradient(lambda: (model(**batch, use_cache=False).loss * n_loss * 2.0).backward())
    assert torch.linalg.norm(chunked - whole) <= REORDERED * torch.linalg.norm(whole)
    assert losses[0] == pytest.approx(model(**batch).loss.item() * n_loss, rel=LOSS)
    assert "forward" not in vars(model.get_decoder())


def test_the_head_never_sees_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_da.tasks.head, "CHUNK", 8)
    model = with_lora(build("llama"))
    base = model.get_base_model()
    rows = []
    hook = base.lm_head.register_forward_hook(lambda m, a, out: rows.append(out.shape[:-1].numel()))
    batch = packed(documents((40, 50)))
    tokens = read_tokens(batch, 100)
    with estimation_mode(model):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        backward(base, base.get_decoder(), inputs, tokens, PLAIN_PASS)
    hook.remove()
    assert max(rows) <= 8 + 1
    assert sum(rows) - len(rows) == tokens.loss_tokens.sum()


def test_a_forward_that_was_patched_on_the_decoder_is_put_back() -> None:
    base = build("llama")
    decoder = base.model
    original = decoder.forward
    decoder.forward = lambda *a, **k: original(*a, **k)
    patched = decoder.forward
    batch = pad(documents(LENGTHS))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    backward(base, decoder, inputs, read_tokens(batch, 9), PLAIN_PASS)
    assert decoder.forward is patched
