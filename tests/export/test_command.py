"""`python -m lora_da`: from a model's folder and a file to an adapter, and one sentence for every slip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from caching import identical
from models import WIDE, adapter_weights, tiny_llama, with_lora
from peft import PeftModel
from settings import as_solved
from stacks import stacked
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from words import LETTERS, as_lines, tokenizer

from lora_da import initialize_lora_da_weights
from lora_da.__main__ import main
from lora_da.export.rows import TokenizedRows
from lora_da.samples.rows import collate

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": " ".join(LETTERS[n % 5 :]), "completion": f" {' '.join(LETTERS[: 2 + n % 4])}"} for n in range(12)]
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
CONFIGS = {"--load-in-4bit": NF4, "--load-in-8bit": BitsAndBytesConfig(load_in_8bit=True), None: None}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(**WIDE).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    as_lines(tmp_path / "rows.jsonl", ROWS)
    return tmp_path / "rows.jsonl"


def command(model, data, output, *more):
    return ["--model", str(model), "--data", str(data), "--output", str(output), "--device", "cpu", *more]


def expected_adapter(model, quantisation=None, samples=8, **lora):
    """What one's own program of a few lines makes of the same rows."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto", quantization_config=quantisation, device_map="cpu")
    peft_model = with_lora(base, **lora)
    loader = DataLoader(TokenizedRows(ROWS, tokenizer(), 2048), collate_fn=collate)
    initialize_lora_da_weights(peft_model, loader, as_solved(samples=samples), show_progress=False)
    return adapter_weights(peft_model)


@pytest.mark.compat("command")
@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path, model, data):
    """Progress goes to stderr, the one line to stdout."""
    options = ["--rank", "4", "--alpha", "8", "--samples", "8", "--first-step", "gamma"]
    arguments = command(model, data, tmp_path / "out", *options)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lora_da", *arguments], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.strip().splitlines()
    assert line.startswith("LoRA-DA: initialised 14 of 14 layers from 8 samples")
    assert "12 rows" in done.stderr and f"saved in {tmp_path / 'out'}" in done.stderr
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert identical(adapter_weights(loaded), expected_adapter(model))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")


@pytest.mark.compat("command")
@pytest.mark.parametrize("option", CONFIGS)
def test_the_adapter_is_that_of_ones_own_program(tmp_path, model, data, option, capsys):
    if option is not None:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    more = ["--samples", "8", "--rank", "4", "--first-step", "gamma"] + ([option] if option else [])
    assert main(command(model, data, tmp_path / "out", *more)) == 0
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", quantization_config=CONFIGS[option], device_map="cpu"
    )
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert identical(adapter_weights(loaded), expected_adapter(model, CONFIGS[option]))
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.compat("command", "target-parameters")
def test_experts_in_one_parameter_are_exported(tmp_path, data):
    """PEFT loads what was saved, on the model as it is stored: one matrix an expert."""
    folder, targets = tmp_path / "mixture", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    stacked("Qwen3Moe").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    more = ["--samples", "8", "--rank", "4", "--first-step", "gamma", "--target-modules", "o_proj"]
    assert main(command(folder, data, tmp_path / "out", *more, "--target-parameters", *targets)) == 0
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    expected = expected_adapter(folder, target_modules=["o_proj"], target_parameters=targets)
    assert identical(adapter_weights(loaded), expected)
    assert sum(value.shape[0] == 16 for name, value in expected.items() if "lora_A" in name) == 8


def test_options_reach_what_they_are_for(tmp_path, model, data):
    more = ["--rank", "3", "--alpha", "5", "--target-modules", "q_proj", "v_proj", "--samples", "6"]
    more += ["--preset", "reference", "--gamma", "512", "--max-length", "8", "--dtype", "bfloat16"]
    assert main(command(model, data, tmp_path / "out", *more)) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (3, 5, ["q_proj", "v_proj"])
    report = json.loads((tmp_path / "out" / "lora_da_report.json").read_text())
    assert (report["samples"], report["population_size"], report["settings"]["preset"]) == (6, 12, "reference")
    assert (report["settings"]["gamma"], report["settings"]["first_step"]) == (512.0, "gamma")
    # Of each of the six rows a prompt of 7 − n mod 5 words, a completion of 2 + n mod 4, and the end.
    assert report["tokens"] == sum(min(8, 7 - n % 5 + 2 + n % 4 + 1) for n in range(6))


def test_a_second_command_takes_the_cache(tmp_path, model, data, capsys):
    for number in range(2):
        more = ["--samples", "8", "--cache-dir", str(tmp_path / "cache"), "--learning-rate", "1e-9"]
        assert main(command(model, data, tmp_path / str(number), *more)) == 0
    first, chosen, second, chosen_again = capsys.readouterr().out.strip().splitlines()
    assert chosen == chosen_again and chosen.startswith("LoRA-DA: loss on 4 other documents ")
    assert chosen.endswith("; lora_A × 32 for a learning rate of 1e-09")
    assert second.endswith("; from the cache") and not first.endswith("from the cache")
    files = [(tmp_path / str(n) / "adapter_model.safetensors").read_bytes() for n in range(2)]
    assert files[0] == files[1]


SLIPS = {
    "no such data": (["--data", "nowhere.jsonl"], "there is no file or folder nowhere.jsonl"),
    "no such model": (["--model", "nowhere/at-all"], "--model nowhere/at-all: "),
    "no GPU": (["--device", "cuda"], "sees no CUDA GPU here; set another, or cpu"),
    "no such device": (["--device", "gpu"], "--device is 'gpu'; set cpu, cuda, or cuda:1"),
    "rank": (["--rank", "0"], "--rank is 0; set at least 1"),
    "alpha": (["--alpha", "0"], "--alpha is 0; set at least 1"),
    "rank above a layer": (["--rank", "70"], "its rank 70 is above that; set a smaller `r`"),
    "samples": (["--samples", "-1"], "--samples is -1; set at least 1"),
    "learning rate": (["--learning-rate", "0"], "--learning-rate is 0.0; set a number above 0"),
    "max-length": (["--max-length", "0"], "--max-length is 0; set at least 1"),
    "layers": (["--target-modules", "nothing"], "--target-modules nothing: "),
    "parameters": (
        ["--target-parameters", "mlp.nothing"],
        "--target-parameters mlp.nothing: the model has no parameter",
    ),
    "nothing to learn": (["--max-length", "1"], "none of the first 12 rows has a token that carries loss"),
    "cache": (["--cache-dir", __file__], "lora_da.cache_dir is "),
}


@pytest.mark.filterwarnings("ignore:.*no parameter was matched:RuntimeWarning")  # PEFT's
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_one_sentence_and_leaves_nothing(tmp_path, model, data, slip, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if slip == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    more, message = SLIPS[slip]
    assert main(command(model, data, tmp_path / "out", *more)) == 1
    out, err = capsys.readouterr()
    last = [line for line in err.splitlines() if line.startswith("lora_da: ")][-1]
    assert message in last and out == ""
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}


def test_an_output_that_holds_something(tmp_path, model, data, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert main(command(model, data, tmp_path / "out", "--samples", "4")) == 1
    assert "out is not empty; choose another one, or set overwrite (--overwrite)" in capsys.readouterr().err
    assert main(command(model, data, tmp_path / "out", "--samples", "4", "--overwrite")) == 0
    assert (tmp_path / "out" / "mine").exists() and (tmp_path / "out" / "adapter_config.json").exists()


def test_bitsandbytes_that_is_missing(tmp_path, model, data, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(command(model, data, tmp_path / "out", "--load-in-4bit")) == 1
    assert "need bitsandbytes; run: pip install bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--load-in-4bit", "--load-in-8bit"], ["--rank", "many"]])
def test_arguments_that_cannot_be_parsed(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2 and "usage: python -m lora_da" in capsys.readouterr().err


def test_help_is_quick_and_imports_nothing_heavy():
    """Also where there is no torch: it cannot be found in this process."""
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'transformers', 'peft', 'numpy', 'datasets'): sys.modules[name] = None\n"
        "sys.argv = ['lora_da', '--help']\n"
        "runpy.run_module('lora_da', run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - begun < 5  # torch alone takes as long where cores are scarce
    for option in ("--model", "--data", "--output", "--load-in-4bit", "--cache-dir", "messages", "completion"):
        assert option in done.stdout
