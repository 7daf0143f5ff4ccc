"""Training goes on as if the initial adapter had come from nowhere: same batches, randomness, counts and flags."""

import pytest
import torch
from datasets import Dataset
from models import adapter_weights, documents, lora
from transformers import TrainerCallback

pytest.importorskip("trl", reason="TRL is not installed")

from settings import as_solved
from trainers import FirstStep, base, same_bits, sft
from trl import SFTTrainer

from trl_integration import LoraDAInitializer

STEPS = 7  # into the second epoch of 20 rows, four of them at a time
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_tokens_per_second")


class Transplant(TrainerCallback):
    """Gives the adapter the weights that another run started from: what training would be without a pass."""

    def __init__(self, weights):
        self.weights = weights

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if name in self.weights:
                parameter.data.copy_(self.weights[name])


class Recording(SFTTrainer):
    """Keeps the token ids and the random state of every training step."""

    def training_step(self, model, inputs, *args, **kwargs):
        found = inputs["input_ids"].tolist(), torch.get_rng_state().tolist()
        self.steps = [*getattr(self, "steps", []), found]
        return super().training_step(model, inputs, *args, **kwargs)


def run(folder, tmp_path, rows, callback, **args):
    first = FirstStep()
    trainer = sft(
        base(folder, args.pop("kind", "unquantised"), attention_dropout=0.3),
        rows,
        tmp_path,
        callback,
        first,
        kind=Recording,
        lora_config=lora(lora_dropout=0.2),
        include_num_input_tokens_seen="all",
        max_steps=STEPS,
        **args,
    )
    trainer.train()
    return trainer, first


def streamed(rows):
    return rows.to_iterable_dataset().shuffle(seed=5, buffer_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.mark.parametrize(
    ("prepared", "args"),
    [
        (lambda rows: rows, {}),
        (lambda rows: rows, {"kind": "4-bit", "gradient_accumulation_steps": 2, "logging_steps": 3}),
        (lambda rows: rows, {"packing": True, "max_length": 32, "gradient_checkpointing": False}),
        (lambda rows: rows, {"neftune_noise_alpha": 5, "bf16": False}),
        (streamed, {}),
    ],
    ids=["padded", "4-bit, accumulating", "packed", "neftune", "streamed"],
)
def test_only_the_adapter_differs(folder, tmp_path, prepared, args):
    rows = prepared(Dataset.from_list(documents(20)))
    config = as_solved(samples=10, population_size=20)
    ours, ours_first = run(folder, tmp_path, rows, LoraDAInitializer(config), **args)
    free, free_first = run(folder, tmp_path, rows, Transplant(ours_first.adapter), **args)
    assert same_bits(ours_first.adapter, free_first.adapter)
    assert ours_first.seen == free_first.seen
    assert ours.steps == free.steps

    def log(trainer):
        return [{k: v for k, v in entry.items() if k not in TIMES} for entry in trainer.state.log_history]

    assert log(ours) == log(free)
    assert ours.state.num_input_tokens_seen == free.state.num_input_tokens_seen > 0
    assert ours.state.total_flos == free.state.total_flos
    assert ours._total_train_tokens == free._total_train_tokens > 0
    assert ours._metrics == free._metrics
    assert same_bits(adapter_weights(ours.model), adapter_weights(free.model))
    assert not same_bits(adapter_weights(ours.model), ours_first.adapter)


def test_the_random_state_is_that_of_an_untouched_run(folder, tmp_path):
    """Without any callback: the transplant itself could not be seen to draw random numbers."""
    rows = Dataset.from_list(documents(20))
    ours, ours_first = run(folder, tmp_path, rows, LoraDAInitializer(as_solved(samples=10)))
    free, free_first = run(folder, tmp_path, rows, TrainerCallback())
    assert ours_first.seen == free_first.seen
    assert ours.steps == free.steps
    assert not same_bits(ours_first.adapter, free_first.adapter)
