"""`axolotl train` for real: a 4-bit base, the bare plugin name, and the adapter at step 0 against the PEFT call."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights
from tolerances import REBATCHED
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytest.importorskip("axolotl", reason="Axolotl is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
from axolotl_runs import run, train
from models import WIDE, documents, few_tokens, pad, tiny_llama, with_lora
from trainers import tokenizer

from lora_da import LoraDAConfig, initialize_lora_da_weights

pytestmark = [pytest.mark.axolotl, pytest.mark.slow]

EXAMPLE = Path(__file__).parents[2] / "examples" / "axolotl_qlora.yml"
ROWS, SAMPLES = 24, 16


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    try:
        distribution("lora-da")
    except PackageNotFoundError:
        pytest.skip("lora-da is not installed, so Axolotl's own process cannot find it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model with its tokenizer, and tokenised rows."""
    folder = tmp_path_factory.mktemp("axolotl")
    tiny_llama(**WIDE).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in few_tokens(documents(ROWS))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folder: Path, output: str, **changes: object) -> Path:
    """The example's QLoRA config on a tiny model; at a learning rate of 0 it saves the initial adapter."""
    settings = {
        **yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")),
        "base_model": str(folder / "base"),
        "lora_da": {"samples": SAMPLES},
        "lora_r": 4,
        "lora_alpha": 8,
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(folder / f"{output}-prepared"),
        "shuffle_merged_datasets": False,
        "micro_batch_size": 2,
        "dataloader_num_workers": 0,  # a worker would import everything again
        "max_steps": 1,
        "learning_rate": 0.0,
        "output_dir": str(folder / output),
        **changes,
    }
    settings.pop("chat_template")  # the rows are tokens already
    path = folder / f"{output}.yml"
    path.write_text(yaml.safe_dump(settings))
    return path


def axolotl(*arguments: str, **variables: str) -> str:
    """Run the command line; its output."""
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **variables,
    }
    run = subprocess.run(
        [programs / "axolotl", *arguments], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    output = run.stdout + run.stderr
    assert run.returncode == 0, output[-4000:]
    return output


def quantized_base(folder: Path) -> torch.nn.Module:
    """The base as Axolotl loads it."""
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.bfloat16,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=four_bit, dtype=torch.float32)


def by_peft_call(folder: Path, **changes: object) -> tuple[PeftModel, dict]:
    """The adapter that the PEFT call gives on the same samples."""
    model = with_lora(quantized_base(folder), **changes)
    loader = DataLoader(few_tokens(documents(ROWS)), 8, collate_fn=pad)
    report = initialize_lora_da_weights(model, loader, LoraDAConfig(samples=SAMPLES), show_progress=False)
    assert report.first_step.length > 0
    return model, {"samples": report.samples, "tokens": report.tokens, "loss_tokens": report.loss_tokens}


@pytest.fixture(scope="module")
def trained(folder: Path) -> str:
    """What `axolotl train` prints, on the example's config."""
    return axolotl("train", str(config(folder, "rows")))


@pytest.mark.compat("axolotl-0.19", "axolotl-qlora")
def test_train_starts_from_what_the_peft_call_gives(folder: Path, trained: str) -> None:
    assert trained.count("LoRA-DA: initialised 14 of 14 layers") == 1
    check_saved(folder, "rows")


@pytest.mark.compat("axolotl-packing", "axolotl-dora")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("packed", {"sample_packing": True, "eval_sample_packing": False, "pad_to_sequence_len": True}),
        ("dora", {"peft_use_dora": True}),
    ],
)
def test_variants_start_from_it_too(folder: Path, name: str, changes: dict) -> None:
    path = config(folder, name, **changes)
    assert_started(run(train, path, folder / name, folder / f"{name}.log").lines())
    check_saved(folder, name, use_dora=name == "dora")


def assert_started(lines: list[str]) -> None:
    first, second = lines
    assert first == "LoRA-DA: initialised 14 of 14"
    assert (
        second.startswith(f"LoRA-DA: loss on {ROWS - SAMPLES} other documents ") and "before the first step" in second
    )


def check_saved(folder: Path, name: str, **lora: object) -> None:
    """Compare a run's report and adapter with those of the PEFT call."""
    report = json.loads((folder / name / "lora_da_report.json").read_text())
    model, counted = by_peft_call(folder, **lora)
    assert {key: report[key] for key in counted} == counted
    assert report["population_size"] == ROWS
    saved = load_peft_weights(folder / name, device="cpu")
    state = model.state_dict()
    expected = {k.replace(".default", "").replace("vector.weight", "vector"): state[k] for k in state if "lora_" in k}
    assert saved.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.linalg.norm(saved[key].float() - value) <= REBATCHED * torch.linalg.norm(value), key


@pytest.mark.compat("axolotl-ddp")
def test_two_processes_start_as_one_does(folder: Path) -> None:
    """DDP as Axolotl launches it, on CPUs."""
    path = config(folder, "two", plugins=["lora_da", "axolotl_cpu.OnTheCPU"])
    launcher = ("--launcher", "torchrun", "--", "--nproc_per_node=2")
    tests = os.pathsep.join([str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")])
    output = axolotl("train", str(path), *launcher, PYTHONPATH=tests, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    assert output.count("LoRA-DA: initialised 14 of 14 layers") == 1
    check_saved(folder, "two")


@pytest.mark.compat("axolotl-qlora")
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_the_adapter_is_plain_and_merges(folder: Path, adapter: str, trained: str) -> None:
    """`axolotl merge-lora` by its memory-efficient path, with the plugin still named."""
    output = folder / ("rows" if adapter == "qlora" else "lora")
    if adapter == "lora":
        path = config(folder, "lora", adapter="lora", load_in_4bit=False)
        assert_started(run(train, path, output, folder / "lora.log").lines())
    saved = json.loads((output / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True
    assert saved["rank_pattern"] == {} and saved["r"] == 4
    axolotl("merge-lora", str(output.with_suffix(".yml")))

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(output / "merged", dtype=torch.float32)
    if adapter == "qlora":  # Axolotl merges into what the quantised base stands for, with its own rounding
        assert all(torch.isfinite(p).all() for p in merged.parameters())
        return
    ids = torch.tensor([few_tokens(documents(1))[0]["input_ids"]])
    with torch.no_grad():
        untouched = base(ids).logits
        started = PeftModel.from_pretrained(base, output).eval()(ids).logits
        difference = merged.eval()(ids).logits - started
    assert torch.linalg.norm(difference) <= 0.05 * torch.linalg.norm(started - untouched)


def test_without_the_line_nothing_happens(folder: Path) -> None:
    """Installed but not named: plain LoRA, no report."""
    done = run(train, config(folder, "plain", plugins=[], lora_da=None), folder / "plain", folder / "plain.log")
    assert done.succeeded and "LoRA-DA" not in done.text
    assert not (folder / "plain" / "lora_da_report.json").exists()
    assert all(not value.any() for key, value in done.adapter().items() if "lora_B" in key)
