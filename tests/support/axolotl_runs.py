"""Axolotl's commands, each in a process of its own that is forked from one that has imported Axolotl.

What a run patches in torch and transformers ends with it, and a run takes seconds, not half a minute. Import this after
Axolotl's own skip.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from models import N_PROJECTIONS, WIDE, Document, documents, tiny_llama, with_lora
from peft.utils.save_and_load import load_peft_weights
from settings import as_solved
from torch import Tensor
from trainers import by_hand, tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from axolotl_lora_da.bare_name import PLUGIN

ROWS, SAMPLES = 24, 16
PATIENCE = 300  # seconds that a run may take
STARTED = f"LoRA-DA: initialised {N_PROJECTIONS} of {N_PROJECTIONS}"  # what a run of all layers says

SETTINGS = {
    "plugins": [PLUGIN],
    "lora_da": {"samples": SAMPLES, "first_step": "gamma"},
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    "shuffle_merged_datasets": False,
    "sequence_len": 96,
    "pad_to_multiple_of": 8,
    "max_steps": 1,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.0,  # so that the initial adapter is saved
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "save_strategy": "no",
    "logging_steps": 1,
    "seed": 42,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": None,
    "bf16": False,
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
}

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["axolotl.cli.train", "axolotl.cli.preprocess", "axolotl.core.builders.causal", "axolotl.train"]
)


def train(config: str) -> None:
    """What `axolotl train` runs once it has launched its process."""
    from axolotl.cli.train import do_cli

    sys.argv = ["train"]
    do_cli(config)


def preprocess(config: str) -> None:
    """What `axolotl preprocess` runs."""
    from axolotl.cli.preprocess import do_cli

    sys.argv = ["preprocess"]
    do_cli(config)


class Project:
    """A folder with a tiny base model, tokenised rows, and the runs made of them.

    Args:
        folder: an empty one.
        model: the base; a tiny Llama if None.
        reader: its tokenizer or processor; the tokenizer of words if None.
    """

    def __init__(self, folder: Path, model: PreTrainedModel | None = None, reader: Any = None) -> None:
        self.folder = folder
        (model or tiny_llama(**WIDE)).save_pretrained(folder / "base")
        (reader or tokenizer()).save_pretrained(folder / "base")
        self.rows("rows", documents(ROWS))

    def rows(self, name: str, rows: list[Document]) -> dict[str, Any]:
        """Write rows and describe them as an entry of `datasets:`."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({**r, "attention_mask": [1] * len(r["input_ids"])}) + "\n" for r in rows))
        return {"path": str(path), "ds_type": "json", "type": None}

    def base(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder / "base", dtype=torch.float32)

    def run(self, name: str, command: Callable[[str], None] = train, forked: bool = True, **changes: Any) -> Run:
        """Run a command with the settings above and these changes; `None` takes a setting out.

        Not `forked`, its process imports everything itself, in the environment of the moment.
        """
        settings = {
            **SETTINGS,
            "base_model": str(self.folder / "base"),
            "datasets": [{"path": str(self.folder / "rows.jsonl"), "ds_type": "json", "type": None}],
            "dataset_prepared_path": str(self.folder / f"{name}-prepared"),
            "output_dir": str(self.folder / name),
            **changes,
        }
        config, log = self.folder / f"{name}.yml", self.folder / f"{name}.log"
        config.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return run(command, config, self.folder / name, log, forked)

    def by_hand(self, rows: list[Document] | None = None, samples: int = SAMPLES, **lora: Any) -> dict[str, Tensor]:
        """The adapter that the PEFT call gives, under the names of a saved one."""
        model = with_lora(self.base(), **lora)
        found = by_hand(model, rows or documents(ROWS), as_solved(samples=samples), bf16=False)
        return {name.replace(".default", ""): value for name, value in found.items()}


def run(command: Callable[[str], None], config: Path, output: Path, log: Path, forked: bool = True) -> Run:
    """Run a command on a config in a process of its own."""
    processes = _forks if forked else multiprocessing.get_context("spawn")
    process = processes.Process(target=_in_process, args=(command, str(config), log))
    process.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
    return Run(output, log.read_text(), process.exitcode == 0)


class Run:
    """What a command left behind.

    Args:
        output: the folder of the adapter.
        text: what was printed.
        succeeded: whether it ended well.
    """

    def __init__(self, output: Path, text: str, succeeded: bool) -> None:
        self.output, self.text, self.succeeded = output, text, succeeded

    def lines(self) -> list[str]:
        """What LoRA-DA said, without the numbers of its report; where a run failed, all it printed is shown."""
        assert self.succeeded, self.text[-6000:]
        parts = self.text.replace("\r", "\n").splitlines()
        return [part.strip().split(" layers from ")[0] for part in parts if part.strip().startswith("LoRA-DA: ")]

    def error(self) -> str:
        """What the last traceback ends with."""
        assert not self.succeeded, self.text[-6000:]
        return re.findall(r"^\S+Error: .*", self.text, re.MULTILINE)[-1]

    @property
    def steps(self) -> int:
        """Training steps that were logged."""
        return self.text.count("'grad_norm'")

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.output / "lora_da_report.json").read_text())
        return found

    def adapter(self, folder: str = ".") -> dict[str, Tensor]:
        """The saved LoRA weights."""
        saved = load_peft_weights(self.output / folder, device="cpu")
        return {name: value for name, value in saved.items() if "lora_" in name}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative difference of any weight."""
    assert one and one.keys() == other.keys()
    return max(
        (torch.linalg.norm(one[name].float() - value) / torch.linalg.norm(value)).item()
        for name, value in other.items()
    )


def _in_process(command: Callable[[str], None], config: Path, log: Path) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    command(config)
