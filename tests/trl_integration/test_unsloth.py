"""SFTTrainer on models of Unsloth's, where it is installed (`make unsloth`): on its CPU backend."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

os.environ["UNSLOTH_FORCE_CPU"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    unsloth = pytest.importorskip("unsloth", reason="Unsloth is not installed; `make unsloth` installs it")

import torch
import trl
from datasets import Dataset
from models import N_PROJECTIONS, WIDE, documents, tiny_llama
from settings import as_solved
from torch._dynamo.utils import counters
from trainers import FirstStep, base, by_hand, same_bits, sft, tokenizer
from transformers import BitsAndBytesConfig

from trl_integration import LoraDAInitializer

pytestmark = pytest.mark.filterwarnings("default")
CONFIG = as_solved(samples=10)  # the last batch counts in part
# What its `load_in_4bit` asks bitsandbytes for.
IN_4BIT = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(**WIDE).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def adapted(folder, in_4bit=False, checkpointing=False):
    """Load the model and add an adapter, both by Unsloth."""
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, dtype=torch.float32, load_in_4bit=in_4bit
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=4, lora_alpha=8, use_gradient_checkpointing="unsloth" if checkpointing else False
    )
    patched = vars(model.get_base_model())["forward"]
    assert patched.__func__.__module__.startswith("unsloth"), "no model of Unsloth's"
    return model


def trained(model, tmp_path, *callbacks):
    rows = Dataset.from_list(documents(20))
    trainer = sft(model, rows, tmp_path, *callbacks, kind=trl.SFTTrainer, bf16=False)
    trainer.train()
    return trainer


@pytest.mark.compat("unsloth")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("in_4bit", [False, True], ids=["float32", "4-bit"])
def test_the_adapter_is_that_of_the_peft_call_in_plain_transformers(folder, tmp_path, in_4bit, checkpointing, capsys):
    first, initializer = FirstStep(), LoraDAInitializer(CONFIG)
    trainer = trained(adapted(folder, in_4bit, checkpointing), tmp_path, initializer, first)
    plain = base(folder, **({"quantization_config": IN_4BIT} if in_4bit else {}))
    assert same_bits(first.adapter, by_hand(plain, trainer.train_dataset, CONFIG, bf16=False))
    assert f"initialised {N_PROJECTIONS} of {N_PROJECTIONS} layers from 10 samples" in capsys.readouterr().out
    assert trainer.state.global_step == 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


class Compiled(FirstStep):
    """Counts what was compiled up to the first step."""

    graphs = None

    def on_step_begin(self, *args, **kwargs):
        super().on_step_begin(*args, **kwargs)
        self.graphs = counters["stats"]["unique_graphs"] if self.graphs is None else self.graphs


@pytest.mark.slow
def test_its_compiled_blocks_run_as_written_in_the_pass(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_CPU_COMPILE", "1")
    model = adapted(folder)
    assert model.get_base_model()._unsloth_cpu_compiled
    counters.clear()
    first = Compiled()
    trainer = trained(model, tmp_path, LoraDAInitializer(CONFIG), first)
    assert first.graphs == 0 < counters["stats"]["unique_graphs"]
    assert same_bits(first.adapter, by_hand(base(folder), trainer.train_dataset, CONFIG, bf16=False))


@pytest.mark.slow
def test_what_its_code_for_a_gpu_fuses_is_lifted(tmp_path):
    program = Path(__file__).parents[1] / "support" / "unsloth_fused.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("6 functions lifted and put back") == 2, done.stdout
