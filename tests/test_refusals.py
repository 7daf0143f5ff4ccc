"""What LoRA-DA does not serve is refused: the message says what was seen, and the model stays as it was, bit by bit."""

from __future__ import annotations

import pytest
import torch
from models import (
    IGNORED,
    LAYERS,
    batches,
    documents,
    llama_config,
    seeded,
    tiny_gpt2,
    tiny_llama,
    with_lora,
)
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from picture import differences, picture
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    LlamaForCausalLM,
)

from lora_da import LoraDAConfig, LoraDAError, initialize_lora_da_weights

DATA = batches(documents(8), 4)
SMALL = LoraDAConfig(samples=8)


def initialize(model, data=DATA, config=SMALL, **options):
    return initialize_lora_da_weights(model, data, config, show_progress=False, **options)


def check_refused(model, match, data=DATA, **options):
    before = picture(model)
    with pytest.raises(LoraDAError, match=match):
        initialize(model, data, **options)
    assert differences(before, picture(model)) == []


def llama(**lora):
    return with_lora(tiny_llama(), **lora)


def two_adapters(active):
    model = llama()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(active)
    return model


def merged():
    model = llama()
    model.merge_adapter()
    return model


def masked_language_model():
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = seeded(BertForMaskedLM, BertConfig(**sizes, intermediate_size=48))
    return with_lora(base, task_type=None, target_modules=["query"])


def question_answering():
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = seeded(BertForQuestionAnswering, BertConfig(**sizes, intermediate_size=48))
    return with_lora(base, task_type="QUESTION_ANS", target_modules=["query"])


class DecoderElsewhere(LlamaForCausalLM):
    """Nothing says what is below its head: no name, and no part that has its embeddings."""

    base_model_prefix = "nowhere"

    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def get_input_embeddings(self):
        return self.tokens

    def get_decoder(self):
        return self


def no_transformer():
    return get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))


def ia3():
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    return get_peft_model(tiny_llama(), config)


def prompt_tuning():
    return get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def offloaded():
    """A model as `device_map` leaves it that puts a layer on the disk."""
    model = llama()
    base = model.get_base_model().model.layers[1].mlp.up_proj.base_layer
    base.weight = nn.Parameter(base.weight.to("meta"), requires_grad=False)
    return model


def offloaded_embeddings():
    model = llama()
    model.get_base_model().model.embed_tokens.to("meta")
    return model


MODELS = {
    "offloaded embeddings": (offloaded_embeddings, "parameter of the input embeddings is on the meta device"),
    "offloaded": (
        offloaded,
        r"parameter .*layers\.1\.mlp\.up_proj\.base_layer\.weight is on the meta device.*load it whole",
    ),
    "no PEFT model": (
        tiny_llama,
        "expected a PEFT model with a LoRA adapter, got LlamaForCausalLM; call get_peft_model",
    ),
    "IA3": (ia3, "adapter 'default' is IA3Config; LoRA-DA initialises LoRA adapters"),
    "prompt tuning": (prompt_tuning, "adapter 'default' is PromptTuningConfig"),
    "several active": (
        lambda: two_adapters(["default", "second"]),
        r"2 adapters are active \(default, second\); pass `adapter_name`, one of default, second",
    ),
    "embeddings only": (
        lambda: llama(target_modules=["embed_tokens"]),
        r"adapter 'default' targets no layer .*embed_tokens \(Embedding\); check target_modules",
    ),
    "PiSSA": (lambda: llama(init_lora_weights="pissa"), "init_lora_weights='pissa'.*`peft_init_lora_weights`"),
    "OLoRA": (lambda: llama(init_lora_weights="olora"), "init_lora_weights='olora'.*leave it at True or 'gaussian'"),
    "orthogonal": (lambda: llama(init_lora_weights="orthogonal"), "init_lora_weights='orthogonal'"),
    "random B": (lambda: llama(init_lora_weights=False), "init_lora_weights=False"),
    "rank": (
        lambda: llama(r=17),
        r"layer .*layers\.0\.self_attn\.k_proj is 16 × 32, its rank 17 is above that; set a smaller `r`.*`rank_p",
    ),
    "merged": (merged, "layer .*q_proj has merged adapters; call `unmerge_adapter"),
    "masked language model": (
        masked_language_model,
        "BertForMaskedLM compares the logits of a token with its own label, where LoRA-DA expects the next one's label",
    ),
    "question answering": (question_answering, "BertForQuestionAnswering has no language-model head"),
    "unknown decoder": (
        lambda: with_lora(seeded(DecoderElsewhere, llama_config())),
        "DecoderElsewhere names no decoder",
    ),
    "no transformers model": (no_transformer, "Sequential is not a transformers model"),
}


@pytest.mark.refused("other-init", "other-adapters", "merged", "wide-rank", "masked-lm", "question-answering")
@pytest.mark.parametrize("kind", MODELS)
def test_models_and_adapters(kind):
    build, message = MODELS[kind]
    check_refused(build(), message)


def test_an_unknown_adapter():
    check_refused(
        two_adapters(["default"]),
        "there is no adapter 'third'; set `adapter_name` to one of default, second",
        adapter_name="third",
    )


def test_the_named_adapter_is_taken():
    """The counterpart: with a name, several adapters are no obstacle, and only the named one is written."""
    model = two_adapters(["default"])
    before = picture(model)
    assert initialize(model, adapter_name="second").initialized == 2
    changed = differences(before, picture(model))
    assert len(changed) == 4 and all(".second.weight: bits" in name for name in changed)


@pytest.mark.compat("rank-pattern")
@pytest.mark.parametrize(
    "lora",
    [
        {"init_lora_weights": "gaussian"},
        {"use_rslora": True},
        {"r": 16},
        {"lora_dropout": 0.1},
        {"rank_pattern": {"q_proj": 2}},
    ],
)
def test_plain_lora_is_served(lora):
    """The counterpart: what only looks like the above is not refused."""
    report = initialize(llama(**lora))
    assert report.initialized == report.targeted == 14


def masked(batch):
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


def without_labels(batch):
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def breaks_off():
    yield DATA[0]
    yield without_labels(DATA[1])


DATASETS = {
    "empty": ([], "the dataset is empty"),
    "all masked": ([masked(batch) for batch in DATA], "all labels are -100; check the chat template"),
    "no labels": (
        [without_labels(batch) for batch in DATA],
        r"no `labels` \(keys seen: input_ids, attention_mask\); use a collator that adds them",
    ),
    "no labels later": ([DATA[0], without_labels(DATA[1])], "no `labels`"),
    "four dimensions": (
        [{**batch, "attention_mask": torch.ones(4, 1, 9, 9)} for batch in DATA],
        r"`attention_mask` has shape \(4, 1, 9, 9\)",
    ),
    "no length": (iter(DATA), "no length.*`population_size`"),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_data(kind):
    data, message = DATASETS[kind]
    check_refused(llama(), message, data)


def test_data_that_break_off():
    check_refused(llama(), "no `labels`", breaks_off(), config=LoraDAConfig(samples=8, population_size=8))


def test_a_seed_without_a_dataset():
    check_refused(llama(), "`seed: 1`.*leave `seed` unset", config=LoraDAConfig(samples=8, seed=1))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(poison):
    model = llama()
    with torch.no_grad():
        model.get_base_model().get_input_embeddings().weight[:, 3] = poison
    check_refused(model, "the loss of the init samples is nan on the untouched base model; check the data")


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_layer_that_is_never_called(build):
    """A fused kernel may compute with the layer's weight and pass the layer by.

    An error although it is but one of more than twenty layers, which a layer without a solution would not be.
    """
    model = with_lora(build(num_hidden_layers=3) if build is tiny_llama else build(n_layer=6))
    path = "model.layers.1.mlp" if build is tiny_llama else "transformer.h.1.mlp"
    mlp = model.get_base_model().get_submodule(path)

    def fused(x):
        if build is tiny_llama:
            return nn.functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)
        return mlp.act(mlp.c_fc(x)) @ mlp.c_proj.weight

    mlp.forward = fused
    layer = "down_proj" if build is tiny_llama else "c_proj"
    check_refused(model, rf"^layer .*1\.mlp\.{layer} was never reached by a gradient: its forward is replaced")


def test_an_adapter_that_was_trained_is_left_alone(capsys):
    """One layer with a lora_B is enough; a line says so."""
    model = llama()
    with torch.no_grad():
        model.get_submodule(f"{LAYERS}.1.mlp.up_proj").lora_B["default"].weight[3, 1] = 1e-3
    before = picture(model)
    report = initialize(model)
    assert differences(before, picture(model)) == []
    assert capsys.readouterr().out == "LoRA-DA: left the adapter as it is: it carries trained weights\n"
    assert report.skipped == "it carries trained weights" and report.initialized == 0 and report.layers == {}


def test_a_second_call_changes_nothing():
    model = llama()
    assert initialize(model).skipped is None
    before = picture(model)
    assert initialize(model, batches(documents(8, seed=9), 4)).skipped is not None
    assert differences(before, picture(model)) == []


@pytest.mark.refused("images")
def test_batches_with_images():
    """Only the text would be read, and the statistics would be of another model than the one that is trained."""
    data = [{**batch, "pixel_values": torch.zeros(4, 3, 8, 8)} for batch in DATA]
    check_refused(llama(), "the batches hold pixel_values: LoRA-DA estimates on text only", data)


def test_an_all_zero_weight_is_served():
    """A block that was added at zero has no norm to compare the step with."""
    model = llama(target_modules=["o_proj"])
    torch.nn.init.zeros_(model.get_base_model().model.layers[0].self_attn.o_proj.base_layer.weight)
    assert initialize(model).initialized == 2
