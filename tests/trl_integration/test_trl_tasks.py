"""The trainers of other tasks, each with its users' collator: the adapter they start from is that of the PEFT call.

Reward models and pictures on TRL's trainers; classifiers and translators on transformers' own.
"""

from __future__ import annotations

import classifiers
import image_models
import pytest
import rewards
import torch
import translators
from datasets import Dataset
from tolerances import LOSS, REBATCHED
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

pytest.importorskip("trl", reason="TRL is not installed")

import image_chats
from models import adapter_weights, lora
from settings import as_solved
from trainers import COMMON, FirstStep, same_bits, tokenizer, worst_difference
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from lora_da import initialize_lora_da_weights
from lora_da.tasks import RewardLoss
from trl_integration import LoraDAInitializer

CONFIG = as_solved(samples=12)


def lists(rows):
    """What datasets hold."""
    return [{name: value.tolist() for name, value in row.items()} for row in rows]


def trained(trainer, first, initializer):
    """One step; what it began with, and what the trainer's own forward made of the rest."""
    model = trainer.model
    others = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    problem = getattr(model.config, "problem_type", None)
    kept = {}

    def look(args, state, control, **kwargs):
        kept.update({name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name})
        kept["problem"] = model.config.problem_type if hasattr(model.config, "problem_type") else None

    first.on_train_begin = look
    trainer.train()
    assert kept.pop("problem") == problem and same_bits(kept, others)
    assert initializer.report.initialized == initializer.report.targeted
    assert not first.seen["grad"]
    return first.adapter


def by_hand(model, rows, collate, bf16=False, **options):
    loader = DataLoader(list(rows), 4, collate_fn=collate)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        initialize_lora_da_weights(model, loader, CONFIG, show_progress=False, **options)
    return adapter_weights(model)


def callbacks():
    return [LoraDAInitializer(CONFIG), FirstStep()]


@pytest.mark.compat("sequence-classification", "trainer")
@pytest.mark.parametrize("kind", ["Llama", "Bert", "ModernBert"])
@pytest.mark.parametrize("make", [classifiers.single, classifiers.several])
def test_sequence_classification(tmp_path, kind, make):
    rows = make(12)
    initializer, first = callbacks()
    trainer = Trainer(
        model=classifiers.adapted(classifiers.classifier(kind)),
        args=TrainingArguments(str(tmp_path), **COMMON),
        train_dataset=Dataset.from_list(lists(rows)).rename_column("labels", "label"),
        data_collator=DataCollatorWithPadding(tokenizer()),
        callbacks=[initializer, first],
    )
    found = trained(trainer, first, initializer)
    hand = by_hand(classifiers.adapted(classifiers.classifier(kind)), rows, classifiers.pad)
    assert same_bits(found, hand)
    assert initializer.report.samples == initializer.report.loss_tokens == 12


@pytest.mark.compat("token-classification", "trainer")
@pytest.mark.parametrize("kind", ["Llama", "Roberta"])
def test_token_classification(tmp_path, kind):
    rows = classifiers.tagged(12)
    initializer, first = callbacks()
    trainer = Trainer(
        model=classifiers.adapted(classifiers.classifier(kind, "Token")),
        args=TrainingArguments(str(tmp_path), **COMMON),
        train_dataset=Dataset.from_list(lists(rows)),
        data_collator=DataCollatorForTokenClassification(tokenizer()),
        callbacks=[initializer, first],
    )
    found = trained(trainer, first, initializer)
    hand = by_hand(classifiers.adapted(classifiers.classifier(kind, "Token")), rows, classifiers.pad)
    assert same_bits(found, hand)


@pytest.mark.compat("encoder-decoder", "seq2seq-trainer")
@pytest.mark.parametrize("kind", ["T5", "Bart"])
@pytest.mark.parametrize("told", [True, False])
def test_sequence_to_sequence(tmp_path, kind, told):
    """The collator is told the model or not; told, it makes the decoder's inputs."""
    rows = translators.pairs(12)
    initializer, first = callbacks()
    model = translators.adapted(translators.translator(kind))
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(str(tmp_path), **COMMON),
        train_dataset=Dataset.from_list(lists(rows)),
        data_collator=DataCollatorForSeq2Seq(tokenizer(), model=model if told else None),
        callbacks=[initializer, first],
    )
    found = trained(trainer, first, initializer)
    hand = by_hand(translators.adapted(translators.translator(kind)), rows, translators.pad)
    assert same_bits(found, hand)


@pytest.mark.compat("reward")
@pytest.mark.parametrize("center", [None, 0.3])
@pytest.mark.parametrize("margins", [False, True])
def test_reward(tmp_path, center, margins):
    """The report's loss is what the trainer itself computes for the untouched model."""
    rows = rewards.pairs(12, margins)
    initializer, first = callbacks()
    names = {"chosen": "chosen_ids", "rejected": "rejected_ids"}
    trainer = RewardTrainer(
        model=rewards.reward_model(),
        args=RewardConfig(
            output_dir=str(tmp_path),
            center_rewards_coefficient=center,
            **{**COMMON, "per_device_train_batch_size": 12, "bf16": False, "learning_rate": 0.0},
        ),
        train_dataset=Dataset.from_list(lists(rows)).rename_columns(names),
        processing_class=tokenizer(),
        peft_config=lora(task_type="SEQ_CLS", init_lora_weights=True),
        callbacks=[initializer, first],
    )
    before = adapter_weights(trainer.model)
    found = trained(trainer, first, initializer)
    assert not same_bits(found, before)
    model = classifiers.adapted(rewards.reward_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.copy_(before[name])
    assert same_bits(found, by_hand(model, rows, rewards.pad, reward=RewardLoss(center)))
    assert initializer.report.samples == initializer.report.population_size == 12
    with model.disable_adapter():
        untouched = trainer.compute_loss(model, rewards.pad(rows))
    assert initializer.report.loss == pytest.approx(untouched.item(), rel=LOSS)


@pytest.mark.compat("trainer-images")
@pytest.mark.parametrize("kind", ["chats", "some without a picture", "prompts and completions"])
def test_images(tmp_path, kind):
    """TRL's collator makes them of pictures as it goes; here each row is made by itself and batched by the tests."""
    rows = image_chats.chats(12)
    if kind == "some without a picture":
        for row in rows[::3]:
            row["images"], row["messages"][0]["content"] = [], row["messages"][0]["content"][1:]
    if kind == "prompts and completions":
        rows = [{"images": r["images"], "prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in rows]
    initializer, first = callbacks()
    trainer = SFTTrainer(
        model=image_models.reader("Llava"),
        args=SFTConfig(str(tmp_path), **{**COMMON, "loss_type": "nll", "bf16": False, "max_length": None}),
        train_dataset=Dataset.from_list(rows),
        processing_class=image_chats.processor(),
        peft_config=lora(target_modules=image_models.LANGUAGE, init_lora_weights=True),
        callbacks=[initializer, first],
    )
    before = adapter_weights(trainer.model)
    found = trained(trainer, first, initializer)
    made = []
    for row in rows:
        batch = trainer.data_collator([row])
        assert (batch["input_ids"] == image_models.IMAGE).sum() == 4 * len(row["images"])
        made.append({**batch, "input_ids": batch["input_ids"][0], "labels": batch["labels"][0]})
    model = image_models.adapted(image_models.reader("Llava"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.copy_(before[name])
    hand = by_hand(model, made, image_models.pad)
    assert worst_difference(found, hand) < REBATCHED and not same_bits(found, before)
