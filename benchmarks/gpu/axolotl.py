"""One step of `axolotl train` in a process of its own, and the adapter that it started from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from axolotl_lora_da.bare_name import PLUGIN
from benchmarks.tokenized_rows import Row

ROOT = Path(__file__).parents[2]
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
# At a rate of zero, what is saved after a step is what was there before it.
SETTINGS: dict[str, Any] = {
    "plugins": [PLUGIN],
    "adapter": "qlora",
    "load_in_4bit": True,
    "lora_dropout": 0.0,
    "lora_target_linear": True,
    "sequence_len": 128,
    "shuffle_merged_datasets": False,
    "max_steps": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.0,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "weight_decay": 0.0,
    "save_strategy": "no",
    "logging_steps": 1,
    "seed": 42,
    "dataset_num_proc": 1,
    "bf16": True,
}


def first_adapter(folder: Path, settings: Mapping[str, Any], rows: Sequence[Row], fused: bool) -> dict[str, Tensor]:
    """Train one step and return the adapter, in float32.

    Args:
        folder: an empty one.
        settings: of the config file, beside those above.
        rows: to train on.
        fused: whether Axolotl's kernels for LoRA are on.

    Raises:
        RuntimeError: it failed; the message is the end of what was printed.
    """
    data, config = folder / "rows.jsonl", folder / "config.yml"
    marked = ({**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows)
    data.write_text("".join(json.dumps(row) + "\n" for row in marked), encoding="utf-8")
    written = {**SETTINGS, **dict.fromkeys(KERNELS, fused), **settings}
    written["datasets"] = [{"path": str(data), "ds_type": "json", "type": None}]
    written |= {"dataset_prepared_path": str(folder / "prepared"), "output_dir": str(folder / "adapter")}
    config.write_text(yaml.safe_dump(written), encoding="utf-8")
    command = [sys.executable, "-m", "axolotl.cli.train", str(config)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, text=True)
    saved = folder / "adapter" / "adapter_model.safetensors"
    if ended.returncode or not saved.exists():
        raise RuntimeError(f"axolotl train ended with {ended.returncode}: {ended.stdout[-3000:]}")
    return {name: tensor.float() for name, tensor in load_file(saved).items()}
