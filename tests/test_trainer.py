"""A plain transformers Trainer on a PEFT model, and runs that do not start at their first step."""

import json
import random
import re

import numpy as np
import pytest
import torch
from models import IGNORED, N_PROJECTIONS, VOCABULARY, adapter_weights, documents, with_lora
from tolerances import REBATCHED
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback

pytest.importorskip("trl", reason="TRL is not installed")

from settings import as_solved
from trainers import KINDS, FirstStep, base, by_hand, plain, same_bits, sft, worst_difference

from lora_da.errors import LoraDAError
from trl_integration import LoraDAInitializer

CONFIG = as_solved(samples=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.fixture
def model(folder):
    return with_lora(base(folder))


def lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("LoRA-DA")]


@pytest.mark.compat("trainer", "autocast", "checkpointing")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("args", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=["float32", "bf16"])
def test_the_adapter_is_that_of_the_peft_call(folder, tmp_path, kind, args, capsys):
    initializer, first = LoraDAInitializer(CONFIG), FirstStep()
    plain(with_lora(base(folder, kind)), documents(20), tmp_path, initializer, first, **args).train()
    expected = by_hand(with_lora(base(folder, kind)), documents(20), CONFIG, bf16="bf16" in args)
    assert same_bits(first.adapter, expected)
    assert all(weight.any() for weight in first.adapter.values())
    saved = json.loads((tmp_path / "lora_da_report.json").read_text(encoding="utf-8"))
    assert (saved["initialized"], saved["samples"], saved["population_size"]) == (N_PROJECTIONS, 10, 20)
    (line,) = lines(capsys)
    assert line.startswith(f"LoRA-DA: initialised {N_PROJECTIONS} of {N_PROJECTIONS} layers from 10 samples")


class Drawn(Dataset):
    """Rows that are made with everybody's global random states when they are asked for."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        ids = [random.randrange(3, VOCABULARY), *np.random.randint(3, VOCABULARY, 4).tolist()]
        ids += torch.randint(3, VOCABULARY, (3,)).tolist()
        return {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}


class Recording(Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), inputs["input_ids"].tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


def test_data_drawn_at_random_are_drawn_as_without_the_pass(folder, tmp_path):
    seen = []
    for callback in (LoraDAInitializer(CONFIG), TrainerCallback()):
        trainer = plain(with_lora(base(folder)), Drawn(), tmp_path, callback, kind=Recording, max_steps=3)
        trainer.train()
        seen.append(trainer.seen)
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[0][1]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(documents(20))


@pytest.mark.compat("streams")
def test_a_stream_is_read_from_its_start_and_trained_on_from_its_start(folder, tmp_path, model):
    with pytest.raises(LoraDAError, match="set `population_size`"):
        plain(model, Stream(), tmp_path, LoraDAInitializer(CONFIG)).train()
    config, first = as_solved(samples=10, population_size=20), FirstStep()
    trainer = plain(model, Stream(), tmp_path, LoraDAInitializer(config), first, kind=Recording)
    trainer.train()
    assert same_bits(first.adapter, by_hand(base(folder), documents(20), CONFIG, bf16=False))
    assert [row[:4] for row in trainer.seen[0]] == [row["input_ids"][:4] for row in documents(4)]


@pytest.mark.compat("resumed")
def test_a_resumed_run_is_left_alone(folder, tmp_path, capsys):
    args = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = plain(with_lora(base(folder)), documents(20), tmp_path, LoraDAInitializer(CONFIG), **args)
    whole.train()
    assert len(lines(capsys)) == 1

    initializer = LoraDAInitializer(CONFIG)
    resumed = plain(with_lora(base(folder), seed=9), documents(20), tmp_path, initializer, **args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert lines(capsys) == ["LoRA-DA: left the adapter as it is: training resumes at step 1"]
    assert initializer.report.skipped == "training resumes at step 1"
    assert same_bits(adapter_weights(resumed.model), adapter_weights(whole.model))
    saved = json.loads((tmp_path / "lora_da_report.json").read_text(encoding="utf-8"))
    assert saved["initialized"] == N_PROJECTIONS, "the report of the first start was lost"


@pytest.mark.compat("second-train")
@pytest.mark.parametrize("make", [plain, sft])
def test_a_second_train_goes_on_from_the_first(tmp_path, model, make, capsys):
    from datasets import Dataset as Rows

    first = FirstStep()
    trainer = make(model, Rows.from_list(documents(20)), tmp_path, LoraDAInitializer(CONFIG), first)
    trainer.train()
    trained, first.adapter = adapter_weights(trainer.model), {}
    trainer.train()
    assert same_bits(first.adapter, trained)
    started, left = lines(capsys)
    assert started.startswith("LoRA-DA: initialised")
    assert left == "LoRA-DA: left the adapter as it is: it carries trained weights"


@pytest.mark.compat("trained-adapter")
def test_a_trained_adapter_is_left_alone(tmp_path, model, capsys):
    last = [parameter for name, parameter in model.named_parameters() if "lora_B" in name][-1]
    last.data[0, 0] = 1e-3
    before, first, initializer = adapter_weights(model), FirstStep(), LoraDAInitializer(CONFIG)
    plain(model, documents(20), tmp_path, initializer, first).train()
    assert same_bits(first.adapter, before)
    assert initializer.report.skipped == "it carries trained weights"
    assert lines(capsys) == ["LoRA-DA: left the adapter as it is: it carries trained weights"]
    assert not (tmp_path / "lora_da_report.json").exists()


class OutOfMemoryOnce:
    """What a GPU says where a batch is too large for it, the first time it is asked."""

    def __init__(self):
        self.asked = 0

    def __call__(self):
        self.asked += 1
        if self.asked == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.compat("find-batch-size")
@pytest.mark.parametrize("where", ["in the pass", "in the step"])
def test_auto_find_batch_size_starts_the_adapter_once(folder, tmp_path, model, where, capsys):
    gpu, first = OutOfMemoryOnce(), FirstStep()

    class InThePass(LoraDAInitializer):
        def around(self, args, model):
            gpu()
            return super().around(args, model)

    class InTheStep(Trainer):
        def training_step(self, *args, **kwargs):
            gpu()
            return super().training_step(*args, **kwargs)

    initializer = (InThePass if where == "in the pass" else LoraDAInitializer)(CONFIG)
    kind = InTheStep if where == "in the step" else Trainer
    trainer = plain(model, documents(20), tmp_path, initializer, first, kind=kind, auto_find_batch_size=True)
    trainer.train()
    assert gpu.asked == 2
    assert trainer.state.global_step == 1
    expected = by_hand(base(folder), documents(20), CONFIG, bf16=False)
    assert worst_difference(first.adapter, expected) < REBATCHED
    said = [re.sub(" layers.*", "", line) for line in lines(capsys)]
    ours = f"LoRA-DA: initialised {N_PROJECTIONS} of {N_PROJECTIONS}"
    left = "LoRA-DA: left the adapter as it is: it carries trained weights"
    assert said == ([ours] if where == "in the pass" else [ours, left])


def test_a_pass_that_fails_midway_leaves_the_model(tmp_path, model, monkeypatch):
    monkeypatch.setattr("lora_da.samples.draw.BATCH_TOKENS", 24)  # several batches of these short rows
    calls = []

    def fail(module, args, output):
        calls.append(module)
        if len(calls) == 2:
            raise ArithmeticError("midway")

    head = model.get_output_embeddings()
    head.register_forward_hook(fail)
    before = adapter_weights(model)
    with pytest.raises(ArithmeticError, match="midway"):
        plain(model, documents(20), tmp_path, LoraDAInitializer(CONFIG)).train()
    assert same_bits(adapter_weights(model), before)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert [m for m in model.modules() if m._forward_hooks] == [head]
    assert not any("forward" in vars(m) for m in model.get_base_model().modules())
    assert not any(layer._disable_adapters for layer in model.modules() if hasattr(layer, "_disable_adapters"))
