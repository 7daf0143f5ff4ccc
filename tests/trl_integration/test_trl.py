"""SFTTrainer with `callbacks=[LoraDAInitializer()]`: its adapter at the first step is that of the PEFT call."""

import dataclasses
import json

import pytest
import torch
from datasets import Dataset
from models import N_PROJECTIONS, adapter_weights, documents, lora, with_lora
from peft import PeftModel

pytest.importorskip("trl", reason="TRL is not installed")

from settings import as_solved
from trainers import KINDS, FirstStep, base, by_hand, same_bits, sft

from lora_da.errors import LoraDAError
from trl_integration import LoraDAInitializer

CONFIG = as_solved(samples=10)  # the last batch counts in part


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.fixture
def rows():
    return Dataset.from_list(documents(20))


@pytest.mark.compat("newest", "sft", "float32", "bfloat16", "nf4", "int8")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_adapter_is_that_of_the_peft_call(folder, tmp_path, rows, kind, dtype):
    first = FirstStep()
    trainer = sft(base(folder, kind, dtype), rows, tmp_path, LoraDAInitializer(CONFIG), first)
    trainer.train()
    expected = by_hand(base(folder, kind, dtype), trainer.train_dataset, CONFIG)
    assert same_bits(first.adapter, expected)
    assert all(weight.any() for weight in first.adapter.values())
    assert not same_bits(adapter_weights(trainer.model), expected), "the step was not taken"


def test_the_report_lies_beside_the_adapter_and_one_line_is_printed(folder, tmp_path, rows, capsys):
    initializer = LoraDAInitializer(CONFIG)
    trainer = sft(base(folder, "4-bit"), rows, tmp_path, initializer)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "adapter_config.json").exists()
    saved = json.loads((tmp_path / "lora_da_report.json").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(dataclasses.asdict(initializer.report)))
    assert saved["initialized"] == saved["targeted"] == len(saved["layers"]) == N_PROJECTIONS

    counted = documents(20)[:10]
    assert saved["samples"] == 10 and saved["population_size"] == 20
    assert saved["tokens"] == sum(len(row["input_ids"]) for row in counted)
    assert saved["loss_tokens"] == sum(label != -100 for row in counted for label in row["labels"][1:])
    lines = [line for line in capsys.readouterr().out.splitlines() if "LoRA-DA" in line]
    (line,) = lines
    assert line.startswith(
        f"LoRA-DA: initialised {N_PROJECTIONS} of {N_PROJECTIONS} layers from 10 samples, {saved['tokens']} tokens"
    )


def test_the_saved_adapter_is_a_plain_one(folder, tmp_path, rows):
    trainer = sft(base(folder, "4-bit"), rows, tmp_path, LoraDAInitializer(CONFIG), bf16=False)
    trainer.train()
    trainer.save_model()
    before = dict(base(folder, "4-bit").named_parameters())
    after = dict(trainer.model.get_base_model().named_parameters())
    assert all(torch.equal(p, after[name.replace("_proj.", "_proj.base_layer.")]) for name, p in before.items())

    reloaded = PeftModel.from_pretrained(base(folder, "4-bit"), tmp_path)
    assert reloaded.peft_config["default"].init_lora_weights is True
    for parameter in trainer.model.parameters():  # TRL keeps the adapter in bfloat16, PEFT reads it into float32
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    ids = torch.arange(6, 30).unsqueeze(0)
    with torch.no_grad():  # in train mode, with no dropout: in eval mode bitsandbytes packs weights anew on some CPUs
        assert torch.equal(reloaded.train()(ids).logits, trainer.model.train()(ids).logits)


def test_a_model_that_is_a_peft_model_already(folder, tmp_path, rows):
    first = FirstStep()
    trainer = sft(with_lora(base(folder)), rows, tmp_path, LoraDAInitializer(CONFIG), first)
    trainer.train()
    assert same_bits(first.adapter, by_hand(base(folder), trainer.train_dataset, CONFIG))


@pytest.mark.compat("modules-to-save")
def test_new_tokens_and_their_head_are_trained_beside_the_adapter(folder, tmp_path, rows):
    """TRL sets it up so where a chat template brings tokens of its own."""
    first = FirstStep()
    beside = lora(trainable_token_indices={"embed_tokens": [4, 5]}, modules_to_save=["lm_head"])
    trainer = sft(base(folder), rows, tmp_path, LoraDAInitializer(CONFIG), first, lora_config=beside)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" not in name}
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert {name.split(".")[-2] for name in trainable if "lora_" not in name} == {"trainable_tokens_delta", "default"}
    trainer.args.learning_rate = 0.0
    trainer.train()
    assert same_bits(first.adapter, by_hand(base(folder), trainer.train_dataset, CONFIG))
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)


def test_random_samples_are_those_of_the_seed(folder, tmp_path, rows):
    config, first = dataclasses.replace(CONFIG, seed=7), FirstStep()
    trainer = sft(base(folder), rows, tmp_path, LoraDAInitializer(config), first, bf16=False)
    trainer.train()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(7)).tolist()
    drawn = [trainer.train_dataset[i] for i in order]
    assert same_bits(first.adapter, by_hand(base(folder), drawn, CONFIG, bf16=False))
    assert not same_bits(first.adapter, by_hand(base(folder), trainer.train_dataset, CONFIG, bf16=False))


def test_without_an_adapter_the_error_says_so(folder, tmp_path, rows):
    trainer = sft(base(folder), rows, tmp_path, LoraDAInitializer())
    trainer = type(trainer)(
        model=base(folder),
        args=trainer.args,
        train_dataset=rows,
        processing_class=trainer.processing_class,
        callbacks=[LoraDAInitializer()],
    )
    with pytest.raises(LoraDAError, match="expected a PEFT model with a LoRA adapter, got LlamaForCausalLM"):
        trainer.train()


@pytest.mark.parametrize(("keys", "message"), [({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'")])
def test_another_init_is_refused_before_the_first_step(folder, tmp_path, rows, keys, message):
    first = FirstStep()
    trainer = sft(base(folder), rows, tmp_path, LoraDAInitializer(), first, lora_config=lora(**keys))
    with pytest.raises(LoraDAError, match=message):
        trainer.train()
    assert not first.adapter
