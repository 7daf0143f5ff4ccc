"""The example programs run as they stand, on a tiny model and the project's own instruction set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
from models import WIDE, tiny_llama
from peft.utils.save_and_load import load_peft_weights
from trainers import tokenizer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    tiny_llama(**WIDE).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    command = [sys.executable, EXAMPLES / "make_instructions.py", folder / "rows.jsonl", "--rows", "40"]
    subprocess.run(command, check=True)
    return folder


@pytest.mark.parametrize("program", ["trl_sft.py", "peft_only.py"])
def test_program_trains_from_data(program: str, folder: Path) -> None:
    output = folder / program
    arguments = ["--model", folder / "model", "--data", folder / "rows.jsonl", "--output", output, "--steps", "2"]
    run = subprocess.run(
        [sys.executable, EXAMPLES / program, *arguments, "--samples", "12", "--rank", "4", "--batch-size", "4"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("LoRA-DA: initialised 14 of 14 layers from 12 samples") == 1
    report = json.loads((output / "lora_da_report.json").read_text(encoding="utf-8"))
    assert report["samples"] == 12 and len(report["layers"]) == 14
    saved = load_peft_weights(output, device="cpu")
    assert all(value.any() for value in saved.values())
