"""Classifiers: statistics against autograd in float64, padding and batches without effect, heads untouched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from classifiers import HEADS, LINEAR, K, adapted, classifier, in_batches, losses, number, pad, several, single, tagged
from collecting import PLAIN_PASS, worst
from dequantized import dequantized, four_bit
from models import PREFIX, WIDE
from peft import PeftModel
from picture import differences, picture
from planning import ONE, WAYS, collected_by, surveyed_model
from settings import as_solved
from task_oracle import statistics_of
from tolerances import FLOAT32, LOSS
from torch.utils.data import DataLoader

from lora_da import LoraDAError, initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.tasks import find_task

KINDS = ("Llama", "GPT2", "Bert", "Roberta", "ModernBert", "DistilBert")
LABELS = {"one label": (single, {}), "several labels": (several, {}), "a number": (number, {"num_labels": 1})}
AVERAGING = ("samples", "tokens")


def targets(model: PeftModel) -> list[str]:
    return [layer.name.removeprefix(PREFIX) for layer in find_adapter(model).layers]


def check(kind, head, rows, batches, way=ONE, averaging="tokens", tolerance=FLOAT32, **config):
    model = adapted(classifier(kind, head, **config))
    ours = collected_by(model, batches, way, averaging)
    twin = classifier(kind, head, **config)
    oracle = statistics_of(twin, rows, losses, targets(model), averaging)
    assert {name: s.n_tokens for name, s in ours.items()} == {name: s.n_tokens for name, s in oracle.items()}
    assert worst(ours, oracle) < tolerance


@pytest.mark.compat("sequence-classification")
@pytest.mark.parametrize("averaging", AVERAGING)
@pytest.mark.parametrize("kind", KINDS)
def test_one_label_a_row(kind, averaging):
    rows = single()
    check(kind, "Sequence", rows, in_batches(rows, 3), averaging=averaging)


@pytest.mark.compat("sequence-classification")
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_labels_and_numbers(kind, labels):
    make, config = LABELS[labels]
    rows = make()
    check(kind, "Sequence", rows, in_batches(rows, 3), **config)


@pytest.mark.compat("token-classification")
@pytest.mark.parametrize("averaging", AVERAGING)
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Bert", "Roberta", "ModernBert"])
def test_labels_of_tokens(kind, averaging):
    rows = tagged()
    check(kind, "Token", rows, in_batches(rows, 3), averaging=averaging)


@pytest.mark.parametrize(("head", "make"), [("Sequence", single), ("Token", tagged)])
def test_a_config_that_asks_for_tuples_changes_nothing(head, make):
    rows = make()
    model = adapted(classifier("Bert", head, return_dict=False))
    oracle = statistics_of(classifier("Bert", head), rows, losses, targets(model), "tokens")
    assert worst(collected_by(model, in_batches(rows, 3)), oracle) < FLOAT32


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "head"), [("Llama", "Sequence"), ("ModernBert", "Sequence"), ("Bert", "Token")])
def test_every_way_of_running(kind, head, way):
    """ModernBert's blocks alone: its pooling head is behind them, and a model that is served there is not cut."""
    rows = single() if head == "Sequence" else tagged()
    model = adapted(classifier(kind, head), target_modules=LINEAR[kind])
    oracle = statistics_of(classifier(kind, head), rows, losses, targets(model), "samples")
    assert worst(collected_by(model, in_batches(rows, 3), WAYS[way], "samples"), oracle) < FLOAT32


@pytest.mark.parametrize("size", [1, 4])
def test_layers_that_read_all_tokens_in_one_list(size):
    """A shared expert's rows are the tokens of all rows, not the rows."""
    rows = single()
    targets_of = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    model = adapted(classifier("Qwen2Moe"), target_modules=targets_of)
    assert any("shared_expert" in name for name in targets(model))
    oracle = statistics_of(classifier("Qwen2Moe"), rows, losses, targets(model), "tokens")
    assert worst(collected_by(model, in_batches(rows, size)), oracle) < FLOAT32


@pytest.mark.parametrize(("head", "make"), [("Sequence", single), ("Sequence", several), ("Token", tagged)])
def test_a_batch_in_which_nothing_counts_adds_nothing(head, make):
    """One of several processes may have to run it beside the others."""
    task = find_task(classifier("Llama", head))
    batch = task.read(pad(make(3)), 100)
    nothing = replace(
        batch.tokens,
        targets=torch.full_like(batch.tokens.targets, -100),
        document=torch.full_like(batch.tokens.document, -1),
        loss_tokens=batch.tokens.loss_tokens[:0],
    )
    batch = replace(batch, tokens=nothing)
    total = task.backward(batch, task.inputs(batch, torch.device("cpu")), PLAIN_PASS)
    assert total == 0
    gradients = [p.grad for p in task.model.parameters() if p.grad is not None]
    assert gradients and all(not gradient.any() for gradient in gradients)


def test_a_pooler_is_served_with_one_vector_a_row():
    rows = single()
    model = adapted(classifier("Bert"))
    surveyed = surveyed_model(model, in_batches(rows, 3))
    assert surveyed.sequence is None and "pooler" in surveyed.why_not
    found = collected_by(model, in_batches(rows, 3))
    assert found["bert.pooler.dense"].n_tokens == len(rows)
    assert found["bert.encoder.layer.0.attention.self.query"].n_tokens == sum(len(r["input_ids"]) for r in rows)


@pytest.mark.parametrize(("kind", "head"), [("Llama", "Sequence"), ("Bert", "Token")])
def test_four_bit_equals_its_dequantised_twin(tmp_path, kind, head):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    rows = single() if head == "Sequence" else tagged()
    base = four_bit(classifier(kind, head, **WIDE), tmp_path, head="score" if kind == "Llama" else "classifier")
    twin = dequantized(base, classifier(kind, head, **WIDE))
    model = adapted(base)
    oracle = statistics_of(twin, rows, losses, targets(model), "tokens")
    assert worst(collected_by(model, in_batches(rows, 3)), oracle) < FLOAT32
    unquantised = statistics_of(classifier(kind, head, **WIDE), rows, losses, targets(model), "tokens")
    assert worst(oracle, unquantised) > 100 * FLOAT32


@pytest.mark.parametrize("extra", [0, 1, 9])
@pytest.mark.parametrize("head", ["Sequence", "Token"])
def test_padding_changes_nothing(head, extra):
    rows = single() if head == "Sequence" else tagged()
    check("Bert", head, rows, in_batches(rows, 4, extra=extra), averaging="samples")


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize(("head", "make"), [("Sequence", single), ("Sequence", several), ("Token", tagged)])
def test_batches_change_nothing(head, make, size):
    rows = make()
    check("Llama", head, rows, in_batches(rows, size), averaging="samples")


def test_rows_of_a_dataloader_are_batched_by_length():
    rows = single(12)
    check("Roberta", "Sequence", rows, DataLoader(rows, 1, collate_fn=pad))


@pytest.mark.parametrize("columns", [K, 1])
def test_labels_of_the_shape_of_tokens_stay_whole(columns):
    """(rows, k) labels beside (rows, k) token ids: what is cut and halved is decided by name."""
    rows = [{**row, "input_ids": row["input_ids"][:columns]} for row in several(4)]
    labels = torch.stack([row["labels"] for row in rows])
    inputs = {**pad(rows, extra=2), "labels": labels}
    task = find_task(classifier("Llama"))
    batch = task.read(inputs, 100)
    assert batch.shape == (4, columns + 2)
    trimmed = batch.trimmed()
    assert trimmed.shape == (4, columns) and trimmed.inputs["labels"].shape == (4, K)
    upper, lower = trimmed.halves()
    assert torch.equal(torch.cat([upper.inputs["labels"], lower.inputs["labels"]]), labels)
    oracle = statistics_of(classifier("Llama"), rows, by_several_labels, ["model.layers.0.mlp.up_proj"], "tokens")
    model = adapted(classifier("Llama"), target_modules=r"model\.layers\.0\.mlp\.up_proj")
    assert worst(collected_by(model, [inputs]), oracle) < FLOAT32


def by_several_labels(twin, unit):
    logits = twin(input_ids=unit["input_ids"][None]).logits[0]
    wanted = torch.where(unit["labels"] > 0, logits, -logits).double()
    return torch.nn.functional.softplus(-wanted).mean()[None]


@pytest.mark.parametrize("make", [single, several])
def test_rows_beyond_the_samples_do_not_count(make):
    rows = make(8)
    model, twin = adapted(classifier("Llama")), classifier("Llama")
    config = as_solved(samples=5, full_fisher_up_to=0)
    report = initialize_lora_da_weights(model, in_batches(rows, 4), config, show_progress=False)
    losses_of_five = torch.stack([losses(twin.double().eval(), row).detach()[0] for row in rows[:5]])
    assert (report.samples, report.loss_tokens, report.population_size) == (5, 5, 8)
    assert report.loss == pytest.approx(losses_of_five.mean().item(), rel=LOSS)


def test_rows_without_a_label_do_not_count():
    rows = single(8)
    unlabelled = [{**row, "labels": torch.tensor(-100)} if n % 3 == 0 else row for n, row in enumerate(rows)]
    check("Bert", "Sequence", [row for n, row in enumerate(rows) if n % 3], in_batches(unlabelled, 4))


@pytest.mark.parametrize(("kind", "head"), [("Llama", "Sequence"), ("Bert", "Sequence"), ("Bert", "Token")])
def test_only_the_adapter_changes(kind, head):
    """The head in modules_to_save, both copies of it, and what the first loss notes in the config."""
    model = adapted(classifier(kind, head))
    assert any(f"{name}.modules_to_save" in path for name in HEADS for path, _ in model.named_modules())
    before = picture(model)
    rows = single() if head == "Sequence" else tagged()
    report = initialize_lora_da_weights(model, in_batches(rows, 3), as_solved(), show_progress=False)
    assert report.initialized == report.targeted and report.samples == len(rows)
    changed = differences(before, picture(model))
    assert len(changed) == 2 * report.initialized
    assert all("lora_" in line and ": bits" in line for line in changed), changed


def test_the_objective_goes_down():
    """The step that an adapter starts with lowers the loss that it was made for."""
    rows = single(16)
    model = adapted(classifier("ModernBert"))
    batch = pad(rows)
    with torch.no_grad():
        before = model.eval()(**batch).loss
        initialize_lora_da_weights(model, [batch], as_solved(), show_progress=False)
        assert model(**batch).loss < before


@pytest.mark.parametrize(
    ("kind", "head", "data", "message"),
    [
        ("Llama", "Sequence", {"labels": None}, r"no `input_ids` \(rows, tokens\) with `labels` .*DataCollatorWith"),
        ("Bert", "Sequence", {"labels": torch.zeros(3, 4, 5)}, r"`labels` have shape \(3, 4, 5\) for 3 rows"),
        ("Bert", "Sequence", {"labels": torch.zeros(2).long()}, r"`labels` have shape \(2,\) for 3 rows"),
        ("Bert", "Token", {"labels": torch.zeros(3).long()}, r"`labels` have shape \(3,\).*one label per token"),
        ("Bert", "Sequence", {"attention_mask": torch.ones(3, 1, 4, 4)}, r"`attention_mask` has shape .*`input_ids`"),
        ("Bert", "Sequence", {"labels": torch.full((3,), -100)}, "none of the first 3 rows .* carries loss"),
        ("Bert", "Sequence", {"pixel_values": torch.zeros(3, 4)}, "the batches hold pixel_values"),
    ],
)
def test_data_are_refused(kind, head, data, message):
    model = adapted(classifier(kind, head))
    before = picture(model)
    with pytest.raises(LoraDAError, match=message):
        initialize_lora_da_weights(model, [{**pad(single(3)), **data}], show_progress=False)
    assert differences(before, picture(model)) == []


def test_a_classifier_without_a_padding_token_is_refused():
    model = adapted(classifier("Llama", pad_token_id=None))
    with pytest.raises(LoraDAError, match="no pad_token_id.*set model.config.pad_token_id"):
        initialize_lora_da_weights(model, in_batches(single(3), 1), show_progress=False)
