"""Encoder-decoders: statistics against autograd in float64, and which of their layers counts which tokens."""

from __future__ import annotations

import re

import pytest
import torch
from collecting import worst
from dequantized import dequantized, four_bit
from every_class import built
from models import IGNORED, PREFIX, checkpoint, seeded
from peft import PeftModel
from picture import differences, picture
from planning import ONE, WAYS, collected_by, surveyed_model
from settings import as_solved
from task_oracle import statistics_of
from tolerances import LOSS
from torch.utils.data import DataLoader
from transformers import (
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    T5ForSequenceClassification,
)
from translators import MODELS, adapted, in_batches, losses, of_one_length, pad, pairs, translator

from lora_da import LoraDAConfig, LoraDAError, initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.tasks import find_task

# float32 model and sums against the float64 oracle; T5's unscaled attention is steep, and its norms are float32 in both
STEEP = 1e-4
SEVERAL = WAYS["3 passes"]


def targets(model: PeftModel) -> list[str]:
    return [layer.name.removeprefix(PREFIX) for layer in find_adapter(model).layers]


def check(kind, rows, batches, way=ONE, averaging="tokens", prepare=lambda base: base):
    model = adapted(prepare(translator(kind)))
    ours = collected_by(model, batches, way, averaging)
    oracle = statistics_of(translator(kind), rows, losses, targets(model), averaging)
    assert {name: s.n_tokens for name, s in ours.items()} == {name: s.n_tokens for name, s in oracle.items()}
    assert worst(ours, oracle) < STEEP


@pytest.mark.compat("encoder-decoder")
@pytest.mark.parametrize("averaging", ["samples", "tokens"])
@pytest.mark.parametrize("way", [ONE, SEVERAL])
@pytest.mark.parametrize("kind", MODELS)
def test_against_autograd(kind, way, averaging):
    rows = pairs()
    check(kind, rows, in_batches(rows, 3), way, averaging)


@pytest.mark.parametrize("way", [ONE, SEVERAL])
@pytest.mark.parametrize("kind", MODELS)
def test_source_and_target_of_one_length(kind, way):
    """Only where a layer is, and whose output it is handed, says what it reads; every third target is masked, so that
    the encoder's counted tokens are not the decoder's."""
    rows = of_one_length()
    for row in rows[::3]:
        row["labels"][5:] = IGNORED
    whole = [{**row, "labels": row["labels"][row["labels"] != IGNORED]} for row in rows]
    check(kind, whole, in_batches(rows, 3), way)


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_whose_tokens_a_layer_counts(kind):
    rows = pairs()
    found = collected_by(adapted(translator(kind)), in_batches(rows, 3))
    source, target = (sum(len(row[name]) for row in rows) for name in ("input_ids", "labels"))
    assert source != target
    cross = r"EncDecAttention\.[kv]$|encoder_attn\.[kv]_proj$"
    of_source = {name for name, s in found.items() if s.n_tokens == source}
    assert of_source == {n for n in found if re.search(r"(^|\.)encoder\.", n) or re.search(cross, n)}
    assert {found[name].n_tokens for name in found.keys() - of_source} == {target}
    assert any(re.search(cross, name) for name in of_source)


@pytest.mark.parametrize("kind", ["T5", "Bart"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(kind, reentrant):
    rows = of_one_length()

    def checkpointed(base):
        checkpoint(base, reentrant)
        return base

    check(kind, rows, in_batches(rows, 3), prepare=checkpointed)


@pytest.mark.parametrize(("source", "target"), [(0, 5), (5, 0), (9, 9)])
def test_padding_changes_nothing(source, target):
    rows = pairs()
    batches = in_batches(rows, 4, source_extra=source, target_extra=target)
    check("Bart", rows, batches, averaging="samples")


@pytest.mark.parametrize("size", [1, 2, 7])
def test_batches_change_nothing(size):
    rows = pairs()
    check("T5", rows, in_batches(rows, size), averaging="samples")


def test_rows_of_a_dataloader_are_batched_by_length():
    rows = pairs(12)
    check("Bart", rows, DataLoader(rows, 1, collate_fn=pad))


def test_decoder_inputs_of_the_users_own():
    """DataCollatorForSeq2Seq makes them when it is given the model; a mask says which of them the decoder reads."""
    rows, base = pairs(), translator("Bart")
    batches = in_batches(rows, 3)
    for batch in batches:
        batch["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(batch["labels"])
        batch["decoder_attention_mask"] = (batch["labels"] != IGNORED).long()
    check("Bart", rows, batches)


def test_a_batch_is_cut_and_halved_on_both_sides():
    rows = pairs()
    task = find_task(translator("T5"))
    padded = task.read(pad(rows, source_extra=4, target_extra=3), 100)
    trimmed = padded.trimmed()
    source, target = (max(len(row[name]) for row in rows) for name in ("input_ids", "labels"))
    assert padded.shape == (7, source + 4 + target + 3)
    assert trimmed.shape == (7, source + target) and trimmed.length == source + target
    for half, part in zip(trimmed.halves(), (rows[:3], rows[3:]), strict=True):
        alone = task.read(pad(part), 100)
        assert half.shape == alone.shape and half.n_counted == alone.n_counted
        assert all(torch.equal(half.inputs[name], value) for name, value in alone.inputs.items())
        assert torch.equal(half.tokens.document, alone.tokens.document) and torch.equal(half.source, alone.source)
    assert max(trimmed.glimpse().shape) <= source + target


def test_rows_without_a_label_count_nowhere():
    rows = pairs(8)
    masked = [{**r, "labels": torch.full_like(r["labels"], IGNORED)} if n % 3 == 0 else r for n, r in enumerate(rows)]
    check("T5", [row for n, row in enumerate(rows) if n % 3], in_batches(masked, 4))


def test_four_bit_equals_its_dequantised_twin(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    wide = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    rows, base = pairs(), four_bit(translator("Bart", **wide), tmp_path)
    twin = dequantized(base, translator("Bart", **wide))
    model = adapted(base)
    oracle = statistics_of(twin, rows, losses, targets(model), "tokens")
    assert worst(collected_by(model, in_batches(rows, 3)), oracle) < STEEP


@pytest.mark.parametrize("kind", MODELS)
def test_only_the_adapter_changes(kind):
    model = adapted(translator(kind))
    before = picture(model)
    report = initialize_lora_da_weights(model, in_batches(pairs(), 3), as_solved(), show_progress=False)
    assert report.initialized == report.targeted == len(targets(model))
    changed = differences(before, picture(model))
    assert len(changed) == 2 * report.initialized and all("lora_" in c and ": bits" in c for c in changed), changed


def test_a_small_budget_is_several_passes():
    """It has no row of blocks; the plan says why."""
    model, batches = adapted(translator("T5")), in_batches(pairs(), 3)
    assert surveyed_model(model, batches).why_not == "it has an encoder and a decoder"
    config = LoraDAConfig(memory_budget=1e-4)
    report = initialize_lora_da_weights(model, batches, config, show_progress=False)
    assert "passes (not streamed: it has an encoder and a decoder)" in report.plan
    assert report.initialized == report.targeted


def test_the_loss_goes_down():
    rows, model = pairs(16), adapted(translator("T5"))
    batch = pad(rows)
    with torch.no_grad():
        before = model.eval()(**batch).loss
        report = initialize_lora_da_weights(model, [batch], as_solved(), show_progress=False)
        assert report.loss == pytest.approx(before.item(), rel=LOSS)
        assert model(**batch).loss < before


def without(name):
    return {key: value for key, value in pad(pairs(3)).items() if key != name}


@pytest.mark.refused("audio")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (without("labels"), "no `labels`"),
        (without("input_ids"), r"no `input_ids` .*DataCollatorForSeq2Seq"),
        ({**pad(pairs(3)), "labels": torch.full((3, 4), IGNORED)}, "all labels are -100"),
        ({**pad(pairs(3)), "attention_mask": torch.ones(3, 2)}, r"`attention_mask` has shape \(3, 2\), `input_ids`"),
        ({**pad(pairs(3)), "input_features": torch.zeros(3, 4)}, "the batches hold input_features"),
    ],
)
def test_data_are_refused(data, message):
    model = adapted(translator("T5"))
    before = picture(model)
    with pytest.raises(LoraDAError, match=message):
        initialize_lora_da_weights(model, [data], show_progress=False)
    assert differences(before, picture(model)) == []


@pytest.mark.refused("encoder-decoder-classifier")
def test_a_classifier_that_is_an_encoder_decoder_is_refused():
    base = T5ForSequenceClassification(translator("T5").config)
    with pytest.raises(LoraDAError, match="T5ForSequenceClassification .*no encoder-decoders"):
        find_task(base)


@pytest.mark.refused("speech")
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("WhisperForConditionalGeneration", "input_features"),
        ("Pix2StructForConditionalGeneration", "flattened_patches"),
    ],
)
def test_encoders_that_read_no_tokens_are_refused(name, read):
    with pytest.raises(LoraDAError, match=f"{name} reads `{read}`; LoRA-DA supports encoder-decoders that read token"):
        find_task(built(name))


def test_an_encoders_own_output_is_handed_on():
    """Switch returns its routers' logits beside the hidden states; its experts are left to PEFT."""
    base, rows = built("SwitchTransformersForConditionalGeneration"), pairs()
    model = adapted(base, target_modules=["q", "k", "v", "o"])
    ours = collected_by(model, in_batches(rows, 3))
    oracle = statistics_of(built(type(base).__name__), rows, losses, targets(model), "tokens")
    assert worst(ours, oracle) < STEEP


class Elsewhere(BartForConditionalGeneration):
    """Names as its decoder what it never runs."""

    def get_decoder(self):
        return self.spare

    def __init__(self, config):
        super().__init__(config)
        self.spare = type(self.model.decoder)(config)


class Outside(BartForConditionalGeneration):
    """Names as its decoder what its encoder is in too, as Florence-2 does."""

    def get_decoder(self):
        return self.model


def test_a_decoder_that_holds_the_encoder_is_looked_into():
    model = seeded(Outside, translator("Bart").config)
    rows = pairs()
    adapter = adapted(model)
    oracle = statistics_of(translator("Bart"), rows, losses, targets(adapter), "tokens")
    assert worst(collected_by(adapter, in_batches(rows, 3)), oracle) < STEEP


def test_a_decoder_that_is_not_run_is_named():
    model = adapted(seeded(Elsewhere, translator("Bart").config), target_modules=["fc1"])
    with pytest.raises(LoraDAError, match="Elsewhere does not run its BartDecoder, which it names"):
        initialize_lora_da_weights(model, in_batches(pairs(3), 3), show_progress=False)


@pytest.mark.refused("two-models")
def test_a_decoder_with_a_head_inside_is_refused():
    """Its hidden states never come out."""
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(**sizes, intermediate_size=48)
    both = EncoderDecoderConfig.from_encoder_decoder_configs(config, config)
    both.decoder_start_token_id = both.pad_token_id = 0
    model = adapted(EncoderDecoderModel(both), target_modules=["query"])
    with pytest.raises(LoraDAError, match="does not return its last hidden state"):
        initialize_lora_da_weights(model, in_batches(pairs(3), 3), show_progress=False)
