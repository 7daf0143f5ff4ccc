"""Bodies that are not where, or not what, the library's names promise: found all the same, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from collecting import worst
from every_class import built
from models import LENGTHS, VOCABULARY, documents, pad, seeded, tiny_llama, with_lora
from oracle import oracle_statistics
from peft import LoraConfig, get_peft_model
from picture import differences, picture
from planning import Way, collected_by
from settings import as_solved
from tolerances import FLOAT32, LOSS, WRONG
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from lora_da import LoraDAError, initialize_lora_da_weights
from lora_da.tasks import find_task

ROWS = documents(LENGTHS)
RETURNED: dict[str, Callable[[Any], Any]] = {
    "tuple": lambda output: (output.last_hidden_state, None),
    "tuple of one": lambda output: (output.last_hidden_state,),
    "tensor": lambda output: output.last_hidden_state,
}


def own_code(kind: str) -> LlamaForCausalLM:
    """A Llama as a checkpoint's own code may have it: its body returns no output of the library, and nor does it."""
    model = tiny_llama()
    body, original, head = model.model, model.model.forward, model.lm_head

    def forward(*args: Any, **kwargs: Any) -> Any:
        return RETURNED[kind](original(*args, **kwargs))

    def whole(input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = body(input_ids, **kwargs)
        logits = head(output if isinstance(output, Tensor) else output[0])
        return model.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY), logits

    body.forward, model.forward = forward, whole
    return model


WAYS = pytest.mark.parametrize(
    "way", [Way(), Way(cuts=2), Way(parts=2, cut=False)], ids=["one pass", "streamed", "2 passes"]
)


@WAYS
@pytest.mark.parametrize("kind", RETURNED)
def test_a_body_of_ones_own_gives_the_oracles_statistics(kind: str, way: Way) -> None:
    model = get_peft_model(own_code(kind), LoraConfig(r=4, target_modules="all-linear"))
    ours = collected_by(model, [pad(ROWS)], way)
    assert worst(ours, oracle_statistics(tiny_llama(), ROWS, list(ours), "tokens")) <= FLOAT32


def tiny_bloom(**config: Any) -> BloomForCausalLM:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    return seeded(BloomForCausalLM, BloomConfig(**{**sizes, "hidden_dropout": 0.0, "attention_dropout": 0.0, **config}))


def test_a_config_that_asks_for_tuples_changes_nothing() -> None:
    found = []
    for config in ({}, {"return_dict": False}):
        model = with_lora(tiny_bloom(**config), task_type=None)
        settings = as_solved(samples=4)
        report = initialize_lora_da_weights(model, [pad(ROWS)], settings, show_progress=False)
        found.append((report.loss, {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}))
    (loss, one), (other_loss, other) = found
    assert other_loss == pytest.approx(loss, rel=LOSS)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_body_without_hidden_states_is_named() -> None:
    model = with_lora(tiny_llama())
    body = model.get_base_model().model
    original = body.forward
    body.forward = lambda *args, **kwargs: {"states": original(*args, **kwargs).last_hidden_state}
    with pytest.raises(LoraDAError, match="LlamaModel returns a dict without hidden states; not supported"):
        initialize_lora_da_weights(model, [pad(ROWS)], as_solved(samples=4), show_progress=False)


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **{f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos", "cls", "sep"))},
}


def modernbert() -> PreTrainedModel:
    """`get_decoder()` is its head."""
    return seeded(ModernBertDecoderForCausalLM, ModernBertDecoderConfig(**SMALL, attention_dropout=0.0))


def llama4() -> PreTrainedModel:
    """`get_decoder()` is another model with a head, of which it is that model itself."""
    text = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    sizes = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "image_size": 28}
    return seeded(Llama4ForConditionalGeneration, Llama4Config(text_config=text, vision_config={**vision, **sizes}))


@pytest.mark.parametrize(("build", "targets"), [(modernbert, ["Wo", "q_proj"]), (llama4, ["q_proj", "o_proj"])])
def test_models_whose_decoder_is_misnamed(build: Callable[[], PreTrainedModel], targets: list[str]) -> None:
    """The loss is that of the model's own forward, and so is what its layers are given."""
    base, batch = build(), pad(ROWS)
    names = [n for n, m in base.named_modules() if n.split(".")[-1] in targets and "vision" not in n]
    model = with_lora(base, target_modules=names)
    try:
        with torch.no_grad(), model.disable_adapter():
            expected = model(**batch, use_cache=False).loss.item()
    except AttributeError as error:  # Llama 4 without images, in transformers 5.24
        pytest.skip(f"the model's own forward fails in this transformers: {error}")
    report = initialize_lora_da_weights(model, [batch], as_solved(samples=4), show_progress=False)
    assert report.initialized == report.targeted == len(names) > 0
    assert report.loss == pytest.approx(expected, rel=LOSS)


class NamesItsHead(LlamaForCausalLM):
    """`get_decoder()` is the head, as of ModernBERT's decoders."""

    def get_decoder(self) -> Any:
        return self.lm_head


class NamesItself(LlamaForCausalLM):
    def get_decoder(self) -> Any:
        return self


class Around(LlamaForCausalLM):
    """`get_decoder()` is another model with a head, as of Llama 4 for conditional generation."""

    def get_decoder(self) -> Any:
        return Named(self)


class Named(LlamaForCausalLM):
    """The same model under another name."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.__dict__ = model.__dict__

    def get_decoder(self) -> Any:
        return self.model


@pytest.mark.parametrize("kind", [LlamaForCausalLM, NamesItsHead, NamesItself, Around])
def test_the_body_is_what_is_below_the_head(kind: type[PreTrainedModel]) -> None:
    model = seeded(kind, tiny_llama().config)
    assert find_task(model).body is model.model
    adapted = with_lora(model)
    report = initialize_lora_da_weights(adapted, [pad(ROWS)], as_solved(samples=4), show_progress=False)
    assert report.initialized == report.targeted == 14


class HandsEmbeddings(LlamaForCausalLM):
    """Its own forward makes more of a batch than its body would: the token ids, in their place, are None."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        embedded = self.model.embed_tokens(input_ids) * 3
        logits = self.lm_head(self.model(None, inputs_embeds=embedded, **kwargs).last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=VOCABULARY)
        return CausalLMOutput(loss=loss, logits=logits)


@WAYS
def test_the_body_reads_what_the_models_own_forward_hands_it(way: Way) -> None:
    def build() -> LlamaForCausalLM:
        return seeded(HandsEmbeddings, tiny_llama().config)

    ours = collected_by(with_lora(build()), [pad(ROWS)], way)
    assert worst(ours, oracle_statistics(build(), ROWS, list(ours), "tokens")) <= FLOAT32
    assert worst(ours, oracle_statistics(tiny_llama(), ROWS, list(ours), "tokens")) > WRONG


def test_a_body_that_is_not_run_is_named() -> None:
    base = tiny_llama()
    other = tiny_llama().model
    base.forward = lambda input_ids, labels=None, **kwargs: other(input_ids)
    with pytest.raises(LoraDAError, match="LlamaForCausalLM does not run its LlamaModel"):
        initialize_lora_da_weights(with_lora(base), [pad(ROWS)], as_solved(samples=4), show_progress=False)


def test_embeddings_may_be_changed_in_place() -> None:
    """CTRL scales its own."""

    def build() -> CTRLLMHeadModel:
        sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return seeded(CTRLLMHeadModel, CTRLConfig(**sizes, resid_pdrop=0.0, embd_pdrop=0.0))

    ours = collected_by(with_lora(build()), [pad(ROWS)])
    assert worst(ours, oracle_statistics(build(), ROWS, list(ours), "tokens")) <= FLOAT32


@pytest.mark.refused("unshifted")
@pytest.mark.parametrize("name", ["BartForCausalLM", "XLMWithLMHeadModel", "XLNetLMHeadModel"])
def test_a_loss_that_is_not_shifted_is_refused(name: str) -> None:
    """No name says so: it is seen in the gradient of one label's loss."""
    model = with_lora(built(name), task_type=None)
    before = picture(model)
    message = f"{name} compares the logits of a token with its own label, where LoRA-DA expects the next one's label"
    with pytest.raises(LoraDAError, match=message):
        initialize_lora_da_weights(model, [pad(ROWS)], as_solved(samples=4), show_progress=False)
    assert differences(before, picture(model)) == []


def test_a_head_that_reads_more_than_hidden_states_is_refused() -> None:
    """ProphetNet predicts several tokens at once."""
    model = with_lora(built("ProphetNetForCausalLM"), task_type=None)
    with pytest.raises(LoraDAError, match=r"the head of ProphetNetForCausalLM cannot be run on .* hidden states alone"):
        initialize_lora_da_weights(model, [pad(ROWS)], as_solved(samples=4), show_progress=False)


def test_a_layer_that_returns_a_tuple_is_named() -> None:
    base = built("Llama4ForCausalLM")
    routers = [name for name, _ in base.named_modules() if name.endswith("router")]
    model = with_lora(base, r=1, target_modules=["q_proj", *routers])
    with pytest.raises(LoraDAError, match=r"router \(Llama4Router\) returns a tuple, .*take it out of target_modules"):
        initialize_lora_da_weights(model, [pad(ROWS)], as_solved(samples=4), show_progress=False)
